"""Interval estimates for quality and speed: pure functions on arrays, no torch, no clock, no random numbers.

Tokens of a window and neighbouring rounds of a timing run are correlated, so neither is counted as independent:
quality is clustered by window, speed goes through batch means.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as distributions

from compress.records import Interval, SpeedVerdict

MIN_ROUNDS = 10  # fewer rounds give neither a trimmed tail nor five batches of two
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


def speedup(log_ratios: ArrayLike, level: float = 0.95) -> tuple[float, Interval]:
    """exp of the 10 % trimmed mean of ln(baseline / variant) per round, and an interval that holds under correlation.

    log_ratios: (rounds,) in the order measured, rounds >= 10. Standard error of a trimmed mean: that of the mean of
    the winsorised values over 1 - 2 trim (Tukey and McLaughlin 1963). The winsorised values go into 8 to 20 batches
    of neighbours (about √rounds). Batches that short are still correlated, so their lag-1 correlation, never taken
    below 0, widens the interval once more: under AR(1) noise of 0.6 coverage goes from 84 to 90 % at 20 rounds and
    from 92 to 95 % at 60, for about 15 % more width under white noise (simulated, 4000 and 3000 runs each).
    """
    rounds = _rounds(log_ratios)
    count = len(rounds)
    cut = int(TRIM * count)
    ordered = np.sort(rounds)
    centre = float(ordered[cut : count - cut].mean())
    winsorised = np.clip(rounds, ordered[cut], ordered[count - cut - 1])
    means = np.array([batch.mean() for batch in np.array_split(winsorised, batch_count(count))])
    error = _correlated_error(means) / (1 - 2 * cut / count)
    half = _t_quantile(level, len(means) - 1) * error
    return math.exp(centre), Interval(low=math.exp(centre - half), high=math.exp(centre + half), level=level)


def batch_count(rounds: int) -> int:
    """About √rounds batches, 8 to 20, of at least two rounds each."""
    return min(max(8, min(20, round(math.sqrt(rounds)))), rounds // 2)


def half_width(interval: Interval) -> float:
    """Half the width of a ratio's interval on the log scale: 0.02 is about ±2 %."""
    return math.log(interval.high / interval.low) / 2


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


def _correlated_error(means: NDArray[np.float64]) -> float:
    """Standard error of the mean of (batches,) neighbours: the plain one times √((1+r)/(1-r)), r in [0, 0.8]."""
    deviations = means - means.mean()
    squares = float(deviations @ deviations)
    if squares == 0:
        return 0.0
    batches = len(means)
    bias = 1 / batches  # the sample's own mean pulls its lag-1 correlation down by about this
    correlation = min(max(float(deviations[1:] @ deviations[:-1]) / squares + bias, 0.0), 0.8)
    plain = math.sqrt(squares / (batches - 1) / batches)
    return plain * math.sqrt((1 + correlation) / (1 - correlation))


def _t_quantile(level: float, degrees: int) -> float:
    if not 0 < level < 1:
        raise ValueError(f"an interval's level must lie between 0 and 1, found {level}")
    return float(distributions.t.ppf(0.5 + level / 2, degrees))
