"""AWQ: scale up the input channels that matter before rounding, so that they round finely."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.engine.blockpass import Block, BlockPass, Changed
from compress.engine.layer_stats import LayerStats, Stat
from compress.engine.part import Part
from compress.engine.quantizing import Quantizing
from compress.formats.base import Format, Params
from compress.layer import Layer, LayerKind, LayerSpec
from compress.maths.hessian import weighted_error
from compress.wiring.foldable import wire
from compress.wiring.folding import NOT_A_NORM, Bench, Folding, agreed

SMALLEST = 1e-4
"""Added to mean weights, and the least scale before it is normalised (the paper's code)."""


class _Scaling(Quantizing, BlockPass, ABC):
    """Settings of the search for scales: `grid` how many α are tried; `duo` off leaves w̄ out, s = x̄^α; `folds`: `all`,
    or `norms` for no pairs of layers (values → output, up → down)."""

    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.HESSIAN, Stat.ABS_MEAN})
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({LayerKind.LINEAR, LayerKind.EXPERT})

    grid: int = Field(default=20, ge=1, le=1000)
    duo: bool = True
    folds: str = Field(default="all", pattern="^(norms|all)$")

    def _scaled(self, block: Block) -> tuple[Bench, dict[str, str]]:
        """The block with the best scales folded in, in the order in which it runs; layer → why it is not scaled."""
        wiring = wire(block, pairs=any(getattr(item, "folds", "") == "all" for item in block.chosen.values()))
        bench, reasons = Bench(block), dict(wiring.refused)
        for folding in wiring.foldings:
            settings = agreed(block, folding, ("grid", "duo", "folds"))
            names = [name for name in folding.consumers if name in block.chosen and name in bench.stats]
            if not isinstance(settings, _Scaling) or not names:
                reasons |= dict.fromkeys(folding.consumers, "no calibration token reached it")
                continue
            if settings.folds == "norms" and folding.offset is None:
                reasons |= dict.fromkeys(folding.consumers, NOT_A_NORM)
                continue
            scale = settings._search(bench, folding, names)
            if scale is None:
                reasons |= dict.fromkeys(folding.consumers, "no scale that was tried lowers the error")
            else:
                bench.fold(folding, scale)
        return bench, reasons

    def _search(self, bench: Bench, folding: Folding, names: Sequence[str]) -> Tensor | None:
        """The scale (channels,) of least error of the layers' outputs; None where none is better than no scale."""
        inputs, weights = importances(bench, folding, names)
        best = _loss(bench, names, torch.ones(len(folding.rows)))
        found = None
        for step in range(self.grid):
            scale = folding.only_used(balance(inputs, weights, step / self.grid, self.duo))
            loss = _loss(bench, names, folding.spread(scale))
            if loss < best:
                best, found = loss, scale
        return found


class Awq(_Scaling):
    """AWQ (Lin et al. 2023, arXiv 2306.00978, eq. 4–5): the inputs of layers that one norm or layer feeds are divided
    by s_j = x̄_j^α / w̄_j^(1−α), folded into what feeds them; their weights' columns are multiplied by s and rounded to
    nearest. x̄ is the mean |input|, w̄ the mean |weight| as a share of its group's largest; of α = 0 … 1 the one is kept
    whose rounding changes the layers' outputs least, or no scale where none helps. The error is tr(D H Dᵀ) summed over
    the layers, with H the second moment of their input: exactly that of running them on every token, at less cost. The
    paper's code takes the output of the module around them (attention, MLP) instead, which weighs the layers otherwise
    and mostly agrees. Routers and layers left out are rescaled along; which scale folds into what is checked by running
    the block, and a layer that cannot be scaled is rounded as it is, with a note.

    Settings: `clip` searches each group's range, errors weighted by the mean square of their input.
    """

    name: ClassVar[str] = "awq"
    part: ClassVar[Part] = Part.WEIGHT
    rescales: ClassVar[bool] = True
    before: ClassVar[frozenset[Part]] = frozenset({Part.ACT})

    clip: bool = True

    def block(self, block: Block) -> Changed:
        bench, reasons = self._scaled(block)
        layers = dict(bench.changed)
        for name, item in block.chosen.items():
            assert isinstance(item, Awq)
            rounded = item._rounded(bench, name)
            note = () if name not in reasons else (f"rounded without a scale of its own: {reasons[name]}",)
            layers[name] = replace(rounded, notes=(*rounded.notes, *note))
        return Changed(layers, bench.changed_plain, rescaled=bench.changed, stats=bench.stats)

    def _rounded(self, bench: Bench, name: str) -> Layer:
        layer, form = bench.layer(name), self.resolved_format()
        hessian = bench.stats.get(name, LayerStats()).hessian
        weight = layer.float_weight()
        importance = None if hessian is None else hessian.diagonal()
        params = form.fit(weight, search=self.clip, importance=importance, peak=_peak(bench, name, form))
        codes, _ = form.quantize(weight, params, torch.arange(weight.shape[1]))
        return layer.with_weight(form.pack(codes, params, layer.shape))


