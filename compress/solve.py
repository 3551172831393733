"""The column solvers behind GPTQ: pure functions on tensors.

All minimise tr((W − Ŵ) H (W − Ŵ)ᵀ), the squared error of a layer's output, over what a format can store. They work on
weights turned to (in, out), so that what is decided together lies together in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from compress.formats.base import Format, Params, Rounder
from compress.maths import products
from compress.maths.hessian import inverse_factor

# Columns decided one by one before what they did to the others is caught up with by one matrix product.
RUN = 64


def stack(rounders: Sequence[Rounder], rows: Sequence[int]) -> Rounder:
    """One rounder for weights on end, each of which has `rows` output rows."""
    if len(rounders) == 1:
        return rounders[0]

    def together(weight: Tensor, at: int) -> tuple[Tensor, Tensor]:
        parts = zip(rounders, torch.split(weight, list(rows), 1), strict=True)
        codes, values = zip(*(rounder(part, at) for rounder, part in parts), strict=True)
        return torch.cat(codes, 1), torch.cat(values, 1)

    return together


def masked(rounder: Rounder, mask: Tensor | None, columns: Tensor) -> Rounder:
    """A rounder that takes pruned weights to zero, whatever has been added to them: what they should have put out is an
    error like another, and moves on to the columns after them. One column at a time.

    Args: mask (out, in) bool, false where a weight is pruned, None: nowhere; columns (n,) int64: those of the rounder.
    """
    if mask is None:
        return rounder
    pruned = ~mask[:, columns].T
    return lambda weight, at: rounder(weight.masked_fill(pruned[at : at + 1], 0.0), at)


def column_order(hessian: Tensor, step: int, order: str) -> Tensor:
    """(in,) int64: `static` by descending diagonal of the Hessian, runs of `step` columns staying together by their
    largest; `given` as they stand."""
    units = torch.arange(len(hessian)).reshape(-1, step)
    if order == "static":
        units = units[torch.argsort(hessian.diagonal()[units].amax(-1), descending=True, stable=True)]
    return units.flatten()


NOT_GUIDED = "not guided: no gradient of the loss by all tokens and rows (experts have none): plain Hessian"
"""A note for layers that guided passes treat like others."""


@dataclass(frozen=True)
class System:
    """What all rows that are multiplied with the same inputs have in common: the Hessian in stored order, the order of
    the columns, the factor of the inverse in that order, the damping used and how often it was doubled."""

    hessian: Tensor
    columns: Tensor
    factor: Tensor
    damp: float
    doubled: int

    @classmethod
    def of(cls, hessian: Tensor, damp: float, step: int, order: str) -> Self:
        """Args: hessian (in, in) float32; damp: see `inverse_factor`; step, order: see `column_order`."""
        columns = column_order(hessian, step, order)
        return cls(hessian, columns, *inverse_factor(hessian, damp, columns))

    def target(self, weight: Tensor, cross: Tensor | None, share: float) -> Tensor:
        """The weight (out, in) to come close to: nothing where an input is never on; see `matched`."""
        weight = weight.masked_fill(self.hessian.diagonal() == 0, 0.0)
        return weight if cross is None or not share else matched(weight, cross, self.factor, self.columns, share)

    def codes(self, weight: Tensor, rounder: Rounder, step: int) -> Tensor:
        """Codes in stored order, (rows of codes, in / step · …)."""
        found = compensate(weight[:, self.columns], self.factor, rounder, step)
        places = torch.argsort(self.columns[::step])
        return found.reshape(len(found), len(places), -1)[:, places].flatten(1)

    def notes(self, tokens: int, inputs: int) -> list[str]:
        """What a reader of the report should know. tokens: that the Hessian is the mean of; inputs: of the layer."""
        notes = [f"damping raised to {self.damp:g} to factorise the Hessian"] if self.doubled else []
        if tokens < inputs:
            notes.append(f"only {tokens} tokens for {inputs} inputs: the Hessian is not full rank")
        return notes


def matched(weight: Tensor, cross: Tensor, factor: Tensor, columns: Tensor, share: float) -> Tensor:
    """The real-valued weight whose output on the inputs that the layer will get comes closest to that of `weight` on
    the inputs that it was made for.

    With X those of the compressed prefix, X + ΔX those of the uncompressed one, ||w (X + share · ΔX) − v X||² + λ ||w −
    v||² has its minimum at v = w + share · w C (H + λI)⁻¹, C = ΔX Xᵀ, H = X Xᵀ; what GPTQ then does around v it does
    around the best that can be reached. GPTAQ (Li et al. 2025, arXiv 2504.02692, eq. 5) starts from the same
    objective and keeps of C (H + λI)⁻¹ what points to later columns.

    Args: weight (out, in); cross C (in, in) float32, row i of which belongs to the i-th entry of ΔX; factor as in
    `compensate`, of the columns in the order `columns`. C and H as means over the same tokens.
    """
    # (weight · cross) · inverse where the weight is low, weight · (cross · inverse) where it is high
    with products.fast():
        start = cross if len(weight) > len(cross) else weight @ cross
        moved = ((start[:, columns] @ factor.T) @ factor)[:, torch.argsort(columns)]
        return weight + share * (weight @ moved if len(weight) > len(cross) else moved)


def compensate(weight: Tensor, factor: Tensor, rounder: Rounder, step: int = 1) -> Tensor:
    """Quantize the columns in turn, moving each one's error to those after it (GPTQ, arXiv 2210.17323, Algorithm 1).

    The lazy updates are nested: each half of the columns is caught up with the other in one product, down to runs of
    `RUN`.

    Args: weight (out, in) float32 in processing order; factor U (in, in) float32 upper triangular with UᵀU = H⁻¹;
    rounder: of these columns in this order; step: columns that it decides together.
    Returns: codes (out, in / step · …) in processing order.
    """
    left = weight.T.clone(memory_format=torch.contiguous_format)
    codes: list[Tensor] = []
    _compensate(left, factor, rounder, step, 0, left.shape[0], codes)
    return torch.cat(codes).T


def _compensate(
    left: Tensor, factor: Tensor, rounder: Rounder, step: int, start: int, stop: int, codes: list[Tensor]
) -> None:
    """Columns start … stop of `left` (in, out), in which errors e = (w − ŵ) / U_qq take the place of what is done."""
    if stop - start <= max(RUN, step):
        _run(left, factor, rounder, step, start, stop, codes)
        return
    middle = start + -(-(stop - start) // 2 // step) * step
    _compensate(left, factor, rounder, step, start, middle, codes)
    with products.fast():
        left[middle:stop].addmm_(factor[start:middle, middle:stop].T, left[start:middle], alpha=-1)
    _compensate(left, factor, rounder, step, middle, stop, codes)


def _run(left: Tensor, factor: Tensor, rounder: Rounder, step: int, start: int, stop: int, codes: list[Tensor]) -> None:
    corners = factor.diagonal()[start:stop].tolist()
    for at in range(start, stop, step):
        now, later = slice(at, at + step), slice(at + step, stop)
        column = left[now]
        chosen, values = rounder(column, at)
        codes.append(chosen)
        column.sub_(values)
        if step == 1:
            column.div_(corners[at - start])
        else:
            column.copy_(torch.linalg.solve_triangular(factor[now, now].T, column, upper=False))
        left[later].addmm_(factor[now, later].T, column, alpha=-1)


def improve(
    weight: Tensor,
    start: Tensor,
    hessian: Tensor,
    form: Format,
    params: Params,
    sweeps: int,
    mask: Tensor | None = None,
) -> tuple[Tensor, Params]:
    """Sweeps of descent over all groups of columns, from a start such as GPTQ's: first each row's scale of the group
    takes its least-squares value, then each column the codes that are best with everything else as it is.

    No step makes the error larger. GuidedQuant's LNQ (arXiv 2505.07004) alternates the same two with all scales of a
    row at once; group by group costs less and came out even. Scales stay as they are where the format has none to
    refit (`Format.refit_span`).

    Args: weight (out, in) float32, the target; start (out, in) float32, the decoded start; hessian (in, in) float32,
    damped; params: those of the start, left alone; mask (out, in) bool, false where the start is zero and stays so.
    Returns: codes (out, in) and parameters.
    """
    columns = weight.shape[1]
    params = {name: value.clone() for name, value in params.items()}
    values = start.T.contiguous()
    with products.fast():
        slope = hessian @ (weight.T - values)  # minus half the gradient, (in, out)
    codes: list[Tensor] = []
    span = form.refit_span(columns)
    groups = list(range(0, columns, span or 2 * RUN))
    for sweep in range(sweeps):
        codes = []
        for place, first in enumerate(groups):
            group = slice(first, min(first + (span or 2 * RUN), columns))
            before, near, block = values[group].clone(), slope[group].clone(), hessian[group, group]
            if span:
                _rescale(values[group], near, block, form, params, place)
            columns_here = torch.arange(first, group.stop)
            rounder = masked(form.rounder(params, columns_here), mask, columns_here)
            codes += _descend(values[group], near, block, rounder)
            # in the last sweep only the columns still to come need to know
            rest = slice(group.stop if sweep == sweeps - 1 else 0, columns)
            with products.fast():
                slope[rest].addmm_(hessian[rest, group], before.sub_(values[group]))
    return torch.cat(codes).T, params


def _rescale(values: Tensor, slope: Tensor, hessian: Tensor, form: Format, params: Params, place: int) -> None:
    """The best scale of each row in one group of columns: w = scale · unit is linear in it, so one division finds it.

    values, slope (group, out) and the corner (group, group) of the Hessian; the first two follow.
    """
    with products.fast():
        reaction = hessian @ values
    gain, curvature = (values * slope).sum(0), (values * reaction).sum(0)
    wanted = 1 + torch.where(curvature > 0, gain / curvature, 0.0)
    factor = form.rescale(params, place, torch.where(wanted > 0, wanted, 1.0))
    slope.sub_(reaction.mul_(factor - 1))
    values.mul_(factor)


def _descend(values: Tensor, slope: Tensor, hessian: Tensor, rounder: Rounder) -> list[Tensor]:
    """Codes of a group's columns, each the best with all others as they are; values and slope (group, out) follow."""
    codes = []
    curvatures = hessian.diagonal().tolist()
    moved = torch.empty_like(values[:RUN])
    for start in range(0, len(values), RUN):
        stop = min(start + RUN, len(values))
        for at in range(start, stop):
            column, step = values[at : at + 1], moved[at - start : at - start + 1]
            chosen, best = rounder(torch.add(column, slope[at : at + 1], alpha=1 / curvatures[at]), at)
            codes.append(chosen)
            torch.sub(best, column, out=step)
            column.copy_(best)
            slope[at + 1 : stop].addmm_(hessian[at + 1 : stop, at : at + 1], step, alpha=-1)
        slope[stop:].addmm_(hessian[stop:, start:stop], moved[: stop - start], alpha=-1)
    return codes


