"""Passes over one segment (design §3): each sees its layers as the passes before have left them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from compress import memory
from compress.engine.applying import apply_block, apply_layer
from compress.engine.backward import Saliency
from compress.engine.blockpass import Block, BlockPass
from compress.engine.image_stream import Stream
from compress.engine.layer_stats import LayerStats, Stat
from compress.engine.layerpass import LayerPass, Pass
from compress.engine.matching import Resolution
from compress.engine.originals import Sources
from compress.engine.stream import BlockStream
from compress.engine.turns import Turns
from compress.engine.zeros import pruner, with_mask
from compress.layer import Layer, LayerKind
from compress.maths import products
from compress.models.model import Model
from compress.models.skeleton import OUTER
from compress.records import LayerResult

Found = tuple[int, LayerResult]
"""A layer's result with the place of its pass in the pipeline."""


def as_data(found: Iterable[Found]) -> list[Any]:
    """Results as a journal keeps them."""
    return [[place, result.model_dump(mode="json")] for place, result in found]


def from_data(data: Iterable[Any]) -> list[Found]:
    """What `as_data` made results of."""
    return [(place, LayerResult.model_validate(item)) for place, item in data]


@dataclass(frozen=True)
class _Segment:
    """The segment in hand; its layers and other tensors are updated. source: each layer before any pass lost
    something of it."""

    index: int
    layers: dict[str, Layer]
    plain: dict[str, Tensor]
    source: dict[str, Layer]


