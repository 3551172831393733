"""The walk of a streamed stage (design §3): per block and per pass collect, apply, drop; then run the block again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from compress import memory
from compress.engine import backward, store
from compress.engine.applying import apply_block, apply_layer
from compress.engine.blockpass import Block, BlockPass
from compress.engine.collect import LayerStats, Stat
from compress.engine.image_stream import Stream, open_stream, wiring_batch
from compress.engine.layerpass import LayerPass, Pass
from compress.engine.matching import Resolution
from compress.engine.originals import Sources
from compress.engine.stream import BlockStream
from compress.engine.turns import Turns
from compress.inputs.data import Calibration
from compress.layer import Layer, LayerKind
from compress.maths import products
from compress.models.model import Model
from compress.models.skeleton import OUTER
from compress.progress import Progress
from compress.records import LayerResult


class Steps(Protocol):
    """Finished steps of this walk, as a journal keeps them."""

    def __contains__(self, step: str) -> bool: ...

    def get(self, step: str) -> Any:
        """The data of a finished step, or None."""
        ...

    def add(self, step: str, data: Any = None) -> None:
        """Note a step as finished."""
        ...


Found = tuple[int, LayerResult]
"""A layer's result with the place of its pass in the pipeline."""


class Walk:
    """One walk over the segments: outer layers that need no data, blocks, then the outer rest.

    passes: by their place in the pipeline.
    """

    def __init__(
        self,
        passes: Mapping[int, Pass],
        model: Model,
        resolution: Resolution,
        calibration: Calibration | None,
        folder: Path,
        journal: Steps | None,
        device: str,
        sources: Sources,
    ) -> None:
        self.passes = passes
        self.model = model
        self.resolution = resolution
        self.folder = folder
        self.journal = journal
        self.sources = sources
        wants = frozenset[Stat]().union(*(self._wants(item) for item in passes.values()))
        self.reference = bool(wants & {Stat.REFERENCE, Stat.CROSS})
        self.stream: Stream | None = None
        if calibration is not None:
            batches = calibration.batches()
            self.stream = open_stream(
                model, batches, device=device, spill=folder, reference=self.reference, dtype=calibration.dtype
            )
        elif wants:  # only how layers are wired is asked for, which any few tokens show
            self.stream = open_stream(model, [wiring_batch(model)], device=device)
        self.turns: Turns | None = None
        self.guides: dict[int, backward.Saliency] = {}  # by number of row groups
        self.results: list[Found] = []

    def run(self, progress: Progress) -> list[Found]:
        """All segments in order; what the journal names is read back instead of computed."""
        early, late = self._split_outer()
        changed, changed_plain, found = self._before(early, progress)
        count = len(self.model.structure.blocks)
        for index in range(count):
            self._block(index)
            self.model.release()
            progress.tick("Compressing blocks", index + 1, count)
        outer, plain = self.model.layers(OUTER) | changed, self.model.plain(OUTER) | changed_plain
        if self.stream is not None:
            self.stream.outer = outer
        found += self._apply_all(outer, late, plain)
        store.write_segment(self.folder, OUTER, outer, plain)
        return found + self.results

    def _before(self, early: list[str], progress: Progress) -> tuple[dict[str, Layer], dict[str, Tensor], list[Found]]:
        """All that comes before the blocks. Returns what passes changed outside of them, and the results: the rest, an
        embedding's table mostly, is read again at the end and takes no memory meanwhile."""
        outer, plain = self.model.layers(OUTER), self.model.plain(OUTER)
        before, plain_before = dict(outer), dict(plain)
        found = self._apply_all(outer, early, plain)
        if self.stream is not None:
            self._go_back(progress)
            self.stream.start(outer)
            self.stream.outer = {}
        self.model.release()
        changed = {name: layer for name, layer in outer.items() if layer is not before[name]}
        return changed, {name: tensor for name, tensor in plain.items() if tensor is not plain_before[name]}, found

    def _go_back(self, progress: Progress) -> None:
        """The backward pass that guided Hessians ask for, again in a resumed run, whose blocks it decides alike."""
        steps = [store.segment_file(index) for index in range(len(self.model.structure.blocks))]
        if self.journal is not None and all(step in self.journal for step in steps):
            return
        for groups in sorted({item.row_groups for item in self.passes.values()} - {0}):
            resolved = self.resolution.passes.items()
            names = [name for name, found in resolved if any(item.row_groups == groups for _, item in found)]
            assert isinstance(self.stream, BlockStream)
            with products.fast():
                self.guides[groups] = backward.saliency(
                    self.model,
                    self.stream.batches,
                    names,
                    groups,
                    device=str(self.stream.device),
                    spill=self.folder,
                    progress=progress,
                )
            memory.give_back()

    def _split_outer(self) -> tuple[list[str], list[str]]:
        """Layers before the blocks (embeddings, with what is tied to them) and after (the rest)."""
        specs = self.model.structure.segment_layers(OUTER)
        early = [spec.name for spec in specs if spec.kind is LayerKind.EMBEDDING]
        return early, [spec.name for spec in specs if spec.name not in early]

    def _block(self, index: int) -> None:
        step = store.segment_file(index)
        if self.journal is not None and step in self.journal:
            self._replay(index, self.journal.get(step))
            return
        layers, plain = self.model.layers(index), self.model.plain(index)
        ahead_in_turn = self._ahead_in_turn(layers)
        self._load(index, layers, plain, ahead=not ahead_in_turn)
        found = self._apply_all(layers, list(layers), plain, index)
        self._store_floats_as_planned(layers)
        if ahead_in_turn and self.turns is not None:
            with products.fast():
                self.turns.look_ahead()
        store.write_segment(self.folder, index, layers, plain)
        if self.journal is not None:
            self.journal.add(step, [[place, result.model_dump(mode="json")] for place, result in found])
        self.results += found
        self._advance(index)

    def _store_floats_as_planned(self, layers: dict[str, Layer]) -> None:
        """Weights that a pass rescaled in float32 and none quantized go back to the type they came in, as planned."""
        for name, layer in layers.items():
            wanted = self.model.structure.layers[name].source_dtype
            if isinstance(layer.weight, Tensor) and layer.weight.dtype != wanted:
                layers[name] = replace(layer, weight=layer.weight.to(wanted))
                if self.stream is not None:
                    self.stream.put(layers[name])

    def _load(self, index: int, layers: dict[str, Layer], plain: dict[str, Tensor], ahead: bool = True) -> None:
        if self.stream is None:
            return
        self.stream.load(index, layers, plain)
        if ahead:
            with products.fast():
                self.stream.look_ahead(index)

    def _ahead_in_turn(self, layers: dict[str, Layer]) -> bool:
        """Whether turns will carry the reference stream over a block: where one pass alone changes it, taking all that
        it changes in turn, and none needs to know before what the block puts out."""
        passes = {place for name in layers for place, _ in self.resolution.passes[name] if place in self.passes}
        chosen = [layer for name, layer in layers.items() if self.resolution.passes[name]]
        if len(passes) != 1 or not isinstance(self.stream, BlockStream):
            return False
        item = self.passes[passes.pop()]
        in_turn = item.in_turn and all(layer.kind is not LayerKind.EXPERT for layer in chosen)
        return in_turn and Stat.CROSS in item.wants and Stat.REFERENCE not in item.wants

    def _replay(self, index: int, data: list[Any]) -> None:
        """A block that an earlier try finished: its results from the journal, its outputs by running it."""
        self.results += [(place, LayerResult.model_validate(item)) for place, item in data]
        if self.stream is None:
            return
        if self.reference:
            self._load(index, self.model.layers(index), self.model.plain(index))
        layers, plain = store.read_segment(self.folder, index, self.model.structure)
        self.stream.load(index, layers, plain)
        self._advance(index)

    def _advance(self, index: int) -> None:
        if self.stream is None:
            return
        with products.fast():
            if self.turns is None:
                self.stream.advance(index)
            else:  # nothing has changed since: what it kept is still right
                assert isinstance(self.stream, BlockStream)
                self.stream.advance(index, self.turns.outputs())
                self.turns = None
        self.stream.release(index)

    def _apply_all(
        self, layers: dict[str, Layer], names: list[str], plain: dict[str, Tensor], index: int = OUTER
    ) -> list[Found]:
        """Apply every pass, in order, to some layers of a segment; `layers` and `plain` are updated."""
        found: list[Found] = []
        if not any(self._pass_for(name, place) for name in names for place in self.passes):
            return found
        source = {name: self.sources.of(layers[name]) for name in names}
        for place, item in self.passes.items():
            chosen = {name: found_pass for name in names if (found_pass := self._pass_for(name, place)) is not None}
            if not chosen:
                continue
            self.turns = self._turns(item, list(chosen), index)
            for group in [tuple(chosen)] if self.turns is None else self.turns.groups:
                part = {name: chosen[name] for name in group}
                with products.fast():
                    stats = self._collect(item, layers, group, index)
                memory.give_back()
                if isinstance(item, BlockPass):
                    results = self._apply_block(item, part, layers, plain, source, stats, index)
                else:
                    results = self._apply_layers(part, layers, source, stats, str(item), index)
                found += [(place, result) for result in results]
                if self.turns is not None:
                    with products.fast():
                        self.turns.settle(group)
                memory.give_back()
        self.sources.keep(index, {name: layers[name] for name in names}, source)
        return found

    def _turns(self, item: Pass, names: list[str], index: int) -> Turns | None:
        """What brings the layers before a pass one group after the other, if it asks for that and the model allows."""
        if not item.in_turn or index == OUTER or not isinstance(self.stream, BlockStream):
            return None
        specs = [self.model.structure.layers[name] for name in names]
        return Turns(self.stream, index, specs, cross=Stat.CROSS in item.wants)

    def _apply_layers(
        self,
        chosen: dict[str, Pass],
        layers: dict[str, Layer],
        source: dict[str, Layer],
        stats: dict[str, LayerStats],
        text: str,
        index: int,
    ) -> list[LayerResult]:
        results = []
        for name, one in chosen.items():
            assert isinstance(one, LayerPass)
            layers[name], result = apply_layer(one, layers[name], source[name], stats.get(name, LayerStats()), text)
            results.append(result)
            if not one.part:  # what a rescaling pass made is what later errors are taken against
                source[name] = layers[name]
            if self.stream is not None and index != OUTER:
                self.stream.put(layers[name])
        return results

    def _apply_block(
        self,
        item: BlockPass,
        chosen: dict[str, Pass],
        layers: dict[str, Layer],
        plain: dict[str, Tensor],
        source: dict[str, Layer],
        stats: dict[str, LayerStats],
        index: int,
    ) -> list[LayerResult]:
        runner = self.stream.runner(index) if self.stream is not None and index != OUTER else None
        block = Block(self._name(index), dict(layers), source, chosen, dict(plain), stats, runner)
        changed, changed_plain, results = apply_block(item, block, source, str(item))
        layers.update(changed)
        plain.update(changed_plain)
        if not item.part:  # what a rescaling pass made is what later errors are taken against
            source.update(changed)
        if self.turns is not None:  # only layers change in turn, and the parameters before are still needed
            assert self.stream is not None and not changed_plain
            for layer in changed.values():
                self.stream.put(layer)
        elif self.stream is not None and index != OUTER:
            self.stream.release(index)
            self.stream.load(index, layers, plain)
        return results

    def _name(self, index: int) -> str:
        return "outside the blocks" if index == OUTER else self.model.structure.blocks[index]

    def _pass_for(self, name: str, place: int) -> Pass | None:
        return next((item for index, item in self.resolution.passes[name] if index == place), None)

    def _wants(self, item: Pass) -> frozenset[Stat]:
        """What is collected for a pass: an image classifier is one block, which both streams enter with the same."""
        return item.wants - {Stat.CROSS} if self.model.image is not None else item.wants

    def _collect(self, item: Pass, layers: dict[str, Layer], names: Sequence[str], index: int) -> dict[str, LayerStats]:
        wants = self._wants(item)
        if not wants or self.stream is None:
            return {}
        wants -= {Stat.REFERENCE, Stat.CROSS} if index == OUTER else set()
        guides = self.guides.get(item.row_groups)
        if self.turns is not None:
            found = self.turns.collect(tuple(names), wants, guides)
        elif index != OUTER:
            # against a reference that has not seen the errors made inside the block, a correction does harm
            wants -= {Stat.CROSS} if item.in_turn else set()
            found = self.stream.collect(index, names, wants, guides)
        elif self.stream.hidden:
            found = self.stream.collect_head(names, wants)
        else:  # before the blocks nothing has run: an embedding's input is token ids
            return {}
        if Stat.SHARING in wants:
            _share(found, layers)
        return found


def _share(found: dict[str, LayerStats], layers: dict[str, Layer]) -> None:
    """Fill in which layers are fed the same tensor, and their common peak."""
    for stats in found.values():
        if stats.sharing:
            peak = max(float(layers[name].float_weight().abs().max()) for name in stats.sharing)
            stats.peak = peak