def row_scales(target: Tensor, unit: Tensor, hessian: Tensor) -> Tensor:
    """(out,): what each row of `unit` (out, in) is best multiplied with to come close to the target; 0 for a row that
    does nothing."""
    gain, curvature = row_terms(target, unit, hessian)
    return torch.where(curvature > 0, gain / curvature, 0.0)


def row_terms(target: Tensor, unit: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """gain g and curvature c, (out,) both, of the rows of `unit` (out, in): multiplied with s, a row changes the error
    by c s² − 2 g s."""
    with products.fast():
        reaction = unit @ hessian
    return (target * reaction).sum(1), (unit * reaction).sum(1)


def column_scales(target: Tensor, unit: Tensor, hessian: Tensor) -> Tensor | None:
    """(in,): what the columns of `unit` (out, in) are best multiplied with, H ∘ (UᵀU) s = diag(Uᵀ W H), by a Cholesky
    factor; a little is added where columns are zeros. None where there is no factor."""
    with products.fast():
        matrix = (hessian * (unit.T @ unit)).double()
        right = (unit * (target @ hessian)).sum(0, dtype=torch.float64)
    matrix.diagonal().add_(1e-6 * float(matrix.diagonal().mean()))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return None if int(failed) else torch.cholesky_solve(right[:, None], factor)[:, 0].float()