class AwqScale(_Scaling):
    """The scaling of `awq` alone: weights stay as they are in float, for another pass that rounds them to the same
    format: `awq_scale(format=int4(group=32)), gptq(format=int4(group=32))`.

    `format` is the grid that the scales are searched for; nothing checks that the pass which rounds has the same.
    """

    name: ClassVar[str] = "awq_scale"
    part: ClassVar[Part] = Part.NONE
    rescales: ClassVar[bool] = True
    before: ClassVar[frozenset[Part]] = frozenset({Part.WEIGHT, Part.ACT})

    def block(self, block: Block) -> Changed:
        bench, reasons = self._scaled(block)
        layers, skipped = bench.outcome(reasons)
        return Changed(layers, bench.changed_plain, skipped, stats=bench.stats)

    def plan(self, spec: LayerSpec) -> LayerSpec:
        return spec


def balance(inputs: Tensor, weights: Tensor, alpha: float, duo: bool = True) -> Tensor:
    """s = x̄^α / (w̄^(1−α) + 1e-4), at least 1e-4, over √(max · min); without `duo` s = x̄^α.

    Args: inputs x̄, weights w̄ (channels,) ≥ 0. A channel that is never on stays as it is.
    """
    scale = inputs.pow(alpha)
    if duo:
        scale = scale / (weights.pow(1 - alpha) + SMALLEST)
    scale = scale.clamp(min=SMALLEST)
    live = inputs > 0
    if not bool(live.any()):
        return torch.ones_like(scale)
    middle = (scale[live].amax() * scale[live].amin()).sqrt()
    return torch.where(live, scale / middle, 1.0)


def importances(bench: Bench, folding: Folding, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """x̄ and w̄ (channels,) over some consumers: a token counts once for each tensor that it is in, a row once."""
    different = {id(stats): stats for stats in (bench.stats[name] for name in names)}.values()
    tokens = sum(stats.tokens for stats in different)
    inputs = torch.zeros(len(folding.rows))
    for stats in different:
        assert stats.abs_mean is not None
        inputs += stats.abs_mean * (stats.tokens / tokens)
    shares = [relative(bench.layer(name).float_weight(), _format(bench, name)) for name in names]
    return folding.gather(inputs, "mean"), folding.gather(torch.cat(shares).mean(0), "mean")


def relative(weight: Tensor, form: Format) -> Tensor:
    """|w| (out, in) over the largest of its group; of its row where the format has no groups of input columns."""
    rows, columns = weight.shape
    group = getattr(form, "group", columns)
    size = min(group, columns) if isinstance(group, int) else columns
    padded = torch.nn.functional.pad(weight.abs(), (0, -columns % size)).reshape(rows, -1, size)
    return (padded / (padded.amax(-1, keepdim=True) + 1e-6)).reshape(rows, -1)[:, :columns]


def _loss(bench: Bench, names: Sequence[str], columns: Tensor) -> float:
    """Σ tr(D H Dᵀ) over the layers, in units of their unscaled inputs, each weighted by its tokens."""
    total = 0.0
    for name in names:
        stats, form = bench.stats[name], _format(bench, name)
        assert stats.hessian is not None
        weight = bench.layer(name).float_weight()
        params = form.fit(weight * columns, peak=_peak(bench, name, form, columns))
        error = _round(weight * columns, form, params) / columns - weight
        total += stats.tokens * weighted_error(error, stats.hessian)
    return total


def _round(weight: Tensor, form: Format, params: Params) -> Tensor:
    return form.quantize(weight, params, torch.arange(weight.shape[1]))[1]


def _format(bench: Bench, name: str) -> Format:
    item = bench.block.chosen[name]
    assert isinstance(item, _Scaling)
    return item.resolved_format()


def _peak(bench: Bench, name: str, form: Format, columns: Tensor | float = 1.0) -> float | None:
    """Largest |w| over the layers that are fed the same tensor, for formats that share a scale among them."""
    if not form.shares_peak or name not in bench.stats:
        return None
    names = bench.stats[name].sharing or (name,)
    return max(float((bench.layer(other).float_weight() * columns).abs().max()) for other in names)
