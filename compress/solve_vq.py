"""Solvers for codebooks: pure functions on tensors.

All minimise tr((W − Ŵ) H (W − Ŵ)ᵀ), with Ŵ = scale · decoded, summed over the layers that hold the codebooks in common.
For fixed codes Ŵ is linear in the entries, and for fixed entries and codes in the scales; neither step, nor choosing
the codes of one vector with all others as they are, makes the error larger. VPTQ (arXiv 2409.17066) stops at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress import solve
from compress.errors import InputError
from compress.formats.base import Rounder
from compress.formats.codebook import Codebook
from compress.maths import codebooks, products
from compress.maths.hessian import weighted_error

# Share of the first gradient at which the least squares of a codebook are solved, and steps at most.
SOLVED, MOST_STEPS = 1e-3, 30


@dataclass(frozen=True)
class Coded:
    """A layer on its way: what it is to come close to, and the codes and scales that it has.

    target (out, in) float32, what is left of the weight without the bias; hessian (in, in) float32, damped; scale (out,
    1), (1, in) or (1, 1) float32 as stored; codes (rows, units, stages) int64; bias (out, 1) or (1, in) float32 as
    stored, None without one. The codebook (groups, stages, entries, vector) goes beside it.
    """

    form: Codebook
    target: Tensor
    hessian: Tensor
    scale: Tensor
    codes: Tensor
    bias: Tensor | None = None

    def unit(self, book: Tensor) -> Tensor:
        """(out, in): what is decoded, before it is scaled."""
        return self.form.unit(self.codes, book, len(self.target))

    def error(self, book: Tensor) -> float:
        """tr((W − Ŵ) H (W − Ŵ)ᵀ)."""
        return weighted_error(self.target - self.unit(book) * self.scale, self.hessian)


def chooser(form: Codebook, book: Tensor, scale: Tensor, columns: Tensor, roots: Tensor | None, beam: int) -> Rounder:
    """Codes and values of the vectors at some columns, `form.step` at a time, for `solve.compensate`.

    Args: scale as in `Coded`; columns (in,) int64: their order; roots (units, vector, vector) float32: of a vector's
    difference x the error is |x · root|², by the place in that order (None: |x|²); beam: see `codebooks.assign`.
    """
    step, groups = form.step, form.groups
    width = len(columns) // groups

    def choose(weight: Tensor, at: int) -> tuple[Tensor, Tensor]:
        places = columns[at : at + step]
        entries = book[int(places[0]) // width]
        factor = scale if scale.shape[1] == 1 else scale[:, places]
        vectors = form.vectors(weight.T / factor)[:, 0]
        if roots is None:
            codes = codebooks.assign(vectors, entries, beam)
        else:
            # row scales leave the choice as it is, column scales are part of the metric
            root = roots[at // step] if scale.shape[1] == 1 else factor.T * roots[at // step]
            codes = codebooks.assign(vectors @ root, entries @ root, beam)
        values = form.weights(codebooks.decode(codes, entries)[:, None], weight.shape[1]) * factor
        return codes.T, values.T

    return choose


def compensate(start: Coded, book: Tensor, factor: Tensor, columns: Tensor, beam: int, metric: bool) -> Coded:
    """The codes that GPTQ's loop chooses, each vector's error moved to those after it (`solve.compensate`).

    With `metric` the codes of v neighbouring columns are those of least error once the later columns have made up for
    what they can: |(w − ŵ) U_bb⁻¹|² with the block U_bb of the factor (GPTVQ, arXiv 2402.15319, §3.2, has the
    block of the inverse Hessian). Without it, or where a vector lies in one column, those nearest.

    Args: start: its codes are not read; factor: see `solve.compensate`; columns (in,) int64: their order, in whole
    vectors.
    """
    form, size = start.form, start.form.step
    roots = None
    if metric and size > 1:
        roots = torch.linalg.inv(_corners(factor, size))
    rounder = chooser(form, book, start.scale, columns, roots, beam)
    found = solve.compensate(start.target[:, columns], factor, rounder, size)
    rows, units = form.units((start.target.shape[0], start.target.shape[1]))
    places = torch.argsort(columns[::size])
    return replace(start, codes=found.reshape(rows, units, form.stages)[:, places].long())


def _corners(matrix: Tensor, size: int) -> Tensor:
    """(n / size, size, size): the blocks on the diagonal."""
    units = len(matrix) // size
    places = torch.arange(units)
    return matrix.reshape(units, size, units, size)[places, :, places]


def reassign(layer: Coded, book: Tensor, beam: int) -> Coded:
    """One sweep of descent: the codes of each vector in turn are chosen again, with all others as they are.

    The error of a vector that moves by x is |(t − x) Lᵗ|² and a constant, H_bb = L Lᵀ and t = slope H_bb⁻¹; a search
    that finds nothing better keeps what there was.
    """
    size, columns = layer.form.step, layer.target.shape[1]
    blocks = _corners(layer.hessian, size)
    roots = torch.linalg.cholesky(blocks)
    rounder = chooser(layer.form, book, layer.scale, torch.arange(columns), roots if size > 1 else None, beam)
    values = (layer.unit(book) * layer.scale).T.contiguous()
    with products.fast():
        slope = layer.hessian @ (layer.target.T - values)
    codes = layer.codes.clone()
    span = max(size, solve.RUN // size * size)
    for first in range(0, columns, span):
        run = slice(first, min(first + span, columns))
        before = values[run].clone()
        for at in range(first, run.stop, size):
            now, later = slice(at, at + size), slice(at + size, run.stop)
            wish = torch.cholesky_solve(slope[now], roots[at // size])
            chosen, best = rounder(values[now] + wish, at)
            step = _better(layer, wish, best - values[now], roots[at // size], chosen, codes[:, at // size])
            values[now] += step
            slope[later].addmm_(layer.hessian[later, now], step, alpha=-1)
        with products.fast():
            slope[run.stop :].addmm_(layer.hessian[run.stop :, run], before - values[run])
    return replace(layer, codes=codes)


def _better(layer: Coded, wish: Tensor, step: Tensor, root: Tensor, chosen: Tensor, codes: Tensor) -> Tensor:
    """The step (size, out) where it lowers the error, else 0; codes (rows, stages) take over what was chosen there."""
    gain = (root.T @ wish).square() - (root.T @ (wish - step)).square()
    per_row = gain.sum(0) if layer.form.axis == "in" else layer.form.vectors(gain.T).sum((1, 2))
    better = per_row > 0
    codes[better] = chosen.T[better].long()
    wide = better if layer.form.axis == "in" else better.repeat_interleave(layer.form.vector)[: step.shape[1]]
    return step * wide


def refit_books(layers: Sequence[Coded], book: Tensor) -> Tensor:
    """The entries of least error for the codes as they are: the normal equations by conjugate gradients, preconditioned
    by how much each entry is used. One product with each layer's Hessian a step; entries that are not used stay.

    Returns: a book that storage holds, of no larger error: the one that was given where nothing better is found.
    """
    residual = _gathered(layers, [layer.target - layer.unit(book) * layer.scale for layer in layers], book)
    weight = _usage(layers, book)
    inverse = torch.where(weight > 0, 1 / weight.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
    moved, direction, scaled = torch.zeros_like(book), inverse * residual, inverse * residual
    product = first = float((residual * scaled).sum(dtype=torch.float64))
    for _ in range(MOST_STEPS):
        if product <= SOLVED**2 * first:
            break
        image = _gathered(layers, [layer.unit(direction) * layer.scale for layer in layers], book)
        curvature = float((direction * image).sum(dtype=torch.float64))
        if curvature <= 0:
            break
        moved.add_(direction, alpha=product / curvature)
        residual.sub_(image, alpha=product / curvature)
        scaled = inverse * residual
        before, product = product, float((residual * scaled).sum(dtype=torch.float64))
        direction = scaled + direction * (product / before)
    found = codebooks.stored(book + moved)
    return found if total(layers, found) < total(layers, book) else book


def total(layers: Sequence[Coded], book: Tensor) -> float:
    """The error of all layers that hold the book. Raises: InputError where it is NaN or infinite."""
    found = sum(layer.error(book) for layer in layers)
    if found != found or found == torch.inf:
        raise InputError("The weights of a layer, or its input statistics, hold NaN or infinite values.")
    return found


def _gathered(layers: Sequence[Coded], differences: Sequence[Tensor], book: Tensor) -> Tensor:
    """Minus half the gradient by the entries, where the weights are off by `differences` (out, in): like book."""
    result = torch.zeros_like(book)
    for layer, difference in zip(layers, differences, strict=True):
        with products.fast():
            slope = difference @ layer.hessian
        _add_up(layer, layer.form.vectors(slope * layer.scale), result)
    return result


def _usage(layers: Sequence[Coded], book: Tensor) -> Tensor:
    """The diagonal of the normal equations, but for a vector's meeting itself at other places: like book."""
    result = torch.zeros_like(book)
    for layer in layers:
        weight = (layer.hessian.diagonal() * layer.scale.square()).expand_as(layer.target)
        _add_up(layer, layer.form.vectors(weight), result)
    return result


