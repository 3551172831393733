"""HQQ: move each group's zero point until what is left of the rounding error is sparse. Needs no data."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.engine.layer_stats import LayerStats
from compress.engine.quantizing import FormatField, QuantPass
from compress.errors import UsageError
from compress.formats.int_grid import IntGrid
from compress.layer import Layer
from compress.maths import grid


class Hqq(QuantPass):
    """Half-quadratic quantization (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning
    Models"). The scale is that of rounding; only the zero point moves, so the grid needs one that lies between codes:
    rounded to a code again, nothing is left of the gain (tests/test_hqq.py).

    Settings: `format` an integer grid with `float_zero`; `p` of the norm that shall be small (below 1: few large
    errors rather than many small ones); `beta` weight of the quadratic part, in units of the group's scale, times
    `kappa` at each of `iterations`, which end early once no zero point moves. Each group keeps the best it has seen.
    """

    name: ClassVar[str] = "hqq"

    format: FormatField = IntGrid(4, group=64, scheme="float_zero")
    p: float = Field(default=0.7, gt=0, le=1)
    beta: float = Field(default=10.0, gt=0)
    kappa: float = Field(default=1.01, ge=1)
    iterations: int = Field(default=20, ge=1)

    @model_validator(mode="after")
    def _check_scheme(self) -> Self:
        form = self.resolved_format()
        if not isinstance(form, IntGrid) or form.scheme != "float_zero" or form.group in ("token", "head"):
            raise UsageError(
                f"hqq: format={form} has no zero point that it could move. Give an integer grid with float_zero: "
                "int4(group=64, float_zero), int2(group=16, float_zero), int8(channel, float_zero) …"
            )
        return self

    def layer(self, layer: Layer, stats: LayerStats) -> Layer:
        form, weight = self.resolved_format(), layer.float_weight()
        assert isinstance(form, IntGrid)
        params = form.fit(weight)
        groups, counted = _groups(weight, form)
        rows = groups.shape[0]  # one where all rows share a grid
        chunk = max(1, grid.SEARCH_ELEMENTS // groups[0].numel())
        whole = (groups, params["scale"][:rows].float(), params["zero"][:rows])
        parts = [torch.split(each, chunk) for each in whole]
        solved = [
            self.solve_zero(part, counted, scale, zero, form.bits) for part, scale, zero in zip(*parts, strict=True)
        ]
        zero = torch.cat(solved)
        params = {**params, "zero": zero.expand_as(params["zero"])}
        codes, _ = form.quantize(weight, params, torch.arange(weight.shape[1]))
        return replace(layer, weight=form.pack(codes, params, layer.shape))

    def solve_zero(self, groups: Tensor, counted: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
        """The zero point of least Σ |w − ŵ|^p per group among those that the iterations pass, and the rounded one.

        Each iteration alternates the two halves of min |e|_p + β/2 · |w − ŵ(z) − e|²: the sparse part e by the
        generalised soft threshold, then z in closed form. Errors are taken in units of the scale, so that β means the
        same for every layer; zero points are rounded to float16 as they go, so that what is judged is what is stored.
        Args: groups (out, G, group); counted (1, G, group), 0 where a group was filled up; scale, zero (out, G); all
        float32.
        """
        unit, count, beta, top = groups / scale[..., None], counted.sum(-1), self.beta, 2**bits - 1
        best = torch.round(zero).clamp(0, top)
        _, least = rounding_error(unit, counted, best, top, self.p)
        for turn in range(self.iterations + 1):
            error, total = rounding_error(unit, counted, zero, top, self.p)
            better = total < least
            best, least = torch.where(better, zero, best), torch.where(better, total, least)
            if turn == self.iterations:
                break
            moved = zero - (error - shrink(error, beta, self.p)).mul_(counted).sum(-1) / count
            last, zero = zero, moved.half().float()
            if torch.equal(zero, last):
                break
            beta *= self.kappa
        return best


def _groups(weight: Tensor, form: IntGrid) -> tuple[Tensor, Tensor]:
    """Weights (out, G, group), or (1, 1, all) where one grid serves all; 1 but for filling, (1, G, group)."""
    whole = weight.reshape(1, -1) if form.group == "tensor" else weight
    size = whole.shape[1] if form.group == "tensor" else form.group_size(whole.shape[1])
    return grid.to_groups(whole, size), grid.to_groups(torch.ones(1, whole.shape[1]), size)


def rounding_error(unit: Tensor, counted: Tensor, zero: Tensor, top: int, p: float) -> tuple[Tensor, Tensor]:
    """w − ŵ in units of the scale (out, G, group), 0 where a group was filled up, and its Σ |·|^p (out, G)."""
    codes = torch.round(unit + zero[..., None]).clamp_(0, top)
    error = (unit - codes).add_(zero[..., None]).mul_(counted)
    return error, error.abs().pow_(p).sum(-1)


def shrink(error: Tensor, beta: float, p: float) -> Tensor:
    """sign(e) · max(0, |e| − |e|^(p−1) / β), elementwise: the generalised soft threshold of the lp norm."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-12).pow_(p - 1).div_(beta)).clamp_(min=0.0)
