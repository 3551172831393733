"""Wanda: weights that are small, or whose inputs are, become zero."""

from __future__ import annotations

from typing import ClassVar

from compress.engine.allocating import Allocating
from compress.engine.layer_stats import LayerStats, Stat
from compress.engine.layerpass import LayerPass
from compress.engine.prune_pass import REACHED, input_norms
from compress.layer import Layer, LayerKind


class Wanda(Allocating, LayerPass):
    """Wanda (Sun et al. 2023, arXiv 2306.11695, eq. 1): a weight scores |w_ij| · ‖x_j‖, compared within its output row;
    what is left stays as it is.

    Settings: `sparsity` the share that becomes zero; `pattern` among which weights: `row`, `layer`, `N:M` such as 2:4
    (N kept of every M input columns), `RxC` such as 16x16 (whole blocks, by the sum of squares).
    """

    name: ClassVar[str] = "wanda"
    keeps_zeros: ClassVar[bool] = True
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.HESSIAN})
    kinds: ClassVar[frozenset[LayerKind]] = REACHED

    pattern: str = "row"

    def layer(self, layer: Layer, stats: LayerStats) -> Layer:
        weight = layer.float_weight()
        norms, notes = input_norms(layer, stats)
        return self.pruned(layer, weight.where(self.keep(layer, weight.abs() * norms), 0.0), notes)
