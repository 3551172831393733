"""Ranges read off a histogram, each against a slow twin that sees the values themselves."""

import math

import pytest
import torch
from torch import Tensor

from compress.maths import grid, observers
from compress.maths.histogram import BINS, Histogram


def values(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    bulk = torch.randn(20_000, generator=generator)
    return {
        "normal": bulk,
        "outliers": torch.cat([bulk, torch.tensor([40.0, -25.0])]),
        "positive": bulk.relu() + 0.01 * bulk.abs(),
        "shifted": bulk * 0.5 - 2.0,
    }[kind]


def seen(kind: str) -> Histogram:
    histogram = Histogram()
    for part in values(kind).split(7000):
        histogram.add(part)
    return histogram


KINDS = ("normal", "outliers", "positive", "shifted")


@pytest.mark.parametrize("kind", KINDS)
def test_the_extremes_are_those_of_the_values_and_hold_zero(kind: str) -> None:
    low, high = observers.extremes(seen(kind))
    assert (low, high) == (min(0.0, float(values(kind).min())), max(0.0, float(values(kind).max())))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [90.0, 99.9, 100.0])
def test_a_percentile_leaves_out_what_sorting_the_values_would(kind: str, share: float) -> None:
    histogram, data = seen(kind), values(kind)
    width = 2 * histogram.limit / BINS
    tail = (1 - share / 100) / 2
    low, high = observers.percentile(histogram, share, symmetric=False)
    assert low == pytest.approx(min(0.0, float(data.quantile(tail))), abs=1.5 * width)
    assert high == pytest.approx(max(0.0, float(data.quantile(1 - tail))), abs=1.5 * width)
    least, most = observers.percentile(histogram, share, symmetric=True)
    reach = float(data.abs().quantile(share / 100))
    assert max(-least, most) == pytest.approx(min(reach, float(data.abs().max())), abs=1.5 * width)
    assert float(((data >= least) & (data <= most)).float().mean()) >= share / 100 - 1e-9


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_the_expected_error_is_that_of_values_spread_evenly_in_their_bins(bits: int, scheme: str) -> None:
    histogram = seen("outliers")
    for low, high in ((-30.0, 40.0), (-2.0, 1.0), (0.0, 0.7)):
        scale, zero = grid.activation_grid(torch.tensor(low), torch.tensor(high), bits, scheme)
        parts = 64
        offsets = ((torch.arange(parts, dtype=torch.float64) + 0.5) / parts - 0.5) * (2 * histogram.limit / BINS)
        spread = histogram.centers[:, None] + offsets
        error = (grid.quantize_activation(spread, scale.double(), zero.double(), bits) - spread) ** 2
        expected = float((error.mean(1) * histogram.counts).sum() / histogram.counts.sum())
        found = observers.uniform_error(histogram, float(scale), float(zero), bits)
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_the_range_of_least_error_is_as_good_on_the_values_as_trying_out_all_of_them(kind: str, scheme: str) -> None:
    data = values(kind)

    def error(low: float, high: float) -> float:
        scale, zero = grid.activation_grid(torch.tensor(low), torch.tensor(high), 4, scheme)
        return float(((grid.quantize_activation(data, scale, zero, 4) - data) ** 2).mean())

    low, high = observers.integer_range(seen(kind), "mse", 4, scheme, 99.99)
    least, most = observers.extremes(seen(kind))
    steps = [step / 25 for step in range(1, 26)]
    if scheme == "symmetric":
        best = min(error(-max(-least, most) * share, max(-least, most) * share) for share in steps)
    else:
        best = min(error(least * first, most * second) for first in steps for second in steps)
    assert error(low, high) <= 1.05 * best
    assert kind != "outliers" or error(low, high) < 0.5 * error(least, most)


def test_an_error_of_any_rounding_is_taken_at_the_middles_of_the_bins() -> None:
    histogram = seen("normal")
    expected = sum(
        float(count) * (float(center) - round(float(center))) ** 2
        for count, center in zip(histogram.counts, histogram.centers, strict=True)
    )
    found = observers.rounding_error(histogram, torch.round)
    assert found == pytest.approx(expected / 20_000, rel=1e-5)


def slow_divergence(counts: list[float], kept: int, levels: int) -> float:
    truth = counts[:kept]
    merged = [0.0] * kept
    for level in range(levels):
        members = [place for place in range(kept) if place * levels // kept == level]
        filled = [place for place in members if truth[place] > 0]
        for place in filled:
            merged[place] = sum(truth[member] for member in members) / len(filled)
    truth = [*truth[:-1], truth[-1] + sum(counts[kept:])]
    if not sum(merged):
        return math.inf
    total = 0.0
    for first, second in zip(truth, merged, strict=True):
        if first > 0:
            p, q = first / sum(truth), second / sum(merged)
            total += math.inf if q == 0 else p * math.log(p / q)
    return total


@pytest.mark.parametrize("kept", [16, 23, 40, 64])
def test_the_divergence_is_that_of_the_definition(kept: int) -> None:
    generator = torch.Generator().manual_seed(1)
    counts = torch.poisson(torch.linspace(9, 0, 64).relu() ** 1.5, generator=generator).double()
    for case in (counts, counts.roll(-3)):
        found = observers.divergence(case, kept, 16)
        assert found == pytest.approx(slow_divergence(case.tolist(), kept, 16), rel=1e-9, abs=1e-12)


def test_the_threshold_of_least_information_lost_cuts_outliers_and_keeps_what_fits() -> None:
    histogram = Histogram()
    histogram.add(torch.cat([values("normal"), torch.tensor([12.0, -10.0])]))
    low, high = observers.entropy(histogram, 128)
    assert 2.0 < high < 5.0 and low == -high
    histogram = Histogram()
    histogram.add(torch.rand(50_000, generator=torch.Generator().manual_seed(0)))
    low, high = observers.entropy(histogram, 128)
    assert low == 0.0 and high > 0.98
    counts = observers._magnitudes(histogram)
    counts[0] = counts[1]
    found = observers.divergence(counts, round(high * len(counts) / histogram.limit), 128)
    candidates = range(128, len(counts) + 1, observers.STRIDE)
    assert found == min(observers.divergence(counts, kept, 128) for kept in candidates)


def test_zeros_do_not_pull_the_threshold_of_least_information_lost_down() -> None:
    data = values("normal").relu()
    with_zeros, without = Histogram(), Histogram()
    with_zeros.add(torch.cat([data, torch.zeros(100_000)]))
    without.add(data[data > 0])
    assert observers.entropy(with_zeros, 128)[1] == pytest.approx(observers.entropy(without, 128)[1], rel=0.05)


def test_the_share_that_is_clipped_is_counted() -> None:
    histogram = Histogram()
    histogram.add(torch.tensor([-3.0, 0.1, 0.2, 0.3, 3.5]))
    assert observers.clipped(histogram, -1.0, 1.0) == pytest.approx(0.4)
    assert observers.clipped(histogram, -4.0, 4.0) == 0.0


def test_inputs_that_are_all_zero_have_a_range_that_holds_them() -> None:
    histogram = Histogram()
    histogram.add(torch.zeros(10))
    for observer in ("minmax", "percentile", "mse", "entropy"):
        for scheme in ("symmetric", "asymmetric"):
            low, high = observers.integer_range(histogram, observer, 8, scheme, 99.99)
            assert -1e-20 <= low <= 0 <= high <= 1e-20
