"""Ranges for static activation grids, read off a histogram: pure functions.

A range is (low, high) with low ≤ 0 ≤ high, as floats. The histogram's entries count as spread evenly in their bins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from compress.maths import grid
from compress.maths.histogram import Histogram

Observer = Literal["minmax", "percentile", "mse", "entropy"]
Error = Callable[[float, float], float]
"""What a range costs: low, high → expected squared error of an entry."""

# The search narrows both ends in these steps, then each alone; no range is narrower than the last of them.
SHARES = tuple(step / 100 for step in range(100, 1, -1))
# Bins of |x| by which candidate thresholds of `entropy` differ.
STRIDE = 8


def extremes(histogram: Histogram) -> tuple[float, float]:
    """The smallest and the largest entry, widened to hold zero."""
    return min(histogram.low, 0.0), max(histogram.high, 0.0)


def percentile(histogram: Histogram, share: float, symmetric: bool) -> tuple[float, float]:
    """The range that holds `share` percent of the entries.

    symmetric: of the magnitudes; otherwise each end leaves out as many. A bin counts as a whole, so a little more may
    be held, and never more than the extremes.
    """
    low, high = extremes(histogram)
    edges = _edges(histogram)
    if symmetric:
        reach = float(edges[len(edges) // 2 :][_first(_magnitudes(histogram), share / 100) + 1])
        return max(low, -reach), min(high, reach)
    held = 1 - (1 - share / 100) / 2
    top = float(edges[_first(histogram.counts, held) + 1])
    bottom = float(edges.flip(0)[_first(histogram.counts.flip(0), held) + 1])
    return max(low, min(bottom, 0.0)), min(high, max(top, 0.0))


def least_error(histogram: Histogram, error: Error, symmetric: bool) -> tuple[float, float]:
    """The range of least expected squared error among narrowed extremes.

    Both ends are narrowed together in 1 % steps, then, unless the grid is symmetric, each end alone.
    """
    low, high = extremes(histogram)
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    both = min(SHARES, key=lambda share: error(low * share, high * share))
    if symmetric:
        return low * both, high * both
    top = min(SHARES, key=lambda share: error(low * both, high * share))
    bottom = min(SHARES, key=lambda share: error(low * share, high * top))
    return low * bottom, high * top


def uniform_error(histogram: Histogram, scale: float, zero: float, bits: int) -> float:
    """Expected squared error of an entry on the grid (code − zero) · scale, codes 0 … 2^bits − 1.

    In closed form: over one step around a grid point the error's square adds up to scale³ / 12, beyond the first and
    the last point it grows with the distance.
    """
    edges = _edges(histogram)
    places = edges / scale + zero  # in steps; the points are the whole numbers
    inside = places.clamp(-0.5, 2**bits - 0.5)
    nearest = torch.round(inside)
    total = nearest / 12 + (inside - nearest) ** 3 / 3
    beyond = places - inside  # from half a step past the last point on
    total = total + torch.sign(beyond) * ((beyond.abs() + 0.5) ** 3 - 0.125) / 3
    mean = (total[1:] - total[:-1]) / (places[1:] - places[:-1]) * scale**2
    return float((mean * histogram.counts).sum() / histogram.counts.sum())


def rounding_error(histogram: Histogram, rounded: Callable[[Tensor], Tensor]) -> float:
    """The same for any rounding, (n,) float32 → (n,) float32, with all entries in the middles of their bins."""
    centers = histogram.centers.float()
    error = (rounded(centers) - centers).double() ** 2
    return float((error * histogram.counts).sum() / histogram.counts.sum())


def entropy(histogram: Histogram, levels: int) -> tuple[float, float]:
    """The threshold that loses least information, as TensorRT calibrates (Migacz, "8-bit inference with TensorRT",
    GTC 2017): of the magnitudes below each candidate, with what lies beyond added to the last bin, against the same
    merged into `levels` bins, the least Kullback-Leibler divergence. The first bin counts as many as the second, as in
    NVIDIA's calibrators: zeros, of which a ReLU makes plenty, are exact on every grid and would drown the rest.
    """
    low, high = extremes(histogram)
    counts = _magnitudes(histogram)
    counts[0] = counts[1]
    last = int(counts.nonzero().max()) + 1 if bool(counts.any()) else levels
    # only the candidate that ends with the last entry is sure to be among the strides
    candidates = [*range(levels, last, STRIDE), max(last, levels)]
    best = min(candidates, key=lambda count: divergence(counts, count, levels))
    reach = best * histogram.limit / len(counts)
    return max(low, -reach), min(high, reach)


def divergence(counts: Tensor, kept: int, levels: int) -> float:
    """Kullback-Leibler divergence of the first `kept` of (bins,) counts from their merger into `levels` levels.

    A level spreads its counts evenly over those of its bins that hold any. Infinite where outliers fall into a last
    bin that the merger leaves empty.
    """
    head = counts[:kept]
    level = torch.arange(kept) * levels // kept
    filled = (head > 0).double()
    sums = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, head)
    bins = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, filled)
    merged = torch.where(head > 0, (sums / bins.clamp(min=1))[level], 0.0)
    truth = head.clone()
    truth[-1] += counts[kept:].sum()
    if not bool(merged.any()):
        return float("inf")
    truth, merged = truth / truth.sum(), merged / merged.sum()
    found = torch.where(truth > 0, truth * torch.log(truth / merged), 0.0)
    return float(found.sum())


def clipped(histogram: Histogram, low: float, high: float) -> float:
    """Share of the entries in bins wholly outside a range."""
    edges = _edges(histogram)
    outside = (edges[1:] < low) | (edges[:-1] > high)
    return float(histogram.counts[outside].sum() / histogram.counts.sum())


def integer_range(
    histogram: Histogram, observer: Observer, bits: int, scheme: str, share: float
) -> tuple[float, float]:
    """A range for an integer grid of `bits` bits, `symmetric` or `asymmetric`; share: percent, of `percentile`."""
    symmetric = scheme == "symmetric"
    if observer == "minmax":
        return extremes(histogram)
    if observer == "percentile":
        return percentile(histogram, share, symmetric)
    if observer == "entropy":
        return entropy(histogram, 2 ** (bits - 1))

    def error(low: float, high: float) -> float:
        scale, zero = grid.activation_grid(torch.tensor(low), torch.tensor(high), bits, scheme)
        return uniform_error(histogram, float(scale), float(zero), bits)

    return least_error(histogram, error, symmetric)


def _edges(histogram: Histogram) -> Tensor:
    """(bins + 1,) float64."""
    count = len(histogram.counts)
    return torch.linspace(-1, 1, count + 1, dtype=torch.float64) * histogram.limit


def _magnitudes(histogram: Histogram) -> Tensor:
    """(bins / 2,) counts of |x|."""
    negative, positive = histogram.counts.chunk(2)
    return positive + negative.flip(0)


def _first(counts: Tensor, share: float) -> int:
    """The first bin up to which `share` of the entries lie."""
    reached = counts.cumsum(0) >= share * counts.sum() * (1 - 1e-12)
    return int(reached.int().argmax())
