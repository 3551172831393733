"""How much of each layer to prune, by how many outliers it has: pure functions on tensors and numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

Parts = Callable[[], Iterable[Tensor]]
"""Gives tensors one after the other, the same ones at each call, so that no two need be in memory."""


def outlier_share(parts: Parts, times: float) -> float:
    """Share of all entries of some tensors ≥ 0 that exceed `times` their common mean (OWL, Yin et al. 2024, arXiv
    2310.05175, §3.2). Sums in float64."""
    total, count = 0.0, 0
    for part in parts():
        total, count = total + float(part.double().sum()), count + part.numel()
    limit = times * total / count
    return sum(int((part > limit).sum()) for part in parts()) / count


def spread(wish: float, outliers: Sequence[float | None], sizes: Sequence[int], bound: float) -> list[float]:
    """Sparsity of each layer: the more outliers, the less, at most `bound` away from the wish, which their mean hits
    exactly, weighed by the layers' sizes.

    OWL (arXiv 2310.05175, §3.2) takes densities in proportion to the shares of outliers, within ± λ. Its program
    stretches them to a range of 2 λ and then moves that onto the mean, which lets single layers leave the bound; here
    the layer farthest from the mean is at the bound. None for a layer of which nothing is known: it gets the wish.
    """
    known = [(found, size) for found, size in zip(outliers, sizes, strict=True) if found is not None]
    whole = sum(size for _, size in known)
    mean = sum(found * size for found, size in known) / whole if whole else 0.0
    away = [0.0 if found is None else found - mean for found in outliers]
    farthest = max(map(abs, away), default=0.0)
    scale = bound / farthest if farthest > 1e-12 else 0.0
    return [wish - scale * each for each in away]


def whole_counts(shares: Sequence[float], units: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """How many units of each layer are pruned: what rounding to whole units leaves is made up for by the next layer, so
    that over all of them no more than half a unit is left. None loses all or nothing.

    Args: units: of each layer, ≥ 2; sizes: weights in each, a multiple of its units.
    """
    counts, owed = [], 0.0
    for share, number, size in zip(shares, units, sizes, strict=True):
        each = size // number
        wanted = share * size + owed
        counts.append(min(max(round(wanted / each), 1), number - 1))
        owed = wanted - counts[-1] * each
    return counts
