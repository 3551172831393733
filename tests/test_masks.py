"""Masks from scores against twins that look at one weight after the other, and pruning with compensation."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from compress.errors import UsageError
from compress.maths.hessian import damped, inverse_factor, weighted_error
from compress.maths.masks import Pattern, keep_largest, relative_importance
from compress.maths.pruning import column_order, prune, refit
from helpers.gptq_twin import inputs, layer, moments

SHAPE = (12, 24)
TEXTS = ("layer", "row", "2:4", "4:8", "1:3", "4x8", "3x2")


def scores(ties: bool = False, shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    return (drawn * 4).floor() / 4 if ties else drawn


def slow_keep(scores: np.ndarray, text: str, sparsity: float) -> np.ndarray:
    """Units that compete, each with its cells, sorted in Python."""
    rows, columns = scores.shape
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    units = {cell: [cell] for cell in cells}
    rivals: dict[object, list] = {}
    if "x" in text:
        high, wide = map(int, text.split("x"))
        units = {}
        for row, column in cells:
            units.setdefault((row // high, column // wide), []).append((row, column))
    for key in units:
        group = key[0] if text == "row" else 0
        if ":" in text:
            group = (key[0], key[1] // int(text.split(":")[1]))
        rivals.setdefault(group, []).append(key)
    kept = np.zeros_like(scores, dtype=bool)
    for keys in rivals.values():
        count = int(text.split(":")[0]) if ":" in text else len(keys) - round(sparsity * len(keys))
        value = {key: sum(float(scores[cell]) ** 2 for cell in units[key]) for key in keys}
        for key in sorted(keys, key=lambda key: (-value[key], key))[:count]:
            for cell in units[key]:
                kept[cell] = True
    return kept


@pytest.mark.parametrize("ties", [False, True], ids=["all unlike", "many alike"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_mask_is_that_of_a_twin_that_sorts_one_by_one(text: str, ties: bool) -> None:
    pattern, given = Pattern.parse(text), scores(ties and "x" not in text)
    for sparsity in (0.1, 0.5, 0.77):
        found = pattern.keep(given, pattern.kept(SHAPE, sparsity))
        assert np.array_equal(found.numpy(), slow_keep(given.double().numpy(), text, sparsity))


@pytest.mark.parametrize("text", TEXTS)
def test_as_many_are_pruned_as_was_asked_even_where_all_scores_are_alike(text: str) -> None:
    pattern = Pattern.parse(text)
    kept = pattern.keep(torch.ones(SHAPE), pattern.kept(SHAPE, 0.3))
    high, wide = pattern.size if pattern.kind == "block" else (1, 1)
    expected = {
        "row": 12 * (24 - round(0.3 * 24)),
        "layer": 288 - round(0.3 * 288),
        "n:m": 288 * pattern.size[0] // pattern.size[1],
        "block": (288 // (high * wide) - round(0.3 * (288 // (high * wide)))) * high * wide,
    }
    assert int(kept.sum()) == expected[pattern.kind]
    assert str(pattern) == text


@pytest.mark.parametrize("ties", [False, True], ids=["all unlike", "many alike"])
def test_each_row_may_keep_a_count_of_its_own(ties: bool) -> None:
    given, counts = scores(ties), torch.arange(12)[:, None] * 2
    counts[1] = 24
    found = keep_largest(given, counts)
    assert found.sum(1).tolist() == counts[:, 0].tolist()
    alone = [keep_largest(given[row : row + 1], int(counts[row])) for row in range(12)]
    assert torch.equal(found, torch.cat(alone))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rows", "not a pattern"),
        ("4:4", "0 < N < M"),
        ("0:4", "0 < N < M"),
        ("0x4", "at least one row"),
        ("2:4:8", "not a pattern"),
    ],
)
def test_a_pattern_that_means_nothing_is_refused_with_what_does(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Pattern.parse(text)


@pytest.mark.parametrize(
    ("text", "told"), [("2:5", "runs of 5 input"), ("4x5", "runs of 5 input"), ("5x4", "5 output")]
)
def test_a_pattern_that_does_not_divide_a_weight_is_refused(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Pattern.parse(text).check(SHAPE)


def test_relative_importance_is_that_of_its_formula_and_takes_rows_of_zeros() -> None:
    weight = layer().float_weight()
    weight[2] = 0.0
    found = relative_importance(weight)
    for row, column in [(0, 0), (3, 7), (5, 23), (2, 4)]:
        size = abs(float(weight[row, column]))
        expected = size / float(weight[:, column].abs().sum()) + size / (float(weight[row].abs().sum()) or 1.0)
        assert float(found[row, column]) == pytest.approx(expected, rel=1e-5)


def slow_prune(
    weight: np.ndarray, hessian: np.ndarray, text: str, sparsity: float, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Column by column, with the inverse of the columns that are left computed anew for each."""
    weight, columns = weight.copy(), weight.shape[1]
    kept = np.zeros_like(weight, dtype=bool)
    pattern = Pattern.parse(text)
    corner = [np.linalg.inv(hessian[at:, at:])[0, 0] ** 0.5 for at in range(columns)]
    span = pattern.size[1] if ":" in text else block
    for at in range(columns):
        if at % span == 0:
            cost = np.abs(weight[:, at:]) / np.array(corner[at:])
            if ":" in text:
                chosen = slow_keep(cost[:, :span], text, sparsity)
            elif text == "row":
                total = columns - round(sparsity * columns)
                chosen = np.zeros_like(cost, dtype=bool)
                for row in range(len(weight)):
                    order = np.argsort(-cost[row], kind="stable")[: total - int(kept[row, :at].sum())]
                    chosen[row, order] = True
            else:
                total = weight.size - round(sparsity * weight.size) - int(kept[:, :at].sum())
                chosen = np.zeros(cost.size, dtype=bool)
                chosen[np.argsort(-cost.flatten(), kind="stable")[:total]] = True
                chosen = chosen.reshape(cost.shape)
            kept[:, at : at + span] = chosen[:, :span]
        inverse = np.linalg.inv(hessian[at:, at:])
        error = np.where(kept[:, at], 0.0, weight[:, at]) / inverse[0, 0]
        weight[:, at:] -= error[:, None] * inverse[0]
        weight[~kept[:, at], at] = 0.0
    return weight, kept


