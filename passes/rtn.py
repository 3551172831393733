"""RTN: round every weight to the nearest point of its group's grid."""

from __future__ import annotations

from typing import ClassVar

import torch

from compress.engine.layer_stats import LayerStats
from compress.engine.quantizing import QuantPass
from compress.layer import Layer


class Rtn(QuantPass):
    """Round to nearest. Needs no data.

    Settings: `format` the grid; `clip` also searches, per group, the range of least error (off: the extremes).
    """

    name: ClassVar[str] = "rtn"
    keeps_zeros: ClassVar[bool] = True

    clip: bool = False

    def layer(self, layer: Layer, stats: LayerStats) -> Layer:
        form = self.resolved_format()
        weight = layer.float_weight()
        params = form.fit(weight, search=self.clip, peak=stats.peak)
        codes, _ = form.quantize(weight, params, torch.arange(weight.shape[1]))
        return layer.with_weight(form.pack(codes, params, layer.shape))
