"""Second moments of layer inputs and their inverse factor: pure functions on tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import InputError

# Damping doubles at most this often before a layer is refused: 0.01 · 2^10 is ten times the mean diagonal.
MAX_ESCALATIONS = 10
# Errors are summed in float64 over so many entries at a time, so that no whole matrix is widened.
ERROR_ELEMENTS = 1 << 19


def accumulate(total: Tensor | None, inputs: Tensor) -> Tensor:
    """total (in, in) float32 plus inputs (…, in) float32 as Σ x xᵀ, in place where total is given."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    if total is None:
        return rows.T @ rows
    return total.addmm_(rows.T, rows)


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
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if failed:
            continue
        upper = lower.flip(0, 1).float()
        del lower
        factor = torch.linalg.solve_triangular(upper, torch.eye(len(upper)), upper=True)
        if bool(torch.isfinite(factor).all()):
            return factor, used, tries
    raise InputError(
        f"The input statistics of a layer could not be factorised, even with damping {damp * 2**MAX_ESCALATIONS:g} "
        "of the mean diagonal: they hold NaN or infinite values. Check the model and the calibration data."
    )


def weighted_error(difference: Tensor, hessian: Tensor) -> float:
    """tr(D H Dᵀ) for D (out, in) and H (in, in): the squared error of the layer's output, in float64."""
    parts = torch.split(difference, max(1, ERROR_ELEMENTS // difference.shape[1]))
    return sum(float(((part @ hessian).double() * part.double()).sum()) for part in parts)
