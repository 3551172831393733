"""The solvers for codebooks, against slow twins on small layers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compress import solve, solve_vq
from compress.errors import InputError
from compress.formats import parse_format
from compress.formats.codebook import Codebook
from compress.maths import codebooks
from compress.maths.hessian import damped, inverse_factor
from compress.solve_vq import Coded
from helpers.gptq_twin import inputs, moments

AXES = ("codebook(vector=2, entries=4, stages=2)", "codebook(vector=2, entries=4, stages=2, out)")
MORE = (
    *AXES,
    "codebook(vector=2, entries=4, stages=1, groups=2)",
    "codebook(vector=2, entries=4, stages=1, scale=column)",
    "codebook(vector=2, entries=4, stages=1, out, scale=none)",
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def started(text: str, seed: int = 0, rows: int = 5, columns: int = 8) -> tuple[Coded, Tensor]:
    """A layer with the codes nearest to its weights, and the codebook."""
    form = parse_format(text)
    assert isinstance(form, Codebook)
    weight, hessian = drawn(rows, columns, seed=seed), damped(moments(inputs(100, columns, seed)), 0.01)
    params = form.fit(weight)
    codes, _ = form.quantize(weight, params, torch.arange(columns))
    units = form.units((rows, columns))
    coded = Coded(form, weight, hessian, params["scale"], codes.reshape(*units, form.stages).long())
    return coded, params["codebook"]


def slow_error(layer: Coded, weight: Tensor) -> float:
    difference = (layer.target - weight).double()
    return float((difference @ layer.hessian.double() @ difference.T).trace())


@pytest.mark.parametrize("text", MORE)
def test_what_is_decoded_on_the_way_is_what_the_format_decodes(text: str) -> None:
    layer, book = started(text)
    codes = layer.codes.flatten(1).to(torch.uint8)
    packed = layer.form.pack(codes, layer.form.params(book, layer.scale, 8), (5, 8))
    assert torch.allclose(layer.unit(book) * layer.scale, packed.dequantize(), atol=1e-6)
    assert layer.error(book) == pytest.approx(slow_error(layer, packed.dequantize()), rel=1e-4)


@pytest.mark.parametrize("text", MORE)
def test_refitted_entries_are_the_least_squares_solution(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve_vq, "SOLVED", 1e-7)
    monkeypatch.setattr(solve_vq, "MOST_STEPS", 300)
    monkeypatch.setattr(codebooks, "stored", lambda book: book)
    layers = [started(text, seed)[0] for seed in (0, 1)]
    book = started(text)[1]
    found = solve_vq.refit_books(layers, book)
    columns, wanted = [], []
    for layer in layers:  # the error is |Lᵀ (w − Ŵ)|², Ŵ linear in the entries: one column of the system for each
        root = torch.linalg.cholesky(layer.hessian.double())
        ones = torch.eye(book.numel()).reshape(-1, *book.shape)
        columns.append(torch.stack([((layer.unit(one) * layer.scale).double() @ root).flatten() for one in ones], 1))
        wanted.append((layer.target.double() @ root).flatten())
    system, right = torch.cat(columns), torch.cat(wanted)
    exact = torch.linalg.lstsq(system, right, driver="gelsd").solution
    least = float((system @ exact - right).square().sum())
    assert solve_vq.total(layers, found) == pytest.approx(least, rel=1e-3)
    assert least < 0.98 * solve_vq.total(layers, book)


@pytest.mark.parametrize("text", MORE)
def test_refitted_scales_are_better_than_any_near_them(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve_vq, "_kept", lambda wanted, before: torch.where(wanted > 0, wanted, before))
    layer, book = started(text)
    found = solve_vq.refit_scale(layer, book)
    best = found.error(book)
    assert best <= layer.error(book)
    if layer.form.scale == "none":
        assert found is layer
        return
    assert best < layer.error(book)
    for place, step in itertools.product(range(found.scale.numel()), (0.99, 1.01)):
        other = found.scale.clone()
        other.view(-1)[place] *= step
        assert replace(found, scale=other).error(book) >= best * (1 - 1e-4)


@pytest.mark.parametrize("text", MORE)
def test_a_sweep_ends_where_the_vector_decided_last_cannot_be_bettered(text: str) -> None:
    layer, book = started(text)
    found = solve_vq.reassign(layer, book, beam=16)
    best = found.error(book)
    assert best < layer.error(book)
    for row in range(found.codes.shape[0]):
        for codes in itertools.product(range(4), repeat=layer.form.stages):
            other = found.codes.clone()
            other[row, -1] = torch.tensor(codes)
            assert replace(found, codes=other).error(book) >= best * (1 - 1e-5)


@pytest.mark.parametrize("text", MORE)
def test_the_error_never_rises_over_sweeps(text: str) -> None:
    layers = [started(text, seed, rows=12, columns=16)[0] for seed in (0, 1)]
    book = started(text, 0, rows=12, columns=16)[1]
    errors = [solve_vq.total(layers, book)]
    found, refitted = solve_vq.improve(layers, book, 5, beam=1, told=errors.append)
    errors.append(solve_vq.total(found, refitted))
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("text", MORE)
def test_what_comes_out_is_what_storage_holds(text: str) -> None:
    layer, book = started(text)
    (found,), refitted = solve_vq.improve([layer], book, 2, beam=4)
    assert torch.equal(refitted, refitted.half().float())
    assert torch.equal(found.scale, found.scale.half().float())
    assert bool((found.scale > 0).all())


def slow_compensate(layer: Coded, book: Tensor, order: list[int], metric: bool) -> Tensor:
    """Vector by vector: all codes tried, the best real-valued values of the columns that are left found anew."""
    form, size = layer.form, layer.form.step
    hessian, weight = layer.hessian.double(), layer.target.double().clone()
    sums = torch.stack([book[0][a] + book[1][b] for a, b in itertools.product(range(4), repeat=2)])
    done, left = torch.zeros_like(weight), list(order)
    for at in range(0, len(order), size):
        now, left = order[at : at + size], left[size:]
        whole = hessian[now][:, now]
        cross, rest = hessian[now][:, left], hessian[left][:, left]
        inner = whole - cross @ torch.linalg.solve(rest, cross.T) if left else whole
        judge = inner if metric else torch.eye(size, dtype=torch.float64)
        vectors = form.vectors((weight / layer.scale)[:, now].float())[:, 0].double()
        gaps = vectors[:, None] - sums.double()
        errors = torch.einsum("nks,st,nkt->nk", gaps, judge, gaps) if form.axis == "in" else gaps.square().sum(-1)
        best = sums[errors.argmin(1)]
        factor = layer.scale if layer.scale.shape[1] == 1 else layer.scale[:, now]
        done[:, now] = (form.weights(best[:, None], len(weight)) * factor).double()
        if left:
            gap = weight[:, now] - done[:, now]
            weight[:, left] += gap @ torch.linalg.solve(rest, cross.T).T
    return done.float()


@pytest.mark.parametrize("metric", [True, False])
@pytest.mark.parametrize("text", AXES)
def test_codes_are_compensated_as_with_all_later_columns_solved_for_anew(text: str, metric: bool) -> None:
    layer, book = started(text, rows=6, columns=12)
    columns = solve.column_order(layer.hessian, layer.form.step, "static")
    factor, _, _ = inverse_factor(layer.hessian, 1e-9, columns)
    found = solve_vq.compensate(layer, book, factor, columns, 16, metric)
    expected = slow_compensate(layer, book[0], columns.tolist(), metric)
    assert torch.allclose(found.unit(book) * found.scale, expected, atol=1e-5)


def test_vectors_of_one_on_a_uniform_grid_give_what_gptq_gives() -> None:
    """VPTQ with such codebooks is GPTQ."""
    grid = parse_format("int4(channel)")
    weight, hessian = drawn(6, 16), moments(inputs(100, 16))
    params = grid.fit(weight)
    columns = solve.column_order(hessian, 1, "static")
    factor, damp, _ = inverse_factor(hessian, 0.01, columns)
    known = solve.compensate(weight[:, columns], factor, grid.rounder(params, columns))[:, torch.argsort(columns)]
    packed = grid.pack(known, params, (6, 16))
    form = parse_format("codebook(vector=1, entries=16, stages=1, out)")
    assert isinstance(form, Codebook)
    expected = packed.dequantize()
    for row in range(6):  # a scale for each row: each row by itself, with its own grid as the entries
        scale = params["scale"].float().flatten()[row]
        book = ((torch.arange(16.0) - 8) * scale).reshape(1, 1, 16, 1)
        start = Coded(form, weight[row : row + 1], damped(hessian, damp), torch.ones(1, 1), torch.empty(0))
        found = solve_vq.compensate(start, book, factor, columns, 1, True)
        assert torch.allclose(found.unit(book), expected[row : row + 1], atol=1e-5)


def test_nan_stops_the_solve() -> None:
    layer, book = started(AXES[0])
    broken = replace(layer, target=layer.target.clone().fill_(float("nan")))
    with pytest.raises(InputError, match="NaN or infinite"):
        solve_vq.improve([broken], book, 1, 4)
