"""Token by token, how a compressed model differs from its original: pure functions on the scores of windows.

Everything is paired (the same token in both models) and clustered by window. Information is in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from compress.quality.metrics import Figures
from compress.quality.token_scores import Floats, TokenScores
from compress.records import Interval
from compress.records.quality import Curve, CurvePoint, Flips, WorstSample
from compress.stats.intervals import cluster_interval, fraction, not_negative, transform
from compress.stats.proportions import clustered_mcnemar
from compress.stats.quantiles import clustered_quantile, is_supported, needed

QUANTILES = {"kl_median": 0.5, "kl_p90": 0.9, "kl_p99": 0.99}
POSITION_BINS = 8
CONFIDENCE_BINS = 10
WORST = 20
CONTEXT = 24
"""Tokens that are kept before each of the worst."""
Scores = Sequence[TokenScores]
Values = Callable[[TokenScores], NDArray[np.generic]]
Found = tuple[float, Interval | None]


def token_mean(scores: Scores, values: Values) -> Found:
    """Mean over all tokens of something per token, (T,), and its interval."""
    sums = [float(np.sum(values(score), dtype=np.float64)) for score in scores]
    return cluster_interval(sums, [len(score) for score in scores])


def token_share(scores: Scores, values: Values) -> Found:
    """As `token_mean` of what lies in 0 to 1, with an interval that does too."""
    value, interval = token_mean(scores, values)
    return value, transform(interval, fraction)


def second_half_perplexity(losses: Sequence[Floats]) -> Found | None:
    """Perplexity of the second half of each window, as llama.cpp's tool counts it: of n tokens, those that follow
    token n // 2 (counted from 0) and later ones. losses: (T,) per window, T = n - 1. None where no window has any."""
    halves = [loss[(len(loss) + 1) // 2 :] for loss in losses]
    halves = [half for half in halves if len(half)]
    if not halves:
        return None
    value, interval = cluster_interval([float(half.sum()) for half in halves], [len(half) for half in halves])
    return _exp(value), transform(interval, _exp)


def fidelity_figures(scores: Scores) -> tuple[Figures, list[str]]:
    """Figures that compare with the original, beside those of `quality.summarize`; and a note for each quantile that
    the tokens are too few for.

    kl_median, kl_p90, kl_p99, kl_max (which has no interval) over tokens; top5_overlap; true_token_change and its root
    mean square: of the probability of the true token; entropy_change: above 0, the compressed model is less decided;
    token_accuracy_change in percentage points; flips: share of tokens whose top answer turned right or wrong.
    """
    found, notes = _quantiles(scores)
    found["kl_max"] = float(np.max([score.kl.max() for score in scores])), None
    found["top5_overlap"] = token_share(scores, lambda score: score.overlap)
    found["true_token_change"] = token_mean(scores, _true_change)
    value, interval = token_mean(scores, lambda score: _true_change(score) ** 2)
    found["true_token_change_rms"] = _root(value), transform(interval, _root)
    found["entropy_change"] = token_mean(scores, lambda score: score.entropy - score.reference_entropy)
    value, interval = token_mean(scores, lambda score: score.right * 1.0 - score.reference_right)
    found["token_accuracy_change"] = 100 * value, transform(interval, lambda share: 100 * share)
    found["flips"] = token_share(scores, lambda score: score.right != score.reference_right)
    return found, notes


def flips_of(scores: Scores) -> Flips:
    """Tokens whose top answer turned right, and wrong. Tokens of a window are correlated, so the test is McNemar's
    adjusted for clusters, which is that of McNemar where every window has one token."""
    gained = [int(np.sum(score.right & ~score.reference_right)) for score in scores]
    lost = [int(np.sum(score.reference_right & ~score.right)) for score in scores]
    return Flips(
        gained=sum(gained),
        lost=sum(lost),
        samples=sum(len(score) for score in scores),
        p_value=clustered_mcnemar(gained, lost),
        test="McNemar's, windows as clusters",
    )


def divergence_curves(scores: Scores, protocol: str) -> tuple[Curve, ...]:
    """Mean KL by the position in the window (what a cache accumulates) and by the original's confidence in its top
    token (what compression hurts most). Parts without tokens are left out."""
    longest = max(len(score) for score in scores)
    positions = np.unique(np.linspace(0, longest, POSITION_BINS + 1).astype(int)).astype(np.float64)
    shares = np.linspace(0, 1, CONFIDENCE_BINS + 1)
    kl = [score.kl for score in scores]
    by_place = binned(kl, [np.arange(len(score), dtype=np.float64) for score in scores], positions)
    by_share = binned(kl, [score.reference_confidence for score in scores], shares)
    return (
        _curve("kl_by_position", "position in the window", "mean KL", "nats/token", protocol, by_place),
        _curve("kl_by_confidence", "the original's confidence", "mean KL", "nats/token", protocol, by_share),
    )


def binned(values: Sequence[Floats], x: Sequence[Floats], edges: Floats) -> tuple[CurvePoint, ...]:
    """Mean of values where edges[i] <= x < edges[i + 1] (the last part has its upper end too), clustered.

    values, x: (T,) per window; edges (bins + 1,) ascending, around all of x. Intervals over the windows that have any
    in that part.
    """
    bins = len(edges) - 1
    sums, counts = np.zeros((len(values), bins)), np.zeros((len(values), bins))
    for row, (each, at) in enumerate(zip(values, x, strict=True)):
        place = np.clip(np.searchsorted(edges, at, side="right") - 1, 0, bins - 1)
        sums[row] = np.bincount(place, weights=each, minlength=bins)
        counts[row] = np.bincount(place, minlength=bins)
    points = []
    for one in range(bins):
        kept = counts[:, one] > 0
        if not kept.any():
            continue
        value, interval = cluster_interval(sums[kept, one], counts[kept, one])
        low, high, count = float(edges[one]), float(edges[one + 1]), int(counts[:, one].sum())
        points.append(CurvePoint(low=low, high=high, value=value, interval=interval, count=count))
    return tuple(points)


def worst_tokens(scores: Scores, windows: Sequence[int], ids: Sequence[NDArray[np.int64]]) -> tuple[WorstSample, ...]:
    """The `WORST` tokens of largest KL, the largest first; of equal ones the first.

    windows: number of each window in the data; ids: its tokens (T + 1,), of which the second is the first that was
    scored.
    """
    pooled = np.concatenate([score.kl for score in scores])
    owner = np.repeat(np.arange(len(scores)), [len(score) for score in scores])
    place = np.concatenate([np.arange(len(score)) for score in scores])
    ranked = np.nan_to_num(pooled, nan=math.inf)
    order = np.lexsort((place, np.asarray(windows)[owner], -ranked))[:WORST]
    return tuple(_worst(scores[owner[at]], int(place[at]), windows[owner[at]], ids[owner[at]]) for at in order)


def _worst(score: TokenScores, place: int, window: int, ids: NDArray[np.int64]) -> WorstSample:
    return WorstSample(
        sample=window,
        position=place + 1,
        kl=float(score.kl[place]),
        target=int(score.targets[place]),
        reference=int(score.reference_top[place]),
        chosen=int(score.top[place]),
        reference_probability=math.exp(-float(score.reference_nll[place])),
        probability=math.exp(-float(score.nll[place])),
        context=tuple(int(token) for token in ids[max(0, place + 1 - CONTEXT) : place + 1]),
    )


def _quantiles(scores: Scores) -> tuple[Figures, list[str]]:
    found: Figures = {}
    notes, count = [], sum(len(score) for score in scores)
    for name, share in QUANTILES.items():
        if is_supported(count, share):
            value, interval = clustered_quantile([score.kl for score in scores], share)
            found[name] = value, transform(interval, not_negative)
        else:
            notes.append(f"{name} is not given: {count} tokens, and {needed(share)} are needed.")
    return found, notes


def _curve(name: str, x: str, y: str, unit: str, protocol: str, points: tuple[CurvePoint, ...]) -> Curve:
    return Curve(name=name, x=x, y=y, unit=unit, protocol=protocol, points=points)


def _true_change(score: TokenScores) -> Floats:
    """Change of the true token's probability, (T,)."""
    change: Floats = np.exp(-score.nll) - np.exp(-score.reference_nll)
    return change


def _root(value: float) -> float:
    return math.sqrt(max(value, 0.0)) if not math.isnan(value) else value


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