@pytest.mark.parametrize("text", ["layer", "row", "2:4"])
def test_pruning_with_compensation_equals_the_column_by_column_twin(text: str) -> None:
    weight, hessian = layer().float_weight(), damped(moments(inputs()), 0.01)
    factor = inverse_factor(hessian, 0.0)[0]
    found, mask = prune(weight, factor, Pattern.parse(text), 0.5, block=8)
    expected, kept = slow_prune(weight.double().numpy(), hessian.double().numpy(), text, 0.5, 8)
    assert np.array_equal(mask.numpy(), kept)
    assert np.allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)
    assert not found[~mask].any()


@pytest.mark.parametrize("text", TEXTS)
def test_pruning_with_compensation_takes_exactly_as_many_as_a_mask_from_scores(text: str) -> None:
    weight, pattern = torch.randn(12, 24, generator=torch.Generator().manual_seed(0)), Pattern.parse(text)
    factor = inverse_factor(moments(inputs()), 0.01)[0]
    for block in (8, 128):
        mask = prune(weight, factor, pattern, 0.6, block)[1]
        assert int(mask.sum()) == int(pattern.keep(weight.abs(), pattern.kept(SHAPE, 0.6)).sum())
        runs = mask.reshape(12, -1, pattern.size[1]).sum(-1)
        assert pattern.kind != "n:m" or bool((runs == pattern.size[0]).all())
        assert pattern.kind != "row" or bool((mask.sum(1) == 24 - round(0.6 * 24)).all())


def test_solving_again_reaches_the_least_squares_values_of_the_mask() -> None:
    weight, hessian = layer().float_weight(), damped(moments(inputs()), 0.01)
    mask = Pattern.parse("row").keep(weight.abs(), 12)
    found = refit(weight, weight.where(mask, 0.0), mask, hessian, 200)
    assert not found[~mask].any()
    for row in range(6):
        on = mask[row]
        best = torch.linalg.solve(hessian[on][:, on].double(), hessian[on].double() @ weight[row].double())
        assert torch.allclose(found[row, on].double(), best, rtol=1e-2, atol=1e-2)


def test_no_round_of_solving_again_makes_the_error_larger() -> None:
    weight, hessian = layer().float_weight(), damped(moments(inputs()), 0.01)
    mask = Pattern.parse("2:4").keep(weight.abs(), 2)
    errors = [weighted_error(refit(weight, weight * mask, mask, hessian, n) - weight, hessian) for n in range(20)]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]


def test_weak_columns_come_first_and_of_runs_the_strong_ones() -> None:
    power = torch.tensor([3.0, 1.0, 9.0, 2.0, 5.0, 5.0, 0.0, 4.0])
    assert column_order(power, Pattern.parse("layer")).tolist() == [6, 1, 3, 0, 7, 4, 5, 2]
    assert column_order(power, Pattern.parse("2:4")).tolist() == list(range(8))
    assert column_order(power.flip(0), Pattern.parse("2:4")).tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    assert column_order(power, Pattern.parse("2x2")).tolist() == list(range(8))
