"""One narrowing of a model, block by block: what stays is decided, what reads it refitted, and all held against the
wide model with zeros."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from compress.engine.layer_stats import LayerStats, Stat
from compress.engine.modelpass import Stage
from compress.engine.stream import BlockStream
from compress.errors import UnsupportedError
from compress.layer import Layer
from compress.maths import channels
from compress.models.edits import Shape
from compress.models.model import Model
from compress.models.skeleton import OUTER
from compress.records import LayerResult
from compress.wiring import widths
from compress.wiring.hidden_width import KEY, HiddenWidth, survey
from compress.wiring.twins import LOOSE, TOLERANCE, Part, Twins
from compress.wiring.widths import Family, Group

WANTS = frozenset({Stat.HESSIAN, Stat.ABS_MEAN})


@dataclass(frozen=True)
class How:
    """by, refit, damp: see the settings of `prune_width`; name, text: of the pass, for messages and results."""

    name: str
    text: str
    by: channels.Score
    refit: bool
    damp: float


def shape_of(model: Model, families: list[Family]) -> Shape:
    """The plain config of all of them."""
    config = {key: value for family in families for key, value in family.changes.items()}
    return Shape(config, model.edits, model.origin)


@dataclass
class _Done:
    """One block: its layers and tensors as wide as before, with zeros in what goes; what is left of them; results."""

    layers: dict[str, Layer]
    plain: dict[str, Tensor]
    kept: list[tuple[Group, Tensor]] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def wide(self) -> Part:
        return Part(self.layers, self.plain)

    def narrow(self, variants: Mapping[str, int]) -> Part:
        layers, plain = dict(self.layers), dict(self.plain)
        for group, kept in self.kept:
            cut, tensors = widths.cut_group(group, kept, variants[group.family.key], layers, plain)
            layers, plain = layers | cut, plain | tensors
        return Part(layers, plain)


class Narrowing:
    """One run of the pass, block by block."""

    def __init__(self, how: How, stage: Stage, families: list[Family]) -> None:
        self.how, self.stage, self.model = how, stage, stage.model
        self.families = [family for family in families if family.key != KEY]
        self.all = families
        self.made = stage.reshape(shape_of(stage.model, families))
        self.stream = self._stream()
        self.hidden = self._hidden(next((one for one in families if one.key == KEY and one.axes), None))
        self.variants: dict[str, int] = {}
        self.groups = [self._groups(index) for index in range(len(self.model.structure.blocks))]

    def _stream(self) -> BlockStream | None:
        data, stage = self.stage.calibration, self.stage
        if data is None or (self.how.by == "magnitude" and not self.how.refit):
            return None
        return BlockStream(self.model, data.batches(), device=stage.device, spill=stage.folder, dtype=data.dtype)

    def _hidden(self, family: Family | None) -> HiddenWidth | None:
        data, stage = self.stage.calibration, self.stage
        if family is None:
            return None
        assert data is not None
        try:
            return survey(
                self.model,
                data.batches(),
                family,
                self.how.by,
                device=stage.device,
                dtype=data.dtype,
                spill=stage.folder,
            )
        except UnsupportedError as error:
            raise UnsupportedError(f"{self.how.name}: {error}") from error

    def _pair(self, index: int, wide: Part, narrow: Part) -> tuple[Part, Part]:
        """Both as they are compared."""
        if self.hidden is None:
            return wide, narrow
        return self.hidden.masked(index, wide), self.hidden.narrow(index, narrow, exact=True)

    def _left(self, index: int, narrow: Part) -> Part:
        """As it is stored."""
        return narrow if self.hidden is None else self.hidden.narrow(index, narrow, exact=False)

    def _groups(self, index: int) -> list[Group]:
        return [group for family in self.families for group in widths.groups_of(family, self.model, index)]

    def run(self) -> None:
        """All segments."""
        outer = Part(self.model.layers(OUTER), self.model.plain(OUTER))
        twins = self._laid_out(outer)
        if self.stream is not None:
            self.stream.start(outer.layers)
        count = len(self.groups)
        for index in range(count):
            self.stage.progress.tick("Narrowing blocks", index, count)
            started = time.perf_counter()
            done = self._block(index)
            narrow = done.narrow(self.variants)
            pair = self._pair(index, done.wide(), narrow)
            if not twins.agree(index, *pair):
                raise self._refusal(index)
            twins.advance(index, pair[0])
            narrow = self._left(index, narrow)
            self.stage.put(index, narrow.layers, narrow.plain)
            self._report(done, narrow, time.perf_counter() - started)
            self.stage.progress.tick("Narrowing blocks", index + 1, count)
        if self.hidden is not None and not twins.agree_after():
            raise UnsupportedError(
                f"{self.how.name}: what comes after the blocks, narrowed by {KEY}, does not put out what it does with "
                "zeros for what is cut: the hidden size counts there otherwise than in a norm and a head."
            )
        left = self._left(OUTER, outer)
        self.stage.put(OUTER, left.layers, left.plain)
        self._report(_Done(dict(outer.layers), {}), left, 0.0)

    def _laid_out(self, outer: Part) -> Twins:
        """The models side by side; how each width is laid out is tried on the first block with some of its units.

        Raises: UnsupportedError where the first block puts out something else however it is cut.
        """
        done = _Done(self.model.layers(0), self.model.plain(0))
        for group in self.groups[0]:
            family = group.family
            order = torch.randperm(family.units, generator=torch.Generator().manual_seed(0))
            self._cut(done, group, order[: family.kept].sort().values, None)
        keys = [family.key for family in self.families]
        twins = None
        for number in range(2 ** len(keys)):
            variants = {key: number >> place & 1 for place, key in enumerate(keys)}
            pair = self._pair(0, done.wide(), done.narrow(variants))
            if twins is None:
                twins = self._twins(outer, pair)
            if twins.agree(0, *pair):
                self.variants = variants
                return twins
        raise self._refusal(0)

    def _twins(self, outer: Part, first: tuple[Part, Part]) -> Twins:
        kept = None if self.hidden is None else self.hidden.kept
        allowed = TOLERANCE if kept is None else LOOSE
        twins = Twins(self.model, self.made, self._pair(OUTER, outer, outer), first, self.stage.device, kept, allowed)
        if not twins.agree_before():
            raise UnsupportedError(
                f"{self.how.name}: what enters the blocks, narrowed by {KEY}, is not what it is with zeros for what is "
                "cut: a factor of the hidden size (as in Gemma) or something else comes after the embedding."
            )
        return twins

    def _refusal(self, index: int) -> UnsupportedError:
        keys = ", ".join(family.key for family in self.all)
        readers = ", ".join(group.reader for group in self.groups[index][:3]) or "the stream"
        return UnsupportedError(
            f"{self.how.name}: {self.model.structure.blocks[index]} narrowed by {keys} does not put out what it does "
            f"with zeros for what is cut from {readers}: something else reads these channels (a norm over all of them, "
            "a residual, an operation without weights). This architecture cannot be narrowed there."
        )

    def _block(self, index: int) -> _Done:
        """What stays is decided family by family, each with the inputs that the ones before leave."""
        done = _Done(self.model.layers(index), self.model.plain(index))
        if self.stream is not None:
            self.stream.load(index, done.layers, done.plain)
            self._refit_readers(done, index)
        for family in self.families:
            groups = [group for group in self.groups[index] if group.family is family]
            stats = self._stats(index, [group.reader for group in groups])
            for group in groups:
                self._decide(done, group, stats.get(group.reader, LayerStats()))
                if self.stream is not None:
                    self.stream.put(done.layers[group.reader])
        if self.stream is not None:
            self.stream.advance(index)
            self.stream.release(index)
        return done

    def _refit_readers(self, done: _Done, index: int) -> None:
        """What reads the stream makes up for the channels that go by those that stay."""
        if self.hidden is None or self.stream is None or not self.how.refit:
            return
        names = [name for name in self.hidden.readers(index) if name in done.layers]
        for name, stats in self._stats(index, names).items():
            if stats.hessian is not None:
                weight = self._refitted(done.layers[name], stats.hessian, self.hidden.kept)
                done.layers[name] = done.layers[name].with_weight(weight)
                self.stream.put(done.layers[name])

    def _refitted(self, layer: Layer, hessian: Tensor, columns: Tensor) -> Tensor:
        assert isinstance(layer.weight, Tensor)
        system, _ = channels.damped(hessian, self.how.damp)
        return channels.refitted(layer.float_weight(), system, columns).to(layer.weight.dtype)

    def _stats(self, index: int, names: list[str]) -> dict[str, LayerStats]:
        return {} if self.stream is None else self.stream.collect(index, names, WANTS)

    def _decide(self, done: _Done, group: Group, stats: LayerStats) -> None:
        family, weight = group.family, done.layers[group.reader].float_weight()
        size, by = weight.shape[1] // family.units, self.how.by
        unreached = stats.hessian is None and by != "magnitude"
        if family.kept == family.units:
            kept = torch.arange(family.units)
        elif by == "magnitude" or stats.hessian is None:
            kept = channels.most_important(self._magnitudes(done, group, size), family.kept)
        else:
            assert stats.abs_mean is not None
            kept = channels.chosen(weight, stats.hessian, stats.abs_mean, size, family.kept, by, self.how.damp)
        self._cut(done, group, kept, stats.hessian if self.how.refit else None)
        if stats.hessian is not None:
            found = done.layers[group.reader].float_weight()
            done.errors[group.reader] = channels.output_error(weight, found, stats.hessian)
        done.notes[group.reader] = "no calibration token reached it: by its weights alone" if unreached else ""

    def _magnitudes(self, done: _Done, group: Group, size: int) -> Tensor:
        """The norm of all weights that make or read each unit."""
        family = group.family
        weights = [done.layers[group.reader].float_weight().T]
        for name in group.makers:
            if name in done.layers:
                rows = done.layers[name].float_weight()
                weights += torch.split(rows, list(family.parts(len(rows), self.variants[family.key])))
        return sum((each.square().reshape(family.units, -1).sum(1) for each in weights), torch.zeros(1)).sqrt()

    def _cut(self, done: _Done, group: Group, kept: Tensor, hessian: Tensor | None) -> None:
        """Zeros in what goes, the rest refitted where there are second moments."""
        done.kept.append((group, kept))
        if len(kept) == group.family.units:
            return
        layer = done.layers[group.reader]
        assert isinstance(layer.weight, Tensor)
        columns = channels.columns_of(kept, layer.shape[1] // group.family.units)
        weight = torch.zeros_like(layer.weight)
        if hessian is None:
            weight[:, columns] = layer.weight[:, columns]
        else:
            weight = self._refitted(layer, hessian, columns)
        done.layers[group.reader] = replace(layer, weight=weight)

    def _report(self, done: _Done, narrow: Part, seconds: float) -> None:
        """A result for each layer of another shape."""
        for name, after in narrow.layers.items():
            before = self.model.structure.layers[name]
            if after.shape == before.shape:
                continue
            self.stage.results.append(
                LayerResult(
                    layer=name,
                    users=before.users,
                    pass_text=self.how.text,
                    changed=True,
                    bits_per_weight=after.bits_per_weight,
                    output_error=done.errors.get(name),
                    output_reference="same inputs" if name in done.errors else "",
                    seconds=seconds / len(narrow.layers),
                    notes=tuple(note for note in (self._note(name, after), done.notes.get(name, "")) if note),
                )
            )

    def _note(self, name: str, after: Layer) -> str:
        before = self.model.structure.layers[name].shape
        found = [
            f"{one.key} {one.units} to {one.kept}" for one in self.all if name in one.axes and one.kept < one.units
        ]
        shapes = f"{before[0]} x {before[1]} became {after.shape[0]} x {after.shape[1]}"
        return f"{shapes}: {', '.join(found)}, by {self.how.by}"
