"""Grids for what convolutions put out, which integer kernels round: fitted last, to the outputs of the finished model.

Any pass moves them, also one that comes after the inputs' grids: a corrected bias, learned weights, a tuned model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compress.engine import segment_files, store
from compress.engine.image_stream import Stream, open_stream
from compress.engine.layer_stats import Stat
from compress.engine.layerpass import Pass
from compress.engine.matching import Resolution
from compress.inputs.datasets import Calibration
from compress.layer import Layer, LayerKind
from compress.maths import products
from compress.models.skeleton import OUTER


def fit(resolution: Resolution, calibration: Calibration | None, folder: Path, device: str) -> None:
    """Fit the output grids that passes ask for (`Pass.fits_outputs`) and write those segments of a store again.

    Nothing is done where none asks. It depends on the finished layers alone, so a run that was stopped in between does
    it again to the same bytes.
    """
    asking = {
        name: item
        for name, found in resolution.passes.items()
        for _, item in found
        if item.fits_outputs and resolution.structure.layers[name].kind is LayerKind.CONV
    }
    if not asking or calibration is None:
        return
    model = store.open_store(folder, hashed=False)
    stream = open_stream(model, calibration.batches(), device=device, spill=folder)
    stream.start(model.layers(OUTER))
    last = len(model.structure.blocks) - 1
    for index in range(last + 1):
        layers, plain = model.layers(index), model.plain(index)
        stream.load(index, layers, plain)
        with products.fast():
            changed = _fitted(stream, index, layers, asking)
            if index < last:
                stream.advance(index)
        stream.release(index)
        if changed:
            segment_files.write_segment(folder, index, layers | changed, plain)


def _fitted(stream: Stream, index: int, layers: Mapping[str, Layer], asking: Mapping[str, Pass]) -> dict[str, Layer]:
    """Those layers of the loaded block that get a grid for their outputs; one that does not run has none."""
    names = [name for name in layers if name in asking]
    stats = stream.collect(index, names, {Stat.OUTPUTS}) if names else {}
    outputs = {name: stats[name].outputs for name in names if name in stats}
    return {
        name: asking[name].with_outputs(layers[name], found) for name, found in outputs.items() if found is not None
    }