def _add_up(layer: Coded, vectors: Tensor, result: Tensor) -> None:
    """Add vectors (rows, units, vector) to the entries that their codes name."""
    for place, run in enumerate(layer.form.runs(layer.codes.shape[1])):
        flat = vectors[:, run].flatten(0, 1)
        for stage in range(layer.form.stages):
            result[place, stage].index_add_(0, layer.codes[:, run, stage].flatten(), flat)


def refit_scale(layer: Coded, book: Tensor) -> Coded:
    """The scales of least error for what is decoded: one division for each row, or one system for all columns. The
    result is what storage holds; a scale that would be worse, or not positive, stays. A bias is refitted first."""
    layer = layer if layer.bias is None else refit_bias(layer, layer.bias, book)
    if layer.form.scale == "none":
        return layer
    unit = layer.unit(book)
    if layer.form.scale == "column":
        return _columns_rescaled(layer, book, unit)
    gain, curvature = solve.row_terms(layer.target, unit, layer.hessian)
    wanted = _kept(torch.where(curvature > 0, gain / curvature, 0.0)[:, None], layer.scale)
    now, new = layer.scale[:, 0], wanted[:, 0]
    lower = curvature * new.square() - 2 * gain * new < curvature * now.square() - 2 * gain * now
    return replace(layer, scale=torch.where(lower[:, None], wanted, layer.scale))


