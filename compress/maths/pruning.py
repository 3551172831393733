"""Pruning with compensation: what is left of a weight makes up for what is taken away. Pure functions on tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compress.maths import products
from compress.maths.masks import Pattern

BLOCK = 64
"""Columns after which what they did to the others is caught up with, and the next ones are chosen."""


def column_order(power: Tensor, pattern: Pattern) -> Tensor:
    """(in,) int64: the order in which columns are decided, by the mean square (in,) of their inputs.

    Where columns compete, the weakest come first: they are pruned most, and the strong ones after them absorb the
    error. Where every run of columns loses as many (`n:m`), the strongest runs come first, as in GPTQ, since their
    error needs most room. Blocks stay where they are. Measured on the tests' layers and a small language model.
    """
    runs = torch.arange(len(power)).reshape(-1, pattern.span)
    if pattern.kind == "block":
        return runs.flatten()
    rank = torch.argsort(power[runs].amax(-1), descending=pattern.kind == "n:m", stable=True)
    return runs[rank].flatten()


def prune(
    weight: Tensor,
    factor: Tensor,
    pattern: Pattern,
    sparsity: float,
    block: int = BLOCK,
    rounder: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Decide the columns in turn, moving the error of what becomes zero to those after it (SparseGPT, Frantar and
    Alistarh 2023, arXiv 2301.00774, Algorithm 1).

    A weight scores |w| / U_qq as it is when its turn comes: the root of what its removal costs once the columns after
    it have made up for it. The paper prunes the same share of every `block` columns. Here each weight of the block is
    compared with all that are still to come, so that the exact count holds for the whole (of `row`: for each row) while
    columns that matter little lose more; runs of `n:m` are chosen when their first column's turn comes, and blocks as
    in the paper, which measured better there.

    Args: weight (out, in) float32 in processing order; factor U (in, in) float32 upper triangular with UᵀU = H⁻¹ in
    that order; block: columns, taken up to a multiple of `pattern.span`; rounder: of these columns in this order, one
    at a time (`formats.base.Rounder`), which leaves zeros at zero: then what stays of a column is rounded, and the
    columns after it make up for that too (the paper's §3.5).
    Returns: the weight (out, in) float32 with its zeros, rounded if there is a rounder, and the mask (out, in) bool of
    what is left.
    """
    left = weight.T.clone(memory_format=torch.contiguous_format)
    kept = torch.empty_like(left, dtype=torch.bool)
    corners = factor.diagonal()[:, None]
    block = -(-block // pattern.span) * pattern.span
    for start in range(0, len(left), block):
        stop = min(start + block, len(left))
        errors = torch.empty_like(left[start:stop])
        ahead = pattern.span if pattern.kind == "n:m" else stop - start
        for at in range(start, stop):
            if (at - start) % ahead == 0:
                kept[at : at + ahead] = _choose(left, corners, kept, pattern, sparsity, at, ahead)
            error, column = errors[at - start], left[at]
            stays = column.masked_fill(~kept[at], 0.0)
            if rounder is not None:
                stays = rounder(stays[None], at)[1][0]
            torch.div(column - stays, corners[at], out=error)
            column.copy_(stays)
            left[at + 1 : stop].addmm_(factor[at : at + 1, at + 1 : stop].T, error[None], alpha=-1)
        with products.fast():
            left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return left.T.contiguous(), kept.T.contiguous()


def _choose(
    left: Tensor, corners: Tensor, kept: Tensor, pattern: Pattern, sparsity: float, at: int, ahead: int
) -> Tensor:
    """(ahead, out) bool: what stays of the columns from `at` on; all tensors (in, …), the mask filled up to there."""
    columns, rows = left.shape
    end = at + ahead if pattern.kind in ("n:m", "block") else columns
    total: int | Tensor = pattern.kept((rows, end), sparsity)
    if pattern.kind == "row":
        total = total - kept[:at].sum(0)[:, None]
    elif pattern.kind != "n:m":
        total = int(total) - int(kept[:at].sum()) // (pattern.size[0] * pattern.size[1])
    scores = (left[at:end] / corners[at:end]).abs_().T
    return pattern.keep(scores, total).T[:ahead]


def refit(weight: Tensor, start: Tensor, mask: Tensor, hessian: Tensor, rounds: int) -> Tensor:
    """The values that a mask leaves, closer to the best there are: rounds of conjugate gradients, all rows at once, on
    tr((W − V) H (W − V)ᵀ) over V that is zero outside the mask, scaled by the diagonal of H. No round makes the error
    larger. SparseGPT never comes back to a column; Boža 2024 (arXiv 2401.02938) shows what solving for the values
    again gains, by other means (ADMM). At the least error a change of what is left adds its own error and nothing
    else, so that whoever rounds these values next may aim at them instead of W.

    Args: weight W, start (out, in) float32, start zero outside mask (out, in) bool; hessian (in, in) float32, damped.
    """
    found = start.clone()
    scale = mask / hessian.diagonal()
    with products.fast():
        slope = ((weight - found) @ hessian).mul_(mask)  # minus half the gradient
    way = slope * scale
    size = (slope * way).sum(1, keepdim=True)
    for _ in range(rounds):
        with products.fast():
            reaction = (way @ hessian).mul_(mask)
        curvature = (way * reaction).sum(1, keepdim=True)
        step = torch.where(curvature > 0, size / curvature, 0.0)
        found.addcmul_(way, step)
        slope.addcmul_(reaction, step, value=-1)
        fresh = slope * scale
        before, size = size, (slope * fresh).sum(1, keepdim=True)
        way = fresh.addcmul_(way, torch.where(before > 0, size / before, 0.0))
    return found
