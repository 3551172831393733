"""Interval estimates for quality and speed: pure functions on arrays, no torch, no clock, no random numbers.

Tokens of a window and neighbouring rounds of a timing run are correlated, so neither is counted as independent:
quality is clustered by window, the error of a speed-up is read off its slow waves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as distributions

from compress.records import Interval, SpeedVerdict

MIN_ROUNDS = 10  # fewer rounds give neither a trimmed tail nor slow waves to tell from fast ones
TRIM = 0.1  # share cut from each end (research/profiling_ux_reliability.md §1.2: 54 rounds where the mean needs 157)
WIDEST_SAME = 0.05  # a noise floor wider than this says nothing about sameness


def cluster_interval(sums: ArrayLike, counts: ArrayLike, level: float = 0.95) -> tuple[float, Interval | None]:
    """Ratio-of-sums mean over clusters, e.g. NLL per token with windows as clusters, and its t-interval.

    sums, counts: (clusters,); counts > 0. Variance: linearised ratio estimator, k/(k-1) Σ(s_i - R n_i)² / (Σ n_i)²
    (Cochran, Sampling Techniques, ch. 6). No interval from one cluster or for a value that is not finite.
    """
    totals, sizes = _clusters(sums, counts)
    clusters, size = len(totals), float(sizes.sum())
    with np.errstate(invalid="ignore"):  # inf - inf of a broken model is nan, which fails every gate
        value = float(totals.sum() / size)
    if clusters < 2 or not math.isfinite(value):
        return value, None
    residuals = totals - value * sizes
    error = math.sqrt(clusters / (clusters - 1) * float(residuals @ residuals)) / size
    half = _t_quantile(level, clusters - 1) * error
    return value, Interval(low=value - half, high=value + half, level=level)


def paired_difference(
    sums_a: ArrayLike, sums_b: ArrayLike, counts: ArrayLike, level: float = 0.95
) -> tuple[float, Interval | None]:
    """Per-token difference a - b on the same tokens, clustered by window; all arguments (clusters,)."""
    a, _ = _clusters(sums_a, counts)
    b, _ = _clusters(sums_b, counts)
    with np.errstate(invalid="ignore"):
        return cluster_interval(a - b, counts, level)


def transform(interval: Interval | None, fn: Callable[[float], float]) -> Interval | None:
    """The interval of fn(value), for a monotone fn such as exp; a falling fn swaps the ends. None stays None."""
    if interval is None:
        return None
    ends = fn(interval.low), fn(interval.high)
    return Interval(low=min(ends), high=max(ends), level=interval.level)


def not_negative(value: float) -> float:
    """For `transform`: the end of an interval of what cannot be below 0."""
    return max(value, 0.0)


def fraction(value: float) -> float:
    """For `transform`: the end of an interval of what lies in 0 to 1."""
    return min(max(value, 0.0), 1.0)


def speedup(log_ratios: ArrayLike, level: float = 0.95, loads: ArrayLike | None = None) -> tuple[float, Interval]:
    """exp of the 10 % trimmed mean of ln(baseline / variant) per round, and an interval that holds under correlation.

    log_ratios: (rounds,) in the order measured, rounds >= 10; loads: (rounds,) which load of the arms each was made
    with, where there were several: what is alike within one then counts once per load. Standard error of a trimmed
    mean: that of the mean of the winsorised values over 1 - 2 trim (Tukey and McLaughlin 1963), from the slow waves in
    their sums by load (`_slow_error`): neighbouring rounds of one machine are alike, and what is alike over rounds
    shows as slow waves. With so few loads that their sums have no more waves, it is the t-interval that takes each load
    as one value. Coverage under autocorrelation, spikes, drift and loads: benchmarks/timing/simulate.py.
    """
    rounds = _rounds(log_ratios)
    centre, winsorised, kept = _trimmed(rounds)
    sums = _sums(winsorised, loads)
    waves = min(wave_count(len(rounds)), len(sums) - 1)
    half = _t_quantile(level, waves) * _slow_error(sums, len(rounds), waves) / kept
    return math.exp(centre), Interval(low=math.exp(centre - half), high=math.exp(centre + half), level=level)


def expected_half_width(log_ratios: ArrayLike, level: float = 0.95, loads: ArrayLike | None = None) -> float:
    """What half of `speedup`'s interval would be on average, on the log scale, from all rounds' (with `loads`: all
    loads') spread and lag-1 correlation (of AR(1), between 0 and 0.8).

    The interval's own width has few degrees of freedom, so it is small by chance now and then, and whoever stops timing
    at that moment keeps intervals that are too narrow: coverage falls to 92 % under white noise. This one has as many
    as there are rounds; stopping where both are small keeps 94 % (benchmarks/timing/simulate.py, `stopping`).
    """
    rounds = _rounds(log_ratios)
    _, winsorised, kept = _trimmed(rounds)
    sums = _sums(winsorised, loads)
    count, squares = len(sums), float(sums @ sums)
    if squares == 0:
        return 0.0
    bias = 1 / count  # the sample's own mean pulls its lag-1 correlation down by about this
    correlation = min(max(float(sums[1:] @ sums[:-1]) / squares + bias, 0.0), 0.8)
    error = math.sqrt(squares * count / (count - 1) * (1 + correlation) / (1 - correlation)) / len(rounds)
    return _t_quantile(level, min(wave_count(len(rounds)), count - 1)) * error / kept


def load_spread(log_ratios: ArrayLike, loads: ArrayLike) -> float | None:
    """Standard deviation of ln(speed-up) from one load to the next, less what differs from round to round within them.

    log_ratios, loads: (rounds,). One-way random effects (Searle, Casella and McCulloch, Variance Components, ch. 3) of
    the winsorised rounds, over 1 - 2 trim as in `speedup`. None from fewer than two loads, or where no load has two
    rounds.
    """
    _, values, kept = _trimmed(_rounds(log_ratios))
    _, places = np.unique(np.asarray(loads), return_inverse=True)
    sizes = np.bincount(places)
    count, total = len(sizes), len(values)
    if count < 2 or count == total:
        return None
    means = np.bincount(places, values) / sizes
    between = float(sizes @ (means - values.mean()) ** 2) / (count - 1)
    within = float(np.sum((values - means[places]) ** 2)) / (total - count)
    size = (total - float(sizes @ sizes) / total) / (count - 1)
    return math.sqrt(max(0.0, between - within) / size) / kept


def wave_count(rounds: int) -> int:
    """0.4 rounds^(2/3) slow waves, at least 4 (Lazarus, Lewis, Stock and Watson 2018): the degrees of freedom."""
    return max(4, round(0.4 * math.pow(rounds, 2 / 3)))


def half_width(interval: Interval) -> float:
    """Half the width of a ratio's interval on the log scale: 0.02 is about ±2 %."""
    return math.log(interval.high / interval.low) / 2


def combine_processes(ratios: Sequence[float], intervals: Sequence[Interval]) -> tuple[float, Interval]:
    """Geometric mean of the ratios of several processes, and the wider of two intervals for it.

    Between: t-interval of the logarithms, one value per process, which holds whatever differs from one process to the
    next (placement in memory, choice of kernels). Within: the processes' own intervals, by squares, which guards
    against a few processes that agree by chance. ratios, intervals: (processes,), at least 3, of one level.
    """
    count = len(ratios)
    if count < 3 or count != len(intervals):
        raise ValueError(f"needs at least 3 processes with an interval each, found {count} and {len(intervals)}")
    logs = np.log(np.asarray(ratios, dtype=np.float64))
    level, centre = intervals[0].level, float(logs.mean())
    between = _t_quantile(level, count - 1) * float(logs.std(ddof=1)) / math.sqrt(count)
    within = math.sqrt(sum(half_width(interval) ** 2 for interval in intervals)) / count
    half = max(between, within)
    return math.exp(centre), Interval(low=math.exp(centre - half), high=math.exp(centre + half), level=level)


def noise_floor(control: Interval) -> float:
    """The ratio >= 1 that the baseline shows against itself, taken in both directions."""
    return max(1.0, control.high, 1 / control.low)


def speed_verdict(interval: Interval, control: Interval, delta: float = 0.01) -> SpeedVerdict:
    """One of four words for a speed-up whose interval is known, given the baseline against itself.

    same: both ends within 1 ± delta, or within a noise floor of at most 5 % (a wider one would call anything the
    same). It comes first: a certain 0.5 % is still no claim worth making. faster, slower: the whole interval is
    beyond 1 and beyond the noise floor, so no difference smaller than the control's interval is claimed.
    """
    if min(interval.low, control.low) <= 0:
        raise ValueError(f"speed_verdict: a ratio's interval must be positive, found {interval} against {control}")
    floor = noise_floor(control)
    if 1 - delta <= interval.low and interval.high <= 1 + delta:
        return "same"
    if floor <= 1 + WIDEST_SAME and 1 / floor <= interval.low and interval.high <= floor:
        return "same"
    if interval.low > floor:
        return "faster"
    if interval.high < 1 / floor:
        return "slower"
    return "inconclusive"


def is_stationary(samples: ArrayLike, window: int = 5, tolerance: float = 0.02) -> bool:
    """Whether the medians of the last two windows of (calls,) seconds differ by less than `tolerance`, relatively."""
    calls = np.asarray(samples, dtype=np.float64)
    if window < 1:
        raise ValueError(f"is_stationary: window must be at least 1, found {window}")
    if calls.size < 2 * window:
        return False
    before = float(np.median(calls[-2 * window : -window]))
    after = float(np.median(calls[-window:]))
    return abs(after - before) <= tolerance * before


def drift(log_ratios: ArrayLike) -> float:
    """P value of Spearman's correlation of (rounds,) log ratios with their round; a warning, never a correction."""
    rounds = _rounds(log_ratios)
    if np.ptp(rounds) == 0:
        return 1.0  # no ranks to correlate
    return float(distributions.spearmanr(np.arange(len(rounds)), rounds).pvalue)


def calls_needed(share: float, level: float = 0.95) -> int:
    """Calls so that with probability `level` at least two of them lie beyond the percentile `share` of (0, 1).

    Binomial bound: 1 - sⁿ - n (1 - s) sⁿ⁻¹ >= level, that is 8, 46, 93 and 473 for 0.5, 0.9, 0.95 and 0.99.
    """
    if not 0 < share < 1:
        raise ValueError(f"a percentile's share must lie between 0 and 1, found {share}")
    count = 2
    while share**count + count * (1 - share) * share ** (count - 1) > 1 - level:
        count += 1
    return count


def percentile(samples: ArrayLike, share: float) -> float | None:
    """The smallest of (calls,) samples that at least `share` of them do not exceed; None from fewer than
    `calls_needed`, where it would mostly lie below the true one."""
    values = np.asarray(samples, dtype=np.float64)
    if values.size < calls_needed(share):
        return None
    return float(np.quantile(values, share, method="inverted_cdf"))


def _clusters(sums: ArrayLike, counts: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    totals, sizes = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if totals.ndim != 1 or totals.shape != sizes.shape or totals.size == 0:
        raise ValueError(f"clusters need sums and counts of one shape (clusters,), found {totals.shape}, {sizes.shape}")
    if not np.all(sizes > 0):
        raise ValueError(f"every cluster needs a positive count, found {sizes.min()}")
    return totals, sizes


def _rounds(log_ratios: ArrayLike) -> NDArray[np.float64]:
    rounds = np.asarray(log_ratios, dtype=np.float64)
    if rounds.ndim != 1 or rounds.size < MIN_ROUNDS:
        raise ValueError(f"a speed-up needs at least {MIN_ROUNDS} rounds in one dimension, found shape {rounds.shape}")
    if not np.all(np.isfinite(rounds)):
        raise ValueError("a log ratio is not finite: a block took no time, so the clock is too coarse for it")
    return rounds


def _trimmed(rounds: NDArray[np.float64]) -> tuple[float, NDArray[np.float64], float]:
    """The trimmed mean of (rounds,), their winsorised values, and the share that the trimming keeps."""
    count = len(rounds)
    cut = int(TRIM * count)
    ordered = np.sort(rounds)
    winsorised = np.clip(rounds, ordered[cut], ordered[count - cut - 1])
    return float(ordered[cut : count - cut].mean()), winsorised, 1 - 2 * cut / count


def _sums(values: NDArray[np.float64], loads: ArrayLike | None) -> NDArray[np.float64]:
    """Deviations from the mean of (rounds,) values, summed by load in the order measured; alone without `loads`, or
    where there was one only."""
    deviations: NDArray[np.float64] = values - values.mean()
    if loads is None:
        return deviations
    places = np.unique(np.asarray(loads), return_inverse=True)[1]
    if places.shape != values.shape:
        raise ValueError(f"each of {len(values)} rounds needs the number of its load, found {places.shape}")
    return deviations if places.max() == 0 else np.asarray(np.bincount(places, deviations), dtype=np.float64)


def _slow_error(sums: NDArray[np.float64], rounds: int, waves: int) -> float:
    """Standard error of the mean of `rounds` correlated values, given as the sums of their deviations in neighbouring
    groups (groups,): from the mean square of the sums' `waves` slowest cosines.

    A sum of correlated values varies as their spectrum at frequency 0, which the slowest waves estimate; those of white
    noise are independent, so the t-interval with `waves` degrees of freedom is exact there (Müller 2007). All waves
    together hold the whole variance: with groups - 1 of them this is the linearised error of clustered values.
    """
    heights = _cosines(len(sums), waves) @ sums
    return math.sqrt(float(heights @ heights) / waves * len(sums)) / rounds


@lru_cache(maxsize=64)
def _cosines(rounds: int, waves: int) -> NDArray[np.float64]:
    """(waves, rounds) orthonormal cosines of 1/2, 1, 3/2, … periods, each orthogonal to a constant; waves < rounds."""
    middles = (np.arange(rounds) + 0.5) / rounds
    return np.asarray(math.sqrt(2 / rounds) * np.cos(np.pi * np.outer(np.arange(1, waves + 1), middles)))


@lru_cache(maxsize=256)
def _t_quantile(level: float, degrees: int) -> float:
    if not 0 < level < 1:
        raise ValueError(f"an interval's level must lie between 0 and 1, found {level}")
    return float(distributions.t.ppf(0.5 + level / 2, degrees))
