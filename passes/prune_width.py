"""prune_width: fewer channels in feed-forwards, fewer groups of heads in attentions, as many in each block."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.engine.layer_stats import LayerStats, Stat
from compress.engine.modelpass import Stage
from compress.engine.reshape import ReshapePass
from compress.engine.stream import BlockStream
from compress.errors import UnsupportedError, UsageError
from compress.layer import Layer
from compress.maths import channels
from compress.models.edits import Shape
from compress.models.model import Model
from compress.models.skeleton import OUTER
from compress.records import LayerResult
from compress.wiring import widths
from compress.wiring.twins import Part, Twins
from compress.wiring.widths import Family, Group

MULTIPLES = (64, 32, 16, 8, 4, 2)
"""Widths stay multiples of the first of these that goes into them at least eight times."""


class PruneWidth(ReshapePass):
    """Narrower layers, the same in every block, so that a plain config.json says it and every runtime computes less.

    Feed-forward channels leave with their rows of gate and up and their column of down; a head of keys and values
    leaves with all query heads of its group, and heads keep their size. Which tensors these are is read off the module
    tree built with the smaller number in its config, and every block is run narrowed beside the same block with zeros
    in place of what is cut: an architecture that reads the channels elsewhere too is refused. What a block's layers
    lose, those after them are calibrated with.

    Settings: `ffn` share of the feed-forward channels to remove, or `ffn_size` how many stay; `kv_groups` how many
    groups of heads to remove, or `kv_heads` how many stay (heads of keys and values; without grouped heads, heads);
    with none of them a quarter of the feed-forward. `by` which channels stay: `obs` those whose loss the rest could
    least make up for, one after the other (Optimal Brain Surgeon for whole columns, Kurtic et al. 2023, arXiv
    2302.04089), `wanda` those that put out most alone, `activation` those of largest mean |input| (Muralidharan et al.
    2024, arXiv 2407.14679 §2.2), `magnitude` those of largest weights; `refit` whether the layer that read them is
    solved for again by least squares (by=magnitude and refit=false need no data); `damp` share of the mean diagonal
    added to the second moments; `multiple` what the new width of a feed-forward is a multiple of (by default the
    largest power of two up to 64 that goes into the old one at least eight times).
    """

    name: ClassVar[str] = "prune_width"

    ffn: float | None = Field(default=None, ge=0, lt=1)
    ffn_size: int | None = Field(default=None, ge=1)
    kv_groups: int | None = Field(default=None, ge=0)
    kv_heads: int | None = Field(default=None, ge=1)
    by: channels.Score = "obs"
    refit: bool = True
    damp: float = Field(default=0.01, gt=0, le=1)
    multiple: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for share, size in (("ffn", "ffn_size"), ("kv_groups", "kv_heads")):
            if getattr(self, share) is not None and getattr(self, size) is not None:
                raise UsageError(
                    f"{self.name}: {share} says how much goes and {size} how much stays. Keep one of them."
                )
        return self

    @property
    def wants(self) -> frozenset[Stat]:
        return frozenset({Stat.HESSIAN, Stat.ABS_MEAN}) if self.refit or self.by != "magnitude" else frozenset()

    def check(self, model: Model) -> None:
        if model.image is not None:
            raise UnsupportedError(
                f"{self.name} narrows transformers, whose config says how wide they are. For convolutions there is "
                "prune_channels."
            )

    def shape(self, model: Model) -> Shape:
        return shape_of(model, self.families(model))

    def families(self, model: Model) -> list[Family]:
        """What becomes narrower, and by how much. Raises: UsageError, UnsupportedError."""
        try:
            heads = self._heads(model)
            return ([heads] if heads else []) + self._feed_forwards(model)
        except (UsageError, UnsupportedError) as error:
            raise type(error)(f"{self.name}: {error}") from error

    def _heads(self, model: Model) -> Family | None:
        if self.kv_groups is None and self.kv_heads is None:
            return None
        units = widths.heads_of(model)
        kept = self.kv_heads if self.kv_heads is not None else units - (self.kv_groups or 0)
        if not 1 <= kept <= units:
            raise UsageError(
                f"{self._text('kv_groups', 'kv_heads')} leaves {kept} of {units} heads of keys and values. Allowed: "
                f"kv_groups from 0 to {units - 1}, kv_heads from 1 to {units}."
            )
        return widths.heads(model, kept)

    def _feed_forwards(self, model: Model) -> list[Family]:
        asked = self.ffn is not None or self.ffn_size is not None
        if not asked and (self.kv_groups is not None or self.kv_heads is not None):
            return []
        found = widths.feed_forwards(model)
        if not found:
            raise UnsupportedError(
                f"no number in the config of '{model.config.model_type}' is the width of its feed-forwards alone "
                f"(looked for: {', '.join(widths.FEED_FORWARD)})."
            )
        if self.ffn_size is not None and len(found) > 1:
            raise UsageError(f"ffn_size is one of {', '.join(one.key for one in found)}. Give a share instead (ffn).")
        return [widths.kept_of(one, self._left(one)) for one in found]

    def _left(self, family: Family) -> int:
        if self.ffn_size is not None:
            return self.ffn_size
        size, share = family.units, 0.25 if self.ffn is None else self.ffn
        multiple = self.multiple or next((step for step in MULTIPLES if size % step == 0 and size >= 8 * step), 1)
        kept = round(size * (1 - share) / multiple) * multiple
        if share and not 0 < kept < size:
            raise UsageError(
                f"ffn={share:g} of {family.key}={size} rounds to {'all' if kept <= 0 else 'none'} of it, what stays "
                f"being a multiple of {multiple}. Choose another share, or multiple=."
            )
        return kept if share else size

    def _text(self, *names: str) -> str:
        return next(f"{name}={getattr(self, name)}" for name in names if getattr(self, name) is not None)

    def apply(self, stage: Stage) -> None:
        with torch.no_grad():
            _Narrowing(self, stage).run()


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


class _Narrowing:
    """One run of the pass, block by block."""

    def __init__(self, item: PruneWidth, stage: Stage) -> None:
        self.item, self.stage, self.model = item, stage, stage.model
        self.families = item.families(stage.model)
        self.made = stage.reshape(shape_of(stage.model, self.families))
        self.stream: BlockStream | None = None
        if stage.calibration is not None and item.wants:
            data = stage.calibration
            self.stream = BlockStream(
                self.model, data.batches(), device=stage.device, spill=stage.folder, dtype=data.dtype
            )
        self.groups = [self._groups(index) for index in range(len(self.model.structure.blocks))]

    def _groups(self, index: int) -> list[Group]:
        return [group for family in self.families for group in widths.groups_of(family, self.model, index)]

    def run(self) -> None:
        """All segments."""
        outer = Part(self.model.layers(OUTER), self.model.plain(OUTER))
        twins, variants = self._laid_out(outer)
        if self.stream is not None:
            self.stream.start(outer.layers)
        count = len(self.groups)
        for index in range(count):
            self.stage.progress.tick("Narrowing blocks", index, count)
            started = time.perf_counter()
            done = self._block(index)
            narrow = done.narrow(variants)
            if not twins.agree(index, done.wide(), narrow):
                raise self._refusal(index)
            twins.advance(index, done.wide())
            self.stage.put(index, narrow.layers, narrow.plain)
            self._report(done, narrow, time.perf_counter() - started)
            self.stage.progress.tick("Narrowing blocks", index + 1, count)
        self.stage.put(OUTER, outer.layers, outer.plain)

    def _laid_out(self, outer: Part) -> tuple[Twins, dict[str, int]]:
        """The models side by side, and how each width is laid out, tried on the first block with some of its units.

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
            narrow = done.narrow(variants)
            pair = done.wide(), narrow
            twins = twins or Twins(self.model, self.made, (outer, outer), pair, self.stage.device)
            if twins.agree(0, *pair):
                return twins, variants
        raise self._refusal(0)

    def _refusal(self, index: int) -> UnsupportedError:
        keys = ", ".join(family.key for family in self.families)
        readers = ", ".join(group.reader for group in self.groups[index][:3])
        return UnsupportedError(
            f"{self.item.name}: {self.model.structure.blocks[index]} narrowed by {keys} does not put out what it does "
            f"with zeros for what is cut from {readers}: something else reads these channels (a norm over all of them, "
            "a residual, an operation without weights). This architecture cannot be narrowed there."
        )

    def _block(self, index: int) -> _Done:
        """What stays is decided family by family, each with the inputs that the ones before leave."""
        done = _Done(self.model.layers(index), self.model.plain(index))
        if self.stream is not None:
            self.stream.load(index, done.layers, done.plain)
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

    def _stats(self, index: int, names: list[str]) -> dict[str, LayerStats]:
        return {} if self.stream is None else self.stream.collect(index, names, self.item.wants)

    def _decide(self, done: _Done, group: Group, stats: LayerStats) -> None:
        family, weight = group.family, done.layers[group.reader].float_weight()
        size, by = weight.shape[1] // family.units, self.item.by
        unreached = stats.hessian is None and by != "magnitude"
        if family.kept == family.units:
            kept = torch.arange(family.units)
        elif by == "magnitude" or stats.hessian is None:
            kept = channels.most_important(self._magnitudes(done, group, size), family.kept)
        else:
            assert stats.abs_mean is not None
            kept = channels.chosen(weight, stats.hessian, stats.abs_mean, size, family.kept, by, self.item.damp)
        self._cut(done, group, kept, stats.hessian if self.item.refit else None)
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
                weights += torch.split(rows, list(family.parts(len(rows), 0)))
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
            system, _ = channels.damped(hessian, self.item.damp)
            weight = channels.refitted(layer.float_weight(), system, columns).to(layer.weight.dtype)
        done.layers[group.reader] = replace(layer, weight=weight)

    def _report(self, done: _Done, narrow: Part, seconds: float) -> None:
        for group, kept in done.kept:
            family = group.family
            if len(kept) == family.units:
                continue
            for name in (group.reader, *group.makers):
                if name in narrow.layers:
                    self.stage.results.append(self._result(done, narrow, group, name, seconds / len(done.layers)))

    def _result(self, done: _Done, narrow: Part, group: Group, name: str, seconds: float) -> LayerResult:
        before, after = self.model.structure.layers[name], narrow.layers[name]
        refit = ", refitted" if self.item.refit and name in done.errors else ""
        note = f"{before.shape[0]} x {before.shape[1]} became {after.shape[0]} x {after.shape[1]}"
        reader = name == group.reader
        notes = (f"{note}: {group.family.key} {group.family.units} to {group.family.kept}, by {self.item.by}{refit}",)
        return LayerResult(
            layer=name,
            users=before.users,
            pass_text=str(self.item),
            changed=True,
            bits_per_weight=after.bits_per_weight,
            output_error=done.errors.get(name) if reader else None,
            output_reference="same inputs" if name in done.errors else "",
            seconds=seconds,
            notes=(*notes, done.notes[name]) if reader and done.notes[name] else notes,
        )
