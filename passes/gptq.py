"""GPTQ: quantize a weight column by column; the columns still to come absorb each column's error."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.collect import LayerStats, Stat
from compress.formats.base import Format, Params
from compress.hessian import inverse_factor
from compress.layer import Layer, LayerKind
from compress.layerpass import QuantPass


class Gptq(QuantPass):
    """GPTQ (Frantar et al. 2023, arXiv 2210.17323), with static groups: scales are fitted to the original groups first,
    then columns are taken in descending order of the Hessian's diagonal, so that no reordering is left at run time.

    Settings: `format` the grid; `damp` share of the mean diagonal added to the Hessian (doubled, and reported, while
    it cannot be factorised); `block` columns between two updates of all later columns; `clip` searches each group's
    range; `order`: `static` as above or `given` for the stored order.
    """

    name: ClassVar[str] = "gptq"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.HESSIAN})
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({LayerKind.LINEAR, LayerKind.EXPERT})

    damp: float = Field(default=0.01, gt=0, le=1)
    block: int = Field(default=128, ge=1)
    clip: bool = True
    order: str = Field(default="static", pattern="^(static|given)$")

    def layer(self, layer: Layer, stats: LayerStats) -> Layer:
        hessian = _hessian(layer, stats)
        form = self.resolved_format()
        never_on = hessian.diagonal() == 0
        weight = layer.float_weight().masked_fill(never_on, 0.0)
        params = form.fit(weight, search=self.clip)
        order = self._order(hessian)
        factor, used, tries = inverse_factor(hessian[order][:, order], self.damp)
        codes = compensate(weight[:, order], factor, form, params, order, self.block)
        packed = form.pack(codes[:, torch.argsort(order)], params, layer.shape)
        return replace(layer, weight=packed, notes=_notes(stats, used, tries))

    def _order(self, hessian: Tensor) -> Tensor:
        if self.order == "given":
            return torch.arange(hessian.shape[0])
        return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def _hessian(layer: Layer, stats: LayerStats) -> Tensor:
    """(in, in); the identity for an expert that no token was routed to."""
    return torch.eye(layer.shape[1]) if stats.hessian is None else stats.hessian


def _notes(stats: LayerStats, damping: float, doubled: int) -> tuple[str, ...]:
    """What a reader of the report should know about the solve."""
    if stats.hessian is None:
        return ("no calibration token reached it: rounded as if its inputs were alike (identity Hessian)",)
    inputs = stats.hessian.shape[0]
    notes = [f"damping raised to {damping:g} to factorise the Hessian"] if doubled else []
    if stats.tokens < inputs:
        notes.append(f"only {stats.tokens} tokens for {inputs} inputs: the Hessian is not full rank")
    return tuple(notes)


def compensate(weight: Tensor, factor: Tensor, form: Format, params: Params, columns: Tensor, block: int) -> Tensor:
    """Quantize the columns in turn, moving each one's error to those after it (paper, Algorithm 1).

    Args: weight (out, in) float32 in processing order, overwritten; factor U (in, in) upper triangular with
    UᵀU = H⁻¹; columns (in,) int64 original place of each column; block: columns per lazy update.
    Returns: codes (out, in) in processing order.
    """
    count, step = weight.shape[1], form.step
    codes = torch.empty_like(weight)
    for start in range(0, count, block):
        stop = min(start + block, count)
        # the columns of one block beside each other in memory: they are read and written column by column
        part, chosen = weight[:, start:stop].clone(), torch.empty(weight.shape[0], stop - start)
        triangle, errors = factor[start:stop, start:stop], torch.empty_like(part)
        for at in range(0, stop - start, step):
            now, later = slice(at, at + step), slice(at + step, stop - start)
            chosen[:, now], values = form.quantize(part[:, now], params, columns[start + at : start + at + step])
            error = _divide(part[:, now] - values, triangle[now, now])
            part[:, later] -= error @ triangle[now, later]
            errors[:, now] = error
        codes[:, start:stop] = chosen
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes


def _divide(difference: Tensor, corner: Tensor) -> Tensor:
    """e = (w − ŵ) / U_qq; where several columns are decided together, the same with their small triangle."""
    if corner.numel() == 1:
        return difference / corner
    solved: Tensor = torch.linalg.solve_triangular(corner, difference, upper=True, left=False)
    return solved
