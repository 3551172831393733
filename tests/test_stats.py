"""Interval estimates against slow, obvious twins, and by simulation where the claim is coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats as distributions

from compress.records import Interval
from compress.stats import intervals


def ar1(rng: np.random.Generator, runs: int, rounds: int, phi: float, scale: float) -> NDArray[np.float64]:
    """(runs, rounds) of stationary AR(1) noise with mean 0."""
    series = rng.standard_normal((runs, rounds)) * scale
    series[:, 0] /= math.sqrt(1 - phi**2)
    for i in range(1, rounds):
        series[:, i] += phi * series[:, i - 1]
    return series


def ratio(low: float, high: float) -> Interval:
    return Interval(low=low, high=high)


def test_cluster_interval_matches_a_twin_that_writes_the_variance_out() -> None:
    sums, counts = [12.0, 7.5, 30.0, 4.0], [5, 3, 11, 2]
    mean = sum(sums) / sum(counts)
    squares = sum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    half = distributions.t.ppf(0.95, 3) * math.sqrt(4 / 3 * squares) / sum(counts)

    value, interval = intervals.cluster_interval(sums, counts, level=0.9)

    assert value == pytest.approx(mean)
    assert interval is not None
    assert (interval.low, interval.high, interval.level) == pytest.approx((mean - half, mean + half, 0.9))


def test_cluster_interval_of_equal_clusters_is_the_usual_t_interval_of_their_means() -> None:
    means = np.random.default_rng(0).normal(2.0, 0.3, 12)
    _, interval = intervals.cluster_interval(means * 64, np.full(12, 64))
    usual = distributions.t.interval(0.95, 11, loc=means.mean(), scale=means.std(ddof=1) / math.sqrt(12))
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx(usual)


def test_cluster_interval_agrees_with_a_bootstrap_over_clusters_of_unequal_size() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(20, 200, 80)
    sums = counts * (2 + 0.3 * rng.standard_normal(80))
    chosen = rng.integers(0, 80, (4000, 80))
    resampled = sums[chosen].sum(1) / counts[chosen].sum(1)

    _, interval = intervals.cluster_interval(sums, counts)

    assert interval is not None
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert interval.high - interval.low == pytest.approx(high - low, rel=0.1)


def test_one_cluster_has_a_value_and_no_interval() -> None:
    assert intervals.cluster_interval([6.0], [4]) == (1.5, None)


def test_a_value_that_is_not_finite_has_no_interval_and_does_not_raise() -> None:
    assert intervals.cluster_interval([1.0, math.inf], [1, 1]) == (math.inf, None)
    value, interval = intervals.paired_difference([1.0, math.inf], [1.0, math.inf], [1, 1])
    assert math.isnan(value)
    assert interval is None


@pytest.mark.parametrize(("sums", "counts"), [([], []), ([1.0], [1, 2]), ([1.0, 2.0], [1, 0]), ([[1.0]], [[1]])])
def test_clusters_of_odd_shape_or_without_members_are_refused(sums: list[float], counts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"cluster|count"):
        intervals.cluster_interval(sums, counts)


def test_a_level_outside_zero_to_one_is_refused() -> None:
    with pytest.raises(ValueError, match="level"):
        intervals.cluster_interval([1.0, 2.0], [1, 1], level=95)


def test_a_paired_difference_sees_what_two_separate_intervals_cannot() -> None:
    rng = np.random.default_rng(2)
    counts = np.full(30, 100)
    baseline = 100 * rng.normal(3, 0.5, 30)
    compressed = baseline + 100 * rng.normal(0.02, 0.01, 30)

    value, interval = intervals.paired_difference(compressed, baseline, counts)
    _, alone = intervals.cluster_interval(compressed, counts)

    assert value == pytest.approx((compressed - baseline).sum() / counts.sum())
    assert interval is not None
    assert alone is not None
    assert 0 < interval.low < 0.02 < interval.high
    assert alone.high - alone.low > 10 * (interval.high - interval.low)


def test_transform_maps_both_ends_and_swaps_them_for_a_falling_map() -> None:
    interval = Interval(low=1.0, high=2.0, level=0.9)
    assert intervals.transform(interval, math.exp) == Interval(low=math.e, high=math.exp(2), level=0.9)
    assert intervals.transform(interval, lambda x: -x) == Interval(low=-2.0, high=-1.0, level=0.9)
    assert intervals.transform(None, math.exp) is None


def test_the_speedup_is_scipys_trimmed_mean_of_the_log_ratios() -> None:
    series = np.random.default_rng(3).standard_t(2, 57) * 0.1 + 0.3
    value, interval = intervals.speedup(series)
    assert value == pytest.approx(math.exp(distributions.trim_mean(series, 0.1)))
    assert interval.low < value < interval.high
    assert math.sqrt(interval.low * interval.high) == pytest.approx(value)


def test_the_speedup_interval_matches_a_twin_with_loops() -> None:
    series = list(np.random.default_rng(4).normal(0.2, 0.05, 64))
    ordered = sorted(series)
    winsorised = [min(max(x, ordered[6]), ordered[-7]) for x in series]
    squares = 0.0
    for wave in range(1, 7):  # 0.4 * 64^(2/3) = 6.4
        height = sum(x * math.cos(math.pi * wave * (i + 0.5) / 64) for i, x in enumerate(winsorised))
        squares += 2 / 64 * height**2
    error = math.sqrt(squares / 6 / 64) / (1 - 12 / 64)

    _, interval = intervals.speedup(series)

    assert intervals.half_width(interval) == pytest.approx(distributions.t.ppf(0.975, 6) * error)


def test_the_expected_width_is_that_of_the_interval_on_average_and_varies_less() -> None:
    for phi in (0.0, 0.5):
        runs = ar1(np.random.default_rng(11), 300, 60, phi, 0.05)
        widths = np.array(
            [[intervals.expected_half_width(run), intervals.half_width(intervals.speedup(run)[1])] for run in runs]
        )
        expected, own = widths.T
        assert expected.mean() == pytest.approx(own.mean(), rel=0.15)
        if phi == 0:
            assert expected.std() < 0.75 * own.std()
    assert intervals.expected_half_width(np.zeros(20)) == 0


def test_the_waves_are_orthonormal_and_blind_to_a_constant() -> None:
    waves = intervals._cosines(37, 5)
    assert waves @ waves.T == pytest.approx(np.eye(5))
    assert waves.sum(axis=1) == pytest.approx(0)


def test_a_few_wild_rounds_hardly_move_the_speedup() -> None:
    series = np.random.default_rng(5).normal(math.log(1.5), 0.01, 60)
    series[[7, 30, 31]] += 3.0
    value, interval = intervals.speedup(series)
    assert value == pytest.approx(1.5, rel=0.01)
    assert interval.high < 1.6


@pytest.mark.parametrize(("rounds", "phi", "at_least"), [(60, 0.6, 0.9), (20, 0.6, 0.85), (60, 0.0, 0.93)])
def test_the_speedup_interval_covers_the_truth_under_autocorrelated_noise(
    rounds: int, phi: float, at_least: float
) -> None:
    runs = ar1(np.random.default_rng(6), 400, rounds, phi, 0.05) + math.log(1.3)
    found = [intervals.speedup(run)[1] for run in runs]
    covered = np.mean([interval.low <= 1.3 <= interval.high for interval in found])
    assert covered >= at_least


def test_a_plain_t_interval_would_fail_on_that_noise() -> None:
    runs = ar1(np.random.default_rng(6), 400, 60, 0.6, 0.05)
    half = distributions.t.ppf(0.975, 59) * runs.std(axis=1, ddof=1) / math.sqrt(60)
    assert np.mean(np.abs(runs.mean(axis=1)) <= half) < 0.8


def test_rounds_without_any_noise_give_a_point() -> None:
    value, interval = intervals.speedup(np.full(20, math.log(2)))
    assert value == pytest.approx(2)
    assert intervals.half_width(interval) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("series", [[0.1] * 9, [[0.1] * 20], [0.1] * 19 + [math.inf], [math.nan] * 20])
def test_too_few_or_broken_rounds_are_refused(series: list[float]) -> None:
    with pytest.raises(ValueError, match=r"rounds|finite"):
        intervals.speedup(series)
    with pytest.raises(ValueError, match=r"rounds|finite"):
        intervals.drift(series)


def test_waves_grow_more_slowly_than_rounds_and_are_never_fewer_than_four() -> None:
    assert [intervals.wave_count(n) for n in (10, 20, 30, 60, 120, 240, 1000)] == [4, 4, 4, 6, 10, 15, 40]


@pytest.mark.parametrize(
    ("interval", "control", "word"),
    [
        ((1.20, 1.30), (0.99, 1.01), "faster"),
        ((0.70, 0.80), (0.99, 1.01), "slower"),
        ((0.995, 1.005), (0.999, 1.001), "same"),
        ((1.002, 1.008), (0.999, 1.001), "same"),  # certain, and too small to matter
        ((0.98, 1.02), (0.97, 1.02), "same"),  # within the noise floor
        ((0.80, 1.20), (0.70, 1.30), "inconclusive"),  # so noisy that everything would be within the floor
        ((0.97, 1.05), (0.99, 1.01), "inconclusive"),
        ((1.02, 1.06), (0.99, 1.03), "inconclusive"),  # above 1, and no larger than the noise
        ((1.02, 1.06), (0.95, 1.00), "inconclusive"),  # noise counts in either direction
        ((0.94, 0.98), (0.99, 1.03), "inconclusive"),
    ],
)
def test_the_verdict_word_follows_from_the_interval_and_the_noise_floor(
    interval: tuple[float, float], control: tuple[float, float], word: str
) -> None:
    assert intervals.speed_verdict(ratio(*interval), ratio(*control)) == word


def test_a_wider_margin_turns_a_small_gain_into_the_same() -> None:
    assert intervals.speed_verdict(ratio(1.02, 1.04), ratio(0.99, 1.01)) == "faster"
    assert intervals.speed_verdict(ratio(1.02, 1.04), ratio(0.99, 1.01), delta=0.05) == "same"


def test_a_verdict_on_a_ratio_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        intervals.speed_verdict(ratio(0.0, 1.0), ratio(0.99, 1.01))


def test_warm_up_ends_only_once_two_windows_agree() -> None:
    cooling = [2.0, 1.8, 1.6, 1.5, 1.4, 1.3, 1.2, 1.1, 1.05, 1.02]
    assert not intervals.is_stationary(cooling)
    assert not intervals.is_stationary([1.0] * 9)
    assert intervals.is_stationary([*cooling, *[1.0] * 10])
    assert intervals.is_stationary([1.0] * 9 + [50.0])  # one hiccup is not a trend
    with pytest.raises(ValueError, match="window"):
        intervals.is_stationary([1.0], window=0)


def test_stationarity_compares_the_last_window_with_the_one_before_it_only() -> None:
    for step, settled in ((0.019, True), (0.021, False), (-0.019, True), (-0.021, False)):
        assert intervals.is_stationary([9.0] * 3 + [1.0] * 3 + [1 + step] * 3, window=3) is settled


def test_drift_finds_a_trend_and_leaves_noise_alone() -> None:
    noise = np.random.default_rng(7).standard_normal(60) * 0.01
    trend = np.linspace(0, 0.05, 60)
    assert intervals.drift(noise) > 0.05
    assert intervals.drift(noise + trend) < 1e-6
    assert intervals.drift(np.zeros(20)) == 1.0


def test_drift_is_the_rank_correlation_written_out() -> None:
    series = np.random.default_rng(8).standard_normal(40)
    ranks = [sum(y < x for y in series) for x in series]
    rho = 1 - 6 * sum((r - i) ** 2 for i, r in enumerate(ranks)) / (40 * (40**2 - 1))
    t = rho * math.sqrt(38 / (1 - rho**2))
    assert intervals.drift(series) == pytest.approx(2 * distributions.t.sf(abs(t), 38))
