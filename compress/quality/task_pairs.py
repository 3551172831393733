"""Per-sample scores of two models → paired figures: pure functions.

Means of both models over other samples would hide what pairing shows: most samples are answered alike, and only those
that are not say anything (arXiv 2411.00640). Nothing here knows the harness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats as distributions

from compress.records import Gate, Interval
from compress.records.task import TaskScore
from compress.stats.intervals import cluster_interval, paired_difference
from compress.stats.proportions import mcnemar, paired_change, proportion

LEVEL, POWER = 0.95, 0.8


@dataclass(frozen=True, eq=False)
class Pairs:
    """One metric of one task: (samples,) values of both models, in one order. weights: of a value that is a sum over
    words or bytes, how many; ones otherwise. chance: what guessing would score."""

    task: str
    metric: str
    filter: str
    baseline: NDArray[np.float64]
    variant: NDArray[np.float64]
    weights: NDArray[np.float64]
    is_nats: bool = False
    higher: bool = True
    chance: float | None = None

    @property
    def is_right_or_wrong(self) -> bool:
        """Whether all values are 0 or 1."""
        both = np.concatenate([self.baseline, self.variant])
        return not self.is_nats and bool(np.isin(both, (0.0, 1.0)).all())


def score_pairs(found: Sequence[Pairs]) -> tuple[TaskScore, ...]:
    """A record each, with Holm's correction over all of them."""
    scores = [_right_or_wrong(pairs) if pairs.is_right_or_wrong else _scored(pairs) for pairs in found]
    known = [place for place, score in enumerate(scores) if score.p_value is not None]
    for place, p in zip(known, holm([scores[place].p_value or 0.0 for place in known]), strict=True):
        scores[place] = scores[place].model_copy(update={"p_holm": p})
    return tuple(scores)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values after Holm (1979): the i-th smallest of m times m - i + 1, none below one before it, at most 1."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def ratio_interval(over: NDArray[np.float64], under: NDArray[np.float64]) -> tuple[float, Interval | None]:
    """Σ over / Σ under of paired samples (n,), and its t-interval by linearisation (Cochran, ch. 6). Σ under > 0."""
    count, total = len(over), float(under.sum())
    value = float(over.sum()) / total
    if count < 2:
        return value, None
    residuals = over - value * under
    error = math.sqrt(count / (count - 1) * float(residuals @ residuals)) / total
    half = float(distributions.t.ppf(0.5 + LEVEL / 2, count - 1)) * error
    return value, Interval(low=value - half, high=value + half, level=LEVEL)


def loss_gates(scores: Sequence[TaskScore], max_loss: float) -> tuple[Gate, ...]:
    """Whether each score is worse by no more than `max_loss` at the worse end of its interval. One without an interval
    does not meet its gate."""
    gates = []
    for score in scores:
        low, high = (score.interval.low, score.interval.high) if score.interval else (-math.inf, math.inf)
        worst = max(0.0, -low if score.better == "higher" else high)
        gates.append(Gate(name=f"loss of {score.name}", bound=max_loss, found=worst, met=worst <= max_loss))
    return tuple(gates)


def _right_or_wrong(pairs: Pairs) -> TaskScore:
    count = len(pairs.baseline)
    gained, lost = (int((first > second).sum()) for first, second in _both_ways(pairs))
    change, interval = paired_change(gained, lost, count, LEVEL)
    quantile = float(distributions.norm.ppf(0.5 + LEVEL / 2))
    _, own = proportion(int(pairs.baseline.sum()), count, LEVEL)
    made = _record(pairs, change, interval, _detectable(interval, quantile), own.low)
    return made.model_copy(
        update={"gained": gained, "lost": lost, "p_value": mcnemar(gained, lost), "test": "exact McNemar"}
    )


def _both_ways(
    pairs: Pairs,
) -> tuple[tuple[NDArray[np.float64], NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64]]]:
    return (pairs.variant, pairs.baseline), (pairs.baseline, pairs.variant)


def _scored(pairs: Pairs) -> TaskScore:
    change, interval = paired_difference(pairs.variant, pairs.baseline, pairs.weights, LEVEL)
    if interval is None:
        return _record(pairs, change, None, None, -math.inf)
    quantile = float(distributions.t.ppf(0.5 + LEVEL / 2, len(pairs.baseline) - 1))
    error = (interval.high - interval.low) / 2 / quantile
    extreme = math.inf if error == 0 else abs(change) / error
    p = 1.0 if change == 0 else 2 * float(distributions.t.sf(extreme, len(pairs.baseline) - 1))
    _, own = cluster_interval(pairs.baseline, pairs.weights, LEVEL)
    made = _record(pairs, change, interval, _detectable(interval, quantile), own.low if own else -math.inf)
    return made.model_copy(update={"p_value": p, "test": "paired t"})


def _detectable(interval: Interval, quantile: float) -> float:
    """The change whose interval of this width leaves 0 out with the probability POWER."""
    half = (interval.high - interval.low) / 2
    return half / quantile * (quantile + float(distributions.norm.ppf(POWER)))


def _record(
    pairs: Pairs, change: float, interval: Interval | None, detectable: float | None, baseline_low: float
) -> TaskScore:
    total = float(pairs.weights.sum())
    made = TaskScore(
        task=pairs.task,
        metric=pairs.metric,
        filter=pairs.filter,
        unit="nats" if pairs.is_nats else "score",
        better="higher" if pairs.higher else "lower",
        samples=len(pairs.baseline),
        baseline=float(pairs.baseline.sum()) / total,
        variant=float(pairs.variant.sum()) / total,
        change=change,
        interval=interval,
        detectable=detectable,
        chance=pairs.chance,
    )
    floor = pairs.chance or 0.0
    # a score that may as well be chance has nothing to recover
    if pairs.is_nats or not pairs.higher or baseline_low <= floor or made.baseline <= floor:
        return made
    ratio, bounds = ratio_interval(pairs.variant, pairs.baseline)
    in_percent = bounds and Interval(low=100 * bounds.low, high=100 * bounds.high, level=bounds.level)
    over = 100 * (made.variant - floor) / (made.baseline - floor) if pairs.chance is not None else None
    return made.model_copy(
        update={"recovery": 100 * ratio, "recovery_interval": in_percent, "recovery_over_chance": over}
    )
