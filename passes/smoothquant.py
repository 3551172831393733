"""SmoothQuant: move the range of activations into the weights that read them, so that both round well."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.engine.blockpass import Block, BlockPass, Changed
from compress.engine.layer_stats import Stat
from compress.engine.part import Part
from compress.layer import LayerKind, LayerSpec
from compress.wiring.foldable import wire
from compress.wiring.folding import NOT_A_NORM, Bench, Folding, agreed

SMALLEST = 1e-5
"""Ranges below it count as it, and a scale stays between it and its inverse: a channel that is nearly off is not blown
up."""


class SmoothQuant(BlockPass):
    """SmoothQuant (Xiao et al. 2023, arXiv 2211.10438, eq. 4): input channel j of the layers that a norm feeds is
    divided by s_j = max|X_j|^α / max|W_j|^(1−α), folded into the norm, and their weights' columns are multiplied by it.
    W runs over the chosen layers; routers and layers left out are rescaled along. It changes no output: which scale may
    move where is checked by running the block, and where it does not hold the layers are skipped, with the reason.
    Quantize afterwards: `smoothquant, rtn(format=int8(channel)), act_quant`.

    Settings: `alpha` how much of the difficulty moves into the weights; `folds`: `norms`, or `all` for pairs of layers
    too (values → output, up → down), which share a scale within each group of query heads.
    """

    name: ClassVar[str] = "smoothquant"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.ABS_MAX})
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({LayerKind.LINEAR, LayerKind.EXPERT})
    part: ClassVar[Part] = Part.NONE
    rescales: ClassVar[bool] = True
    before: ClassVar[frozenset[Part]] = frozenset({Part.WEIGHT, Part.ACT})

    alpha: float = Field(default=0.5, ge=0, le=1)
    folds: str = Field(default="norms", pattern="^(norms|all)$")

    def block(self, block: Block) -> Changed:
        wiring = wire(block, pairs=any(getattr(item, "folds", "") == "all" for item in block.chosen.values()))
        bench, reasons = Bench(block), dict(wiring.refused)
        for folding in wiring.foldings:
            settings = agreed(block, folding, ("alpha", "folds"))
            if isinstance(settings, SmoothQuant) and settings.folds == "norms" and folding.offset is None:
                reasons |= dict.fromkeys(folding.consumers, NOT_A_NORM)
                continue
            scale = settings._scale(bench, folding) if isinstance(settings, SmoothQuant) else None
            if scale is not None:
                bench.fold(folding, scale)
            else:
                reasons |= dict.fromkeys(folding.consumers, "no calibration token reached it")
        layers, skipped = bench.outcome(reasons)
        return Changed(layers, bench.changed_plain, skipped)

    def plan(self, spec: LayerSpec) -> LayerSpec:
        return spec

    def _scale(self, bench: Bench, folding: Folding) -> Tensor | None:
        """(channels,) from the chosen consumers that have statistics; None without any."""
        ranges, weights = [], []
        for name in folding.consumers:
            stats = bench.stats.get(name)
            if name in bench.block.chosen and stats is not None and stats.abs_max is not None:
                ranges.append(stats.abs_max)
                weights.append(bench.layer(name).float_weight().abs().amax(0))
        if not ranges:
            return None
        inputs, columns = torch.stack(ranges).amax(0), torch.stack(weights).amax(0)
        return smoothing(folding.gather(inputs, "amax"), folding.gather(columns, "amax"), self.alpha)


def smoothing(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s = inputs^α / weights^(1−α), elementwise, for largest magnitudes ≥ 0 per channel; 1 where one of them is 0."""
    scale = inputs.clamp(min=SMALLEST).pow(alpha) / weights.clamp(min=SMALLEST).pow(1 - alpha)
    return torch.where((inputs > 0) & (weights > 0), scale.clamp(SMALLEST, 1 / SMALLEST), 1.0)
