"""Whole inputs of a layer taken out: which of them matter least, and what the rest must be to make up for them.

A unit is a run of `size` input columns that go together: one channel of a feed-forward, all query heads of a group.
Pure functions on tensors, in float64.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from compress.errors import InputError
from compress.maths import products
from compress.maths.hessian import MAX_ESCALATIONS, weighted_error

Score = Literal["obs", "wanda", "activation", "magnitude"]

ROUNDS = 256
"""Units leave in at most as many rounds: a round costs a product of the Hessian's order squared."""


def columns_of(units: Tensor, size: int) -> Tensor:
    """units (n,) int64 → the input columns (n · size,) that they are."""
    return (units[:, None] * size + torch.arange(size)).reshape(-1)


def most_important(scores: Tensor, kept: int) -> Tensor:
    """scores (units,) → the places (kept,) int64 of the largest, ascending; of equals the first.

    Raises: InputError for scores that are not finite.
    """
    if not products.all_finite(scores):
        raise InputError("A channel's score is NaN or infinite: its weights or the statistics of its inputs are.")
    return torch.sort(torch.argsort(scores, descending=True, stable=True)[:kept]).values


def output_scores(weight: Tensor, hessian: Tensor, size: int) -> Tensor:
    """Mean square of what each unit alone adds to the output, (units,): tr(W_u H_uu W_uᵀ). For a unit of one column it
    is the squared score of Wanda (Sun et al. 2023, arXiv 2306.11695, eq. 1) added up over the rows.

    Args: weight (out, in); hessian (in, in), mean of x xᵀ.
    """
    count = weight.shape[1] // size
    parts = weight.double().reshape(-1, count, size).transpose(0, 1)
    blocks = diagonal_blocks(hessian.double(), size)
    return torch.einsum("uoi,uij,uoj->u", parts, blocks, parts)


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """matrix (n · size, n · size) → its blocks on the diagonal, (n, size, size)."""
    count = len(matrix) // size
    places = torch.arange(count)
    return matrix.reshape(count, size, count, size)[places, :, places, :]


def damped(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """hessian (in, in) in float64 with `damp` of its mean diagonal added, doubled until it can be factorised; 1 where
    all of it is zero. Returns: it, and the share in the end.

    Raises: InputError where no damping helps.
    """
    full = hessian.double()
    mean = float(full.diagonal().mean())
    eye = torch.eye(len(full), dtype=torch.float64)
    for _ in range(MAX_ESCALATIONS + 1):
        found = full + eye * (damp * mean if mean > 0 else 1.0)
        if int(torch.linalg.cholesky_ex(found).info) == 0:
            return found, damp
        damp *= 2
    raise InputError("Second moments of a layer's inputs cannot be factorised, however damped: are they finite?")


def least_needed(weight: Tensor, hessian: Tensor, size: int, kept: int) -> Tensor:
    """Greedy removal in the order of least loss, what is left absorbing it: the output's squared error that removing a
    unit costs is tr(W_u [H⁻¹]_uu⁻¹ W_uᵀ), with W and H⁻¹ as they are once the earlier ones are gone (Optimal Brain
    Surgeon for whole columns: Kurtic et al. 2023, arXiv 2302.04089, eq. 2 and 3).

    Args: weight (out, in); hessian (in, in), damped; kept: how many units stay.
    Returns: (kept,) int64, ascending.
    """
    inverse = torch.linalg.inv(hessian.double())
    gram = weight.double().T @ weight.double()
    left = torch.arange(weight.shape[1] // size)
    step = max(1, -(-(len(left) - kept) // ROUNDS))
    while len(left) > kept:
        own = diagonal_blocks(inverse, size)
        scores = (torch.linalg.inv(own) * diagonal_blocks(gram, size)).sum((1, 2))
        gone = torch.argsort(scores, stable=True)[: min(step, len(left) - kept)]
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[gone] = False
        inverse, gram = _without(inverse, gram, columns_of(gone, size), columns_of(stays.nonzero()[:, 0], size))
        left = left[stays]
    return left


def _without(inverse: Tensor, gram: Tensor, gone: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """H⁻¹ and WᵀW of the columns that stay once others are gone and W has made up for them."""
    share = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, stays])  # W_s becomes W_s − W_g · share
    cross = share.T @ gram[gone][:, stays]
    made = gram[stays][:, stays] - cross - cross.T + share.T @ gram[gone][:, gone] @ share
    return inverse[stays][:, stays] - inverse[stays][:, gone] @ share, made


def refitted(weight: Tensor, hessian: Tensor, columns: Tensor) -> Tensor:
    """The weight (out, in) with zeros outside some columns, these being what changes the output least in the mean:
    W_s + W_g H_gs H_ss⁻¹, least squares. hessian (in, in), damped. Float64."""
    full, result = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    gone = torch.ones(full.shape[1], dtype=torch.bool)
    gone[columns] = False
    factor = torch.linalg.cholesky(hessian[columns][:, columns])
    moved = torch.cholesky_solve((full[:, gone] @ hessian[gone][:, columns]).T, factor).T
    result[:, columns] = full[:, columns] + moved
    return result


def output_error(weight: Tensor, found: Tensor, hessian: Tensor) -> float:
    """Squared error of a layer's output as a share of its square, on inputs of these second moments."""
    power = weighted_error(weight.float(), hessian)
    return max(0.0, weighted_error((weight - found).float(), hessian)) / power if power > 0 else 0.0


def chosen(weight: Tensor, hessian: Tensor, abs_mean: Tensor, size: int, kept: int, by: Score, damp: float) -> Tensor:
    """The units that stay, (kept,) int64 ascending, by what is known of the inputs.

    Args: weight (out, in); hessian (in, in), mean of x xᵀ; abs_mean (in,), mean of |x|; damp: for `obs`.
    """
    if by == "activation":
        return most_important(abs_mean.double().reshape(-1, size).mean(1), kept)
    if by == "wanda":
        return most_important(output_scores(weight, hessian, size), kept)
    live = weight.where(hessian.diagonal() > 0, 0.0)  # what never was on is not missed, however it is damped
    return least_needed(live, damped(hessian, damp)[0], size, kept)
