"""Second moments of layer inputs and their inverse factor: pure functions on tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import InputError

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


def inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, float, int]:
    """Upper Cholesky factor U of (H + λI)⁻¹, UᵀU = (H + λI)⁻¹, with λ = damp · mean diagonal.

    Frantar et al. 2023 (arXiv 2210.17323) §3.3. When the factorisation fails, λ doubles and it is tried again: a
    layer never silently becomes round-to-nearest.

    Args: hessian (in, in) float32, symmetric, ≥ 0; a zero diagonal entry (an input that was never on) counts as 1.
    Returns: U (in, in) float32 upper triangular, the damping used, how often it was doubled.
    Raises: InputError when no damping up to 2^10 · damp works (the statistics hold NaN or infinity).
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = float(diagonal.mean())
    for tries in range(MAX_ESCALATIONS + 1):
        used = damp * 2**tries
        # With P the reversal, P(H + λI)P = LLᵀ gives H + λI = RRᵀ for the upper R = PLP, and U = R⁻¹: one
        # factorisation and one triangular inverse instead of two and a full inverse.
        damped = hessian.flip(0, 1).double()
        damped.diagonal()[dead.flip(0)] = 1.0
        damped.diagonal().add_(used * mean)
        failed = torch.empty((), dtype=torch.int32)
        torch.linalg.cholesky_ex(damped, out=(damped, failed))  # in place: these are the largest tensors of a solve
        if failed:
            continue
        upper = damped.float().flip(0, 1)
        del damped
        factor = _inverted(upper)
        if bool(torch.isfinite(factor).all()):
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
    # of DᵀD, which is symmetric too, half is enough
    products = accumulate_upper(None, difference).triu_().mul_(hessian)
    return 2 * float(products.sum(dtype=torch.float64)) - float(products.diagonal().sum(dtype=torch.float64))


def _inverted(upper: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix, by halves: mostly products, and a third of a general solve's."""
    count = len(upper)
    if count <= TRIANGLE_STEP:
        found: Tensor = torch.linalg.solve_triangular(upper, torch.eye(count), upper=True)
        return found
    half = count // 2
    first, second = _inverted(upper[:half, :half]), _inverted(upper[half:, half:])
    result = torch.zeros_like(upper)
    result[:half, :half], result[half:, half:] = first, second
    torch.mm(first, upper[:half, half:] @ second, out=result[:half, half:]).neg_()
    return result
