"""Solvers for trellis codes: pure functions on tensors.

All minimise tr((W − Ŵ) H (W − Ŵ)ᵀ). What is coded is X with W = diag(v) · Hᵒ · Xᵀ · Hⁱ · diag(u), Hᵒ and Hⁱ orthogonal
and symmetric, so that X meets the second moments Hⁱ · diag(u) · H · diag(u) · Hⁱ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress import solve
from compress.formats.base import Params, Rounder
from compress.formats.trellis import Trellis
from compress.maths import trellis
from compress.maths.hessian import weighted_error
from compress.solve import System

# Share of the mean diagonal that is added to second moments which were damped before they were turned.
TINY = 1e-6


def turned_moments(form: Trellis, hessian: Tensor, suh: Tensor) -> Tensor:
    """Second moments (in, in) of what X is multiplied with."""
    return form.mix(form.mix(suh[:, None] * hessian * suh).T)


def rounder(form: Trellis) -> Rounder:
    """Codes and values of 16 rows (16, out) of X, for `solve.compensate`."""

    def choose(rows: Tensor, at: int) -> tuple[Tensor, Tensor]:
        symbols = form.search(rows)
        return symbols[0].T, form.values(symbols)

    return choose


def encode(form: Trellis, target: Tensor, hessian: Tensor, params: Params, order: str) -> Tensor:
    """Codes (out / 16, in / 16 · 256) of a target (out, in): rows of tiles in turn, each one's error moved to those
    after it (QTIP's block LDLQ, arXiv 2406.11235 §3.1, which is GPTQ's loop 16 columns at a time).

    Args: hessian (in, in) float32, damped; params: the format's; order: see `solve.column_order`, of rows of tiles.
    """
    moments = turned_moments(form, hessian, params["suh"])
    system = System.of(moments, TINY, trellis.SIDE, order)
    return system.codes(form.turn(target, params).T, rounder(form), trellis.SIDE)


def refit(form: Trellis, target: Tensor, hessian: Tensor, codes: Tensor, params: Params, sweeps: int) -> Params:
    """Scales of outputs, then of inputs, each the best for the codes and with the others as they are, as storage holds
    them. The error never rises: what would be worse stays.

    Args: as in `encode`; codes: those that it gave.
    """
    inner = form.values(form.tiles(codes))
    ones = torch.ones(())
    suh, svh = params["suh"], params["svh"]
    error = weighted_error(target - form.turn_back(inner, suh, svh), hessian)
    for _ in range(sweeps):
        before = error
        rows = solve.row_scales(target, form.turn_back(inner, suh, ones.expand_as(svh)), hessian).half().float()
        found = weighted_error(target - form.turn_back(inner, suh, rows), hessian)
        if found < error:
            svh, error = rows, found
        columns = solve.column_scales(target, form.turn_back(inner, ones.expand_as(suh), svh), hessian)
        columns = suh if columns is None else columns.half().float()
        found = weighted_error(target - form.turn_back(inner, columns, svh), hessian)
        if found < error:
            suh, error = columns, found
        if not error < before:
            break
    return {"suh": suh, "svh": svh}
