"""RIA: relative importance of a weight in its row and column, times a power of its input."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from compress.engine.allocating import Allocating
from compress.engine.layer_stats import LayerStats, Stat
from compress.engine.layerpass import LayerPass
from compress.engine.prune_pass import REACHED, input_norms
from compress.layer import Layer, LayerKind
from compress.maths.masks import relative_importance


class Ria(Allocating, LayerPass):
    """Relative importance and activations (Zhang et al. 2024, "Plug-and-Play: an efficient post-training pruning method
    for large language models", ICLR): a weight scores (|w_ij| / Σ_i |w_ij| + |w_ij| / Σ_j |w_ij|) · ‖x_j‖^a.
    The paper's permutation of input channels for N:M is left out: no runtime undoes it for free.

    Settings: `sparsity` the share that becomes zero; `pattern` among which weights: `layer`, `row`, `N:M` such as 2:4
    (N kept of every M input columns), `RxC` such as 16x16 (whole blocks); `power` the exponent a.
    """

    name: ClassVar[str] = "ria"
    keeps_zeros: ClassVar[bool] = True
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.HESSIAN})
    kinds: ClassVar[frozenset[LayerKind]] = REACHED

    power: float = Field(default=0.5, ge=0, le=2)

    def layer(self, layer: Layer, stats: LayerStats) -> Layer:
        weight = layer.float_weight()
        norms, notes = input_norms(layer, stats)
        scores = relative_importance(weight) * norms.pow(self.power)
        return self.pruned(layer, weight.where(self.keep(layer, scores), 0.0), notes)
