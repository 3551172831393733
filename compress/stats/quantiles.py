"""Quantiles of clustered samples and their intervals: pure functions on arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from compress.records.base import Interval
from compress.stats.intervals import cluster_interval

BEYOND = 5
"""Samples that must lie beyond a quantile on average, or it says more of one of them than of the model."""


def is_supported(count: int, share: float) -> bool:
    """Whether that many samples give this quantile: 50 do for 0.9, 500 for 0.99 and for 0.01."""
    return count * min(share, 1 - share) >= BEYOND - 1e-9


def needed(share: float) -> int:
    """The fewest samples that give it."""
    return int(np.ceil(BEYOND / min(share, 1 - share) - 1e-9))


def clustered_quantile(
    clusters: Sequence[NDArray[np.float64]], share: float, level: float = 0.95
) -> tuple[float, Interval | None]:
    """A quantile of all samples, interpolated between two of them, and its interval.

    clusters: the samples of each, (n,); share: 0 < share < 1. Interval: the clustered one of the share of samples at
    or below the quantile, read off as quantiles again (Woodruff 1952, JASA 47). None from one cluster, where the upper
    end lies beyond all samples or the lower before them, and for values that are not finite.
    """
    pooled = np.concatenate(list(clusters))
    if not np.isfinite(pooled).all():
        return _of_infinite(pooled, share), None
    value = float(np.quantile(pooled, share))
    below = [float(np.count_nonzero(samples <= value)) for samples in clusters]
    found, interval = cluster_interval(below, [len(samples) for samples in clusters], level)
    if interval is None:
        return value, None
    # around the share itself: ties and interpolation move the found one off it
    low, high = share - (found - interval.low), share + (interval.high - found)
    if low <= 0 or high >= 1:
        return value, None
    ends = np.quantile(pooled, [low, high])
    return value, Interval(low=float(ends[0]), high=float(ends[1]), level=level)


def _of_infinite(pooled: NDArray[np.float64], share: float) -> float:
    """nan where a sample is; else the sample above, since between two infinite ones nothing is interpolated."""
    return float("nan") if np.isnan(pooled).any() else float(np.quantile(pooled, share, method="higher"))