def refit_bias(layer: Coded, bias: Tensor, book: Tensor) -> Coded:
    """The bias of least error for the weights as they are otherwise: that of a column is the mean of what its weights
    lack, whatever the Hessian; that of a row what they lack as the inputs' sum sees it."""
    lack = layer.target - layer.unit(book) * layer.scale
    if bias.shape[0] == 1:
        shift = lack.mean(0, keepdim=True)
    else:
        seen = layer.hessian.sum(1)
        shift = (lack @ seen / seen.sum())[:, None]
    wanted = codebooks.stored(bias + shift)
    found = replace(layer, bias=wanted, target=layer.target + bias - wanted)
    return found if found.error(book) < layer.error(book) else layer


def _columns_rescaled(layer: Coded, book: Tensor, unit: Tensor) -> Coded:
    wanted = solve.column_scales(layer.target, unit, layer.hessian)
    if wanted is None:
        return layer
    found = replace(layer, scale=_kept(wanted[None], layer.scale))
    return found if found.error(book) < layer.error(book) else layer


def _kept(wanted: Tensor, before: Tensor) -> Tensor:
    """Scales as float16 holds them; as they were where they would not be positive."""
    rounded = codebooks.stored(wanted)
    return torch.where(rounded > 0, rounded, before)


def improve(
    layers: Sequence[Coded],
    book: Tensor,
    sweeps: int,
    beam: int,
    *,
    fixed: bool = False,
    tolerance: float = 0.0,
    told: Callable[[float], None] | None = None,
) -> tuple[list[Coded], Tensor]:
    """Sweeps of: entries, scales, codes, each the best with the others as they are; entries and scales once more at
    the end. The total error never rises; `told` is called with it after each sweep. fixed: the entries stay; tolerance:
    the last sweep is the one that takes less than this share of the error away."""
    found = list(layers)
    before = total(found, book) if tolerance and sweeps else 0.0
    for _ in range(sweeps):
        book = book if fixed else refit_books(found, book)
        found = [reassign(refit_scale(layer, book), book, beam) for layer in found]
        if not told and not tolerance:
            continue
        now = total(found, book)
        if told:
            told(now)
        if tolerance and now > (1 - tolerance) * before:
            break
        before = now
    if sweeps:
        book = book if fixed else refit_books(found, book)
        found = [refit_scale(layer, book) for layer in found]
    return found, book
