"""A walk before the walk: figures of all layers, for passes that share out among them what they do.

Memory is a block and the activations, as in the walk itself. What is found is small, and kept in the journal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from compress.engine.image_stream import open_stream
from compress.engine.layer_stats import LayerStats, Stat
from compress.engine.layerpass import Pass
from compress.engine.matching import Resolution
from compress.inputs.datasets import Calibration
from compress.layer import LayerKind, LayerSpec
from compress.models.model import Model
from compress.models.skeleton import OUTER
from compress.progress import Progress

STEP = "survey"
Gauged = dict[str, dict[str, float]]
"""Place of the pass in the pipeline, as text, → layer → figure."""


def gauged(
    passes: Mapping[int, Pass],
    model: Model,
    resolution: Resolution,
    calibration: Calibration | None,
    folder: Path,
    device: str,
    progress: Progress,
) -> Gauged:
    """The figures (`Pass.gauge`) that passes of a stage ask for, of the model as the stage received it.

    Args: passes: of the stage, by their place; resolution: of the whole recipe; folder: for activations above the
    limit.
    """
    chosen = {place: _chosen(place, resolution) for place, item in passes.items() if item.allots}
    found: Gauged = {str(place): {} for place in chosen}
    if calibration is None:
        raise AssertionError("a pass that allots takes real inputs")
    stream = open_stream(model, calibration.batches(), device=device, spill=folder, dtype=calibration.dtype)
    stream.start(model.layers(OUTER))
    count = len(model.structure.blocks)

    def note(segment: int, stats: Mapping[str, LayerStats]) -> None:
        layers = model.layers(segment)
        for place, own in chosen.items():
            here = {name: one for name, (one, _) in own.items() if name in layers}
            if here:
                found[str(place)] |= passes[place].gauge(layers, here, stats)

    for index in range(count):
        progress.tick("Surveying blocks", index, count)
        names = [name for own in chosen.values() for name, (_, spec) in own.items() if spec.segment == index]
        stream.load(index, model.layers(index), model.plain(index))
        note(index, stream.collect(index, dict.fromkeys(names), {Stat.MEAN_SQUARE}))
        stream.advance(index)
        stream.release(index)
        progress.tick("Surveying blocks", index + 1, count)
    outer = [(name, spec) for own in chosen.values() for name, (_, spec) in own.items() if spec.segment == OUTER]
    reached = [name for name, spec in outer if spec.kind is not LayerKind.EMBEDDING]
    if outer:
        stream.outer = model.layers(OUTER)
        note(OUTER, stream.collect_head(dict.fromkeys(reached), {Stat.MEAN_SQUARE}) if reached else {})
    model.release()
    return found


def allotted(passes: Mapping[int, Pass], resolution: Resolution, found: Gauged) -> Resolution:
    """The passes over the model with what figures of the whole of it settle (`Pass.allot`)."""
    settled = dict(resolution.passes)
    for place, item in passes.items():
        if not item.allots:
            continue
        for name, one in item.allot(_chosen(place, resolution), found[str(place)]).items():
            settled[name] = tuple((at, one if at == place else other) for at, other in settled[name])
    return replace(resolution, passes=settled)


def _chosen(place: int, resolution: Resolution) -> dict[str, tuple[Pass, LayerSpec]]:
    """The layers that the pass at some place is for, in the model's order, each with its settings."""
    specs = resolution.structure.layers
    return {name: (one, specs[name]) for name, found in resolution.passes.items() for at, one in found if at == place}
