"""Second moments of layer inputs and their inverse factor: pure functions on tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import InputError
from compress.maths import products

# Damping doubles at most this often before a layer is refused: 0.01 · 2^10 is ten times the mean diagonal.
MAX_ESCALATIONS = 10
# Columns of a Hessian that are added up at a time: enough for a fast product, few enough to save the lower triangle.
TRIANGLE_STEP = 256


def accumulate(total: Tensor | None, inputs: Tensor) -> Tensor:
    """total (in, in) float32 plus inputs (…, in) float32 as Σ x xᵀ, in place where total is given."""
    return mirror(accumulate_upper(total, inputs))


def accumulate_upper(total: Tensor | None, inputs: Tensor) -> Tensor:
    """`accumulate` of the upper triangle alone, at little more than half the cost; below it is left unfinished."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    if total is None:
        total = rows.new_zeros(rows.shape[-1], rows.shape[-1])
    for start in range(0, len(total), TRIANGLE_STEP):
        stop = start + TRIANGLE_STEP
        total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])
    return total


def mirror(total: Tensor) -> Tensor:
    """Write the upper triangle of (in, in) into the lower one, in place."""
    for start in range(0, len(total), TRIANGLE_STEP):
        stop = start + TRIANGLE_STEP
        total[stop:, start:stop] = total[start:stop, stop:].T
        corner = total[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
    return total


def inverse_factor(hessian: Tensor, damp: float, columns: Tensor | None = None) -> tuple[Tensor, float, int]:
    """Upper Cholesky factor U of (H + λI)⁻¹, UᵀU = (H + λI)⁻¹, with λ = damp · mean diagonal.

    Frantar et al. 2023 (arXiv 2210.17323) §3.3. When the factorisation fails, λ doubles and it is tried again: a
    layer never silently becomes round-to-nearest.

    Args: hessian (in, in) float32, symmetric, ≥ 0; a zero diagonal entry (an input that was never on) counts as 1;
    columns (in,) int64: the order in which they are taken (None: as they stand).
    Returns: U (in, in) float32 upper triangular, of the columns in that order, the damping used, how often it was
    doubled.
    Raises: InputError when no damping up to 2^10 · damp works (the statistics hold NaN or infinity).
    """
    diagonal = hessian.diagonal() if columns is None else hessian.diagonal()[columns]
    backwards = torch.arange(len(hessian)).flip(0) if columns is None else columns.flip(0)
    dead = diagonal == 0
    mean = float(diagonal.mean())
    for tries in range(MAX_ESCALATIONS + 1):
        used = damp * 2**tries
        # With P the reversal, P(H + λI)P = LLᵀ gives H + λI = RRᵀ for the upper R = PLP, and U = R⁻¹: one
        # factorisation and one triangular inverse instead of two and a full inverse. All in place: these are the
        # largest tensors of a solve.
        damped = _chosen(hessian, backwards, torch.float64)
        damped.diagonal()[dead.flip(0)] = 1.0
        damped.diagonal().add_(used * mean)
        failed = torch.empty((), dtype=torch.int32)
        # turned, and above the diagonal, since LAPACK goes by columns: L is what stands in `damped` then
        torch.linalg.cholesky_ex(damped.mT, upper=True, out=(damped.mT, failed))
        if failed:
            continue
        factor = _chosen(damped, torch.arange(len(damped)).flip(0), torch.float32)
        del damped
        _invert(factor)
        if products.all_finite(factor):
            return factor, used, tries
    raise InputError(
        f"The input statistics of a layer could not be factorised, even with damping {damp * 2**MAX_ESCALATIONS:g} "
        "of the mean diagonal: they hold NaN or infinite values. Check the model and the calibration data."
    )


def damped(hessian: Tensor, damp: float) -> Tensor:
    """H + λI as `inverse_factor` factorises it, with λ = damp · mean diagonal, (in, in) float32."""
    result = hessian.clone()
    result.diagonal().masked_fill_(hessian.diagonal() == 0, 1.0).add_(damp * float(hessian.diagonal().mean()))
    return result


def weighted_error(difference: Tensor, hessian: Tensor) -> float:
    """tr(D H Dᵀ) for D (out, in) and symmetric H (in, in): the squared error of the output, added in float64."""
    total = 0.0
    for start in range(0, len(hessian), TRIANGLE_STEP):  # of DᵀD, which is symmetric too, half is enough
        stop = start + TRIANGLE_STEP
        strip = (difference[:, start:stop].T @ difference[:, start:]).mul_(hessian[start:stop, start:])
        corner = strip[:, : len(strip)]
        total += 2 * float(strip.sum(dtype=torch.float64)) - float(corner.sum(dtype=torch.float64))
    return total


def stream_error(weight: Tensor, source: Tensor, hessian: Tensor, cross: Tensor, drift: Tensor) -> tuple[float, float]:
    """Mean squares over tokens of Ŵx − W(x + δ) and of W(x + δ): how far a layer's output is from that of the layer it
    was made of, each on the inputs of its own stream.

    Args: weight Ŵ, source W (out, in); hessian, cross, drift (in, in) float32: means of x xᵀ, δ xᵀ and δ δᵀ. The last
    may come of fewer tokens than the others, which can leave a small error below 0; it then counts as 0.
    """
    change, moved, drifted = weight - source, source @ cross, weighted_error(source, drift)
    error = weighted_error(change, hessian) - 2 * _dot(change, moved) + drifted
    return max(error, 0.0), weighted_error(source, hessian) + 2 * _dot(source, moved) + drifted


def _dot(first: Tensor, second: Tensor) -> float:
    return float((first * second).sum(dtype=torch.float64))


def _chosen(matrix: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
    """matrix[places][:, places] in another dtype, without the two copies on the way."""
    result = matrix.new_empty(len(places), len(places), dtype=dtype)
    for start in range(0, len(places), TRIANGLE_STEP):
        result[start : start + TRIANGLE_STEP] = matrix[places[start : start + TRIANGLE_STEP]][:, places]
    return result


def _invert(upper: Tensor) -> None:
    """Put the inverse of an upper triangular matrix in its place, by halves: mostly products, and a third of a general
    solve's."""
    count = len(upper)
    if count <= TRIANGLE_STEP:
        upper.copy_(torch.linalg.solve_triangular(upper, torch.eye(count), upper=True))
        return
    half = count // 2
    first, corner, second = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    _invert(first)
    _invert(second)
    torch.mm(first, corner @ second, out=corner).neg_()
