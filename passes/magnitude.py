"""Magnitude pruning: the smallest weights become zero."""

from __future__ import annotations

from typing import ClassVar

from compress.engine.allocating import Allocating
from compress.engine.layer_stats import LayerStats
from compress.engine.layerpass import LayerPass
from compress.layer import Layer


class Magnitude(Allocating, LayerPass):
    """Set the weights of smallest magnitude to zero (Han et al. 2015, arXiv 1506.02626). Needs no data.

    Settings: `sparsity` the share that becomes zero; `pattern` among which weights: `layer` (all of the weight), `row`
    (of each output row), `N:M` such as 2:4 (N kept of every M input columns), `RxC` such as 16x16 (whole blocks, by the
    sum of squares).
    """

    name: ClassVar[str] = "magnitude"
    keeps_zeros: ClassVar[bool] = True

    def layer(self, layer: Layer, stats: LayerStats) -> Layer:
        weight = layer.float_weight()
        return self.pruned(layer, weight.where(self.keep(layer, weight.abs()), 0.0))
