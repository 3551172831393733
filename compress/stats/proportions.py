"""Intervals of proportions of independent trials, plain and paired: pure functions of counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats as distributions

from compress.records import Interval


def proportion(hits: int, trials: int, level: float = 0.95) -> tuple[float, Interval]:
    """hits / trials and its score interval (Wilson 1927; Agresti and Coull 1998): never outside 0 to 1, and of some
    width even where all or none hit. trials ≥ 1."""
    if not 0 <= hits <= trials or trials < 1:
        raise ValueError(f"{hits} hits of {trials} trials are no proportion")
    z, value = _quantile(level), hits / trials
    whole = 1 + z * z / trials
    centre = (value + z * z / (2 * trials)) / whole
    half = z * math.sqrt(value * (1 - value) / trials + z * z / (4 * trials * trials)) / whole
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    # at either end the bound is exact, which rounding may miss by an ulp
    return value, Interval(low=0.0 if hits == 0 else low, high=1.0 if hits == trials else high, level=level)


def paired_change(gained: int, lost: int, trials: int, level: float = 0.95) -> tuple[float, Interval]:
    """(gained − lost) / trials: the change of a proportion over the same trials, and its interval.

    gained: trials that only the second arm hit; lost: those that only the first did. Only these discordant pairs count
    (McNemar 1947). The interval is Wald's with half a trial added to each of the four cells (Agresti and Min 2005,
    Statistics in Medicine 24), which keeps its level where discordant pairs are few, and has a width where there are
    none. trials ≥ 1.
    """
    if min(gained, lost) < 0 or gained + lost > trials or trials < 1:
        raise ValueError(f"{gained} gained and {lost} lost of {trials} trials do not fit together")
    whole, more, less = trials + 2, gained + 0.5, lost + 0.5
    centre = (more - less) / whole
    error = math.sqrt((more + less) - (more - less) ** 2 / whole) / whole
    half = _quantile(level) * error
    interval = Interval(low=max(-1.0, centre - half), high=min(1.0, centre + half), level=level)
    return (gained - lost) / trials, interval


def mcnemar(gained: int, lost: int) -> float:
    """P value of McNemar's exact test: whether as many trials turned right as wrong, of independent ones.

    Twice the smaller tail of a binomial of one half over the discordant trials (McNemar 1947, in its exact form);
    1 where there are none.
    """
    if min(gained, lost) < 0:
        raise ValueError(f"{gained} gained and {lost} lost: counts begin at 0")
    if gained + lost == 0:
        return 1.0
    return min(1.0, 2 * float(distributions.binom.cdf(min(gained, lost), gained + lost, 0.5)))


def clustered_mcnemar(gained: Sequence[int], lost: Sequence[int]) -> float | None:
    """P value of McNemar's test where trials come in clusters (windows of text), within which they are correlated.

    gained, lost: per cluster. With D their difference, (ΣD)²/ΣD² has one degree of freedom (Durkalski et al. 2003,
    Statistics in Medicine 22, with equal weights); clusters of one trial give McNemar's own (b - c)²/(b + c). 1 where
    nothing changed, None of fewer than two clusters.
    """
    if len(gained) != len(lost):
        raise ValueError(f"{len(gained)} and {len(lost)} clusters do not fit together")
    if len(gained) < 2:
        return None
    differences = [more - less for more, less in zip(gained, lost, strict=True)]
    squares = sum(difference**2 for difference in differences)
    if squares == 0:
        return 1.0
    return float(distributions.chi2.sf(sum(differences) ** 2 / squares, 1))


def _quantile(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"an interval's level must lie between 0 and 1, found {level}")
    return float(distributions.norm.ppf(0.5 + level / 2))