class SegmentPasses:
    """The passes of a stage, as they are applied to one segment after the other.

    passes: by their place in the pipeline; stream: None where no pass asks for data; guides: by number of row groups,
    what guided Hessians weigh by; turns: of the pass that was applied last, if it takes its layers in turn.
    """

    def __init__(
        self,
        passes: Mapping[int, Pass],
        model: Model,
        resolution: Resolution,
        stream: Stream | None,
        sources: Sources,
    ) -> None:
        self.passes = passes
        self.model = model
        self.resolution = resolution
        self.stream = stream
        self.sources = sources
        self.guides: dict[int, Saliency] = {}
        self.turns: Turns | None = None

    def apply(
        self, layers: dict[str, Layer], names: Sequence[str], plain: dict[str, Tensor], index: int = OUTER
    ) -> list[Found]:
        """Apply every pass, in order, to some layers of a segment; `layers` and `plain` are updated."""
        found: list[Found] = []
        if not any(self._pass_for(name, place) for name in names for place in self.passes):
            return found
        segment = _Segment(index, layers, plain, {name: self.sources.of(layers[name]) for name in names})
        for place, item in self.passes.items():
            chosen = {name: found_pass for name in names if (found_pass := self._pass_for(name, place)) is not None}
            pruned = [name for name in chosen if pruner(self._before(name, place))]
            layers.update({name: with_mask(layers[name]) for name in pruned})
            if chosen:
                found += [(place, result) for result in self._apply(item, chosen, segment)]
            layers.update({name: replace(layers[name], mask=None) for name in pruned})
        self.sources.keep(index, {name: segment.source[name] for name in names})
        return found

    def _apply(self, item: Pass, chosen: dict[str, Pass], segment: _Segment) -> list[LayerResult]:
        """One pass: to all chosen layers at once, or to one group after the other where it takes them in turn."""
        results: list[LayerResult] = []
        self.turns = self._turns(item, list(chosen), segment.index)
        survey, ahead = self._survey(item, segment, chosen), dict(chosen)
        for group in [tuple(chosen)] if self.turns is None else self.turns.groups:
            part = {name: ahead.pop(name) for name in group}
            with products.fast():
                stats = {**survey, **self._collect(item, segment, group)}
            memory.give_back()
            if isinstance(item, BlockPass):
                results += self._apply_block(item, part, segment, stats, ahead)
            else:
                results += self._apply_layers(part, segment, stats, str(item))
            if self.turns is not None:
                with products.fast():
                    self.turns.settle(group)
            survey = {name: stats for name, stats in survey.items() if name in ahead}
            memory.give_back()
        return results

    def _survey(self, item: Pass, segment: _Segment, names: Iterable[str]) -> dict[str, LayerStats]:
        """Second moments of the inputs of all layers, before the first turn, for a pass that asks for them."""
        if self.turns is None or self.stream is None or not item.surveys:
            return {}
        with products.fast():
            wants = {Stat.HESSIAN} | (item.wants & {Stat.GUIDED})
            return self.stream.collect(segment.index, names, wants, self.guides.get(item.row_groups))

    def ahead_in_turn(self, layers: Mapping[str, Layer]) -> bool:
        """Whether turns will carry the reference stream over a block: where one pass alone changes it, taking all that
        it changes in turn, and none needs to know before what the block puts out."""
        passes = {place for name in layers for place, _ in self.resolution.passes[name] if place in self.passes}
        chosen = [layer for name, layer in layers.items() if self.resolution.passes[name]]
        if len(passes) != 1 or not isinstance(self.stream, BlockStream):
            return False
        item = self.passes[passes.pop()]
        in_turn = item.in_turn and all(layer.kind is not LayerKind.EXPERT for layer in chosen)
        return in_turn and Stat.CROSS in item.wants and Stat.REFERENCE not in item.wants

    def _turns(self, item: Pass, names: list[str], index: int) -> Turns | None:
        """What brings the layers before a pass one group after the other, if it asks for that and the model allows."""
        if not item.in_turn or index == OUTER or not isinstance(self.stream, BlockStream):
            return None
        specs = [self.model.structure.layers[name] for name in names]
        return Turns(self.stream, index, specs, cross=Stat.CROSS in item.wants)

    def _apply_layers(
        self, chosen: dict[str, Pass], segment: _Segment, stats: dict[str, LayerStats], text: str
    ) -> list[LayerResult]:
        layers, source, results = segment.layers, segment.source, []
        for name, one in chosen.items():
            assert isinstance(one, LayerPass)
            layers[name], result = apply_layer(one, layers[name], source[name], stats.get(name, LayerStats()), text)
            results.append(result)
            if not one.part:  # what a rescaling pass made is what later errors are taken against
                source[name] = layers[name]
            if self.stream is not None and segment.index != OUTER:
                self.stream.put(layers[name])
        return results

    def _apply_block(
        self,
        item: BlockPass,
        chosen: dict[str, Pass],
        segment: _Segment,
        stats: dict[str, LayerStats],
        ahead: dict[str, Pass],
    ) -> list[LayerResult]:
        index, layers, plain, source = segment.index, segment.layers, segment.plain, segment.source
        runner = self.stream.runner(index) if self.stream is not None and index != OUTER else None
        name = "outside the blocks" if index == OUTER else self.model.structure.blocks[index]
        block = Block(name, dict(layers), source, chosen, dict(plain), stats, runner, dict(ahead))
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

    def _pass_for(self, name: str, place: int) -> Pass | None:
        return next((item for index, item in self.resolution.passes[name] if index == place), None)

    def _before(self, name: str, place: int) -> Iterable[Pass]:
        """The passes that treat a layer before the one at some place, those of earlier stages too."""
        return (item for index, item in self.resolution.passes[name] if index < place)

    def _collect(self, item: Pass, segment: _Segment, names: tuple[str, ...]) -> dict[str, LayerStats]:
        wants, index = wanted(item, self.model), segment.index
        if not wants or self.stream is None:
            return {}
        wants -= {Stat.REFERENCE, Stat.CROSS} if index == OUTER else set()
        guides = self.guides.get(item.row_groups)
        if self.turns is not None:
            found = self.turns.collect(names, wants, guides)
        elif index != OUTER:
            # against a reference that has not seen the errors made inside the block, a correction does harm
            wants -= {Stat.CROSS} if item.in_turn else set()
            found = self.stream.collect(index, names, wants, guides)
        elif self.stream.hidden:
            found = self.stream.collect_head(names, wants)
        else:  # before the blocks nothing has run: an embedding's input is token ids
            return {}
        if Stat.SHARING in wants:
            _share(found, segment.layers)
        return found


def wanted(item: Pass, model: Model) -> frozenset[Stat]:
    """What is collected for a pass: an image classifier is one block, which both streams enter with the same."""
    return item.wants - {Stat.CROSS} if model.image is not None else item.wants


def _share(found: dict[str, LayerStats], layers: dict[str, Layer]) -> None:
    """Fill in which layers are fed the same tensor, and their common peak."""
    for stats in found.values():
        if stats.sharing:
            peak = max(float(layers[name].float_weight().abs().max()) for name in stats.sharing)
            stats.peak = peak
