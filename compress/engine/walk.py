"""The walk of a streamed stage (design §3): per block and per pass collect, apply, drop; then run the block again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from torch import Tensor

from compress import memory
from compress.engine import backward, segment_files, store, survey
from compress.engine.image_stream import Stream, open_stream, wiring_batch
from compress.engine.journal import Steps
from compress.engine.layer_stats import Stat
from compress.engine.layerpass import Pass
from compress.engine.matching import Resolution
from compress.engine.originals import Sources
from compress.engine.segment import Found, SegmentPasses, as_data, from_data, wanted
from compress.engine.stream import BlockStream
from compress.inputs.datasets import Calibration
from compress.layer import Layer, LayerKind
from compress.maths import products
from compress.models.model import Model
from compress.models.skeleton import OUTER
from compress.progress import Progress


class Walk:
    """One walk over the segments: outer layers that need no data, blocks, then the outer rest.

    passes: by their place in the pipeline; journal: finished steps of this walk.
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
        wants = frozenset[Stat]().union(*(wanted(item, model) for item in passes.values()))
        self.reference = bool(wants & {Stat.REFERENCE, Stat.CROSS})
        self.calibration = calibration
        self.device = device
        self.stream: Stream | None = None
        if calibration is not None and wants:
            batches = calibration.batches()
            self.stream = open_stream(
                model, batches, device=device, spill=folder, reference=self.reference, dtype=calibration.dtype
            )
        elif wants:  # only how layers are wired is asked for, which any few tokens show
            self.stream = open_stream(model, [wiring_batch(model)], device=device)
        self.segments = SegmentPasses(passes, model, resolution, self.stream, sources)
        self.results: list[Found] = []

    def run(self, progress: Progress) -> list[Found]:
        """All segments in order; what the journal names is read back instead of computed."""
        self._allot(progress)
        early, late = self._split_outer()
        changed, changed_plain, found = self._before(early, progress)
        count, kept = len(self.model.structure.blocks), self._kept()
        for index in range(count):
            # what an earlier try finished is only run, which says nothing of the time that the others take
            stage = "Running blocks that were done before" if index < kept else "Compressing blocks"
            progress.tick(stage, index, kept if index < kept else count)
            self._block(index)
            self.model.release()
            progress.tick(stage, index + 1, kept if index < kept else count)
        progress.begin("Compressing what is outside of the blocks" if late else "Writing what is outside of the blocks")
        outer, plain = self.model.layers(OUTER) | changed, self.model.plain(OUTER) | changed_plain
        if self.stream is not None:
            self.stream.outer = outer
        found += self.segments.apply(outer, late, plain)
        segment_files.write_segment(self.folder, OUTER, outer, plain)
        return found + self.results

    def _allot(self, progress: Progress) -> None:
        """Where a pass asks for figures of the whole model: these, of an earlier try if it got so far."""
        if not any(item.allots for item in self.passes.values()):
            return
        known = None if self.journal is None else self.journal.get(survey.STEP)
        if known is None:
            with products.fast():
                known = survey.gauged(
                    self.passes, self.model, self.resolution, self.calibration, self.folder, self.device, progress
                )
            memory.give_back()
            if self.journal is not None:
                self.journal.add(survey.STEP, known)
        self.resolution = self.segments.resolution = survey.allotted(self.passes, self.resolution, known)

    def _before(self, early: list[str], progress: Progress) -> tuple[dict[str, Layer], dict[str, Tensor], list[Found]]:
        """All that comes before the blocks. Returns what passes changed outside of them, and the results: the rest, an
        embedding's table mostly, is read again at the end and takes no memory meanwhile."""
        outer, plain = self.model.layers(OUTER), self.model.plain(OUTER)
        before, plain_before = dict(outer), dict(plain)
        if early or self.stream is not None:
            progress.begin("Preparing what comes before the blocks")
        found = self.segments.apply(outer, early, plain)
        if self.stream is not None:
            self._go_back(progress)
            self.stream.start(outer)
            self.stream.outer = {}
        self.model.release()
        changed = {name: layer for name, layer in outer.items() if layer is not before[name]}
        return changed, {name: tensor for name, tensor in plain.items() if tensor is not plain_before[name]}, found

    def _go_back(self, progress: Progress) -> None:
        """The backward pass that guided Hessians ask for, again in a resumed run, whose blocks it decides alike."""
        steps = [segment_files.segment_file(index) for index in range(len(self.model.structure.blocks))]
        if self.journal is not None and all(step in self.journal for step in steps):
            return
        for groups in sorted({item.row_groups for item in self.passes.values()} - {0}):
            resolved = self.resolution.passes.items()
            names = [name for name, found in resolved if any(item.row_groups == groups for _, item in found)]
            assert isinstance(self.stream, BlockStream)
            with products.fast():
                self.segments.guides[groups] = backward.saliency(
                    self.model,
                    self.stream.batches,
                    names,
                    groups,
                    device=str(self.stream.device),
                    spill=self.folder,
                    progress=progress,
                )
            memory.give_back()

    def _kept(self) -> int:
        """Blocks, from the first on, that an earlier try finished."""
        steps = map(segment_files.segment_file, range(len(self.model.structure.blocks)))
        return sum(1 for _ in takewhile(lambda step: self.journal is not None and step in self.journal, steps))

    def _split_outer(self) -> tuple[list[str], list[str]]:
        """Layers before the blocks (embeddings, with what is tied to them) and after (the rest)."""
        specs = self.model.structure.segment_layers(OUTER)
        early = [spec.name for spec in specs if spec.kind is LayerKind.EMBEDDING]
        return early, [spec.name for spec in specs if spec.name not in early]

    def _block(self, index: int) -> None:
        step = segment_files.segment_file(index)
        if self.journal is not None and step in self.journal:
            self._replay(index, self.journal.get(step))
            return
        layers, plain = self.model.layers(index), self.model.plain(index)
        ahead_in_turn = self.segments.ahead_in_turn(layers)
        self._load(index, layers, plain, ahead=not ahead_in_turn)
        found = self.segments.apply(layers, list(layers), plain, index)
        self._store_floats_as_planned(layers)
        if ahead_in_turn and self.segments.turns is not None:
            with products.fast():
                self.segments.turns.look_ahead()
        segment_files.write_segment(self.folder, index, layers, plain)
        if self.journal is not None:
            self.journal.add(step, as_data(found))
        self.results += found
        self._advance(index)

    def _store_floats_as_planned(self, layers: dict[str, Layer]) -> None:
        """Weights that a pass rescaled in float32 and none quantized go back to the type they came in, as planned."""
        for name, layer in layers.items():
            planned = self.model.structure.layers[name].source_dtype
            if isinstance(layer.weight, Tensor) and layer.weight.dtype != planned:
                layers[name] = replace(layer, weight=layer.weight.to(planned))
                if self.stream is not None:
                    self.stream.put(layers[name])

    def _load(self, index: int, layers: dict[str, Layer], plain: dict[str, Tensor], ahead: bool = True) -> None:
        if self.stream is None:
            return
        self.stream.load(index, layers, plain)
        if ahead:
            with products.fast():
                self.stream.look_ahead(index)

    def _replay(self, index: int, data: list[Any]) -> None:
        """A block that an earlier try finished: its results from the journal, its outputs by running it."""
        self.results += from_data(data)
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
        turns, self.segments.turns = self.segments.turns, None
        with products.fast():
            if turns is None:
                self.stream.advance(index)
            else:  # nothing has changed since: what it kept is still right
                assert isinstance(self.stream, BlockStream)
                self.stream.advance(index, turns.outputs())
        self.stream.release(index)
