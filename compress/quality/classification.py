"""How close a compressed classifier stays to its original: pure functions on logits. Every image is a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.quality.calibration_error import FEWEST, Answers, Fitted, calibration_figures, reliability_curve
from compress.quality.calibration_error import PROTOCOL as CALIBRATION
from compress.quality.metrics import Figures, Subject, in_order, measured
from compress.records import Interval, Quality
from compress.records.quality import Flips, Metric, WorstSample
from compress.stats.intervals import cluster_interval, not_negative, transform
from compress.stats.proportions import mcnemar, paired_change, proportion

TASK = "image-classifier"
TOP = 5
WORST = 20
LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class BatchScore:
    """Per image of a batch, all (n,): its label; what the reference and the scored model put first, the probability of
    that, and of the label; whether they are right, also among their first five (None of five classes or fewer);
    whether they agree; and KL(reference || scored) in nats."""

    labels: Tensor
    reference_top: Tensor
    top: Tensor
    reference_confidence: Tensor
    confidence: Tensor
    reference_probability: Tensor
    probability: Tensor
    reference_right: Tensor
    right: Tensor
    reference_top5: Tensor | None
    top5: Tensor | None
    agreed: Tensor
    kl: Tensor


def score_batch(reference: Tensor, logits: Tensor, labels: Tensor) -> BatchScore:
    """Score a batch: reference and logits (n, classes) floats, labels (n,) int64. Softmax in float64.

    Logits that are not finite are wrong and agree with nothing.
    """
    if reference.shape != logits.shape or logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"found {tuple(reference.shape)}, {tuple(logits.shape)} and {tuple(labels.shape)}")
    finite = torch.isfinite(logits).all(-1)
    log_p, log_q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    kl = (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(-1)
    before, after = reference.argmax(-1), logits.argmax(-1)
    return BatchScore(
        labels=labels,
        reference_top=before,
        top=after,
        reference_confidence=_at(p, before),
        confidence=_at(q, after),
        reference_probability=_at(p, labels),
        probability=_at(q, labels),
        reference_right=before == labels,
        right=(after == labels) & finite,
        reference_top5=_in_top(reference, labels),
        top5=_in_top(logits, labels),
        agreed=(after == before) & finite,
        kl=torch.where(kl < 0, torch.zeros_like(kl), kl),  # below 0 by rounding only; NaN stays
    )


def summarize_images(
    scores: Sequence[BatchScore],
    subject: Subject,
    where: str,
    protocol: str,
    data_digest: str,
    fitted: Fitted | None = None,
) -> Quality:
    """Every figure of the scored model, for the baseline those of the reference that compare with nothing.

    Shares have score intervals, changes are paired over the same images and in percentage points. worst_class_drop is
    the largest loss of accuracy in a class; its interval holds for all classes at once (Bonferroni). fitted: batches
    that were judged after a temperature, see `Fitted`.
    """
    of_reference = subject == "baseline"
    right = _joined(scores, "reference_right" if of_reference else "right")
    count = len(right)
    found: Figures = {"accuracy": proportion(int(right.sum()), count)}
    found |= _top5_figures(scores, of_reference)
    notes: list[str] = []
    worst: tuple[WorstSample, ...] = ()
    flips = None
    if not of_reference:
        changes, flips = _change_figures(scores)
        found |= changes
        found["worst_class_drop"], note = _worst_class(scores)
        notes.append(note)
        worst = worst_images(scores)
    metrics = measured(TASK, found, count, protocol)
    calibrated, told = _calibration(scores, of_reference, fitted, protocol)
    own = _answers(scores, of_reference)
    return Quality(
        subject=subject,
        where=where,
        metrics=in_order(TASK, {**metrics, **calibrated}),
        data_digest=data_digest,
        curves=(reliability_curve(own, f"{CALIBRATION}, {protocol}"),) if calibrated else (),
        flips=flips,
        worst=worst,
        notes=(*notes, *told),
    )


def worst_images(scores: Sequence[BatchScore]) -> tuple[WorstSample, ...]:
    """The `WORST` images of largest KL, the largest first; of equal ones the first."""
    kl = _joined(scores, "kl").numpy()
    order = np.argsort(-np.nan_to_num(kl, nan=np.inf), kind="stable")[:WORST]
    names = ("labels", "reference_top", "top", "reference_probability", "probability")
    columns = [_joined(scores, name).numpy() for name in names]
    found = []
    for place in order:
        label, before, after, first, second = (column[place] for column in columns)
        found.append(
            WorstSample(
                sample=int(place),
                kl=float(kl[place]),
                target=int(label),
                reference=int(before),
                chosen=int(after),
                reference_probability=float(first),
                probability=float(second),
            )
        )
    return tuple(found)


def _top5_figures(scores: Sequence[BatchScore], of_reference: bool) -> Figures:
    """Empty of five classes or fewer."""
    if any(score.top5 is None for score in scores):
        return {}
    before, after = _joined(scores, "reference_top5"), _joined(scores, "top5")
    own = before if of_reference else after
    found: Figures = {"top5_accuracy": proportion(int(own.sum()), len(own))}
    if not of_reference:
        found["top5_accuracy_change"] = _points(before, after)
    return found


def _change_figures(scores: Sequence[BatchScore]) -> tuple[Figures, Flips]:
    before, after = _joined(scores, "reference_right"), _joined(scores, "right")
    count, gained, lost = len(after), int((after & ~before).sum()), int((before & ~after).sum())
    value, spread = cluster_interval(_joined(scores, "kl").numpy(), np.ones(count))
    figures: Figures = {
        "accuracy_change": _points(before, after),
        "top1_agreement": proportion(int(_joined(scores, "agreed").sum()), count),
        "kl": (value, transform(spread, not_negative)),
        "flips": proportion(gained + lost, count),
    }
    p_value = mcnemar(gained, lost)
    return figures, Flips(gained=gained, lost=lost, samples=count, p_value=p_value, test="McNemar's, exact")


def _worst_class(scores: Sequence[BatchScore]) -> tuple[tuple[float, Interval | None], str]:
    """The largest loss of accuracy in a class, in percentage points, and which class it is."""
    labels = _joined(scores, "labels")
    before, after = _joined(scores, "reference_right"), _joined(scores, "right")
    kinds = sorted(set(labels.tolist()))
    level = 1 - (1 - LEVEL) / len(kinds)
    drops, lows, highs = [], [], []
    for kind in kinds:
        one = labels == kind
        gained, lost = int((after & ~before)[one].sum()), int((before & ~after)[one].sum())
        change, interval = paired_change(gained, lost, int(one.sum()), level)
        drops.append(-100 * change)
        lows.append(-100 * interval.high)
        highs.append(-100 * interval.low)
    largest = max(drops)
    note = f"worst_class_drop is that of class {kinds[drops.index(largest)]}, the largest of {len(kinds)} classes."
    return (largest, Interval(low=max(lows), high=max(highs), level=LEVEL)), note


def _calibration(
    scores: Sequence[BatchScore], of_reference: bool, fitted: Fitted | None, protocol: str
) -> tuple[dict[str, Metric], list[str]]:
    own, original = _answers(scores, of_reference), None if of_reference else _answers(scores, True)
    protocol, found = f"{CALIBRATION}, {protocol}", calibration_figures(own, original)
    if not found:
        return {}, [f"Calibration is not given: {len(own.right)} images, and {FEWEST} are needed."]
    metrics = measured(TASK, found, len(own.right), protocol)
    after: Figures = {}
    if fitted is not None:
        judged = [scores[place] for place in fitted.places]
        first = _clusters(fitted.original, _joined(judged, "reference_right"))
        second = first if of_reference else _clusters(fitted.own, _joined(judged, "right"))
        after = calibration_figures(second, None if of_reference else first, "_fitted")
    if fitted is None or not after:
        return metrics, [f"Calibration after a fitted temperature is not given: that takes {2 * FEWEST} images."]
    how = f"{protocol}, one temperature fitted on every second batch, judged by the others"
    metrics |= measured(TASK, after, len(first.right), how)
    return metrics, [fitted.told(of_reference)]


def _answers(scores: Sequence[BatchScore], of_reference: bool) -> Answers:
    prefix = "reference_" if of_reference else ""
    return _clusters([_joined(scores, f"{prefix}confidence").numpy()], _joined(scores, f"{prefix}right"))


def _clusters(confidence: Sequence[np.ndarray[tuple[int], np.dtype[np.float64]]], right: Tensor) -> Answers:
    """Every image one of its own."""
    return Answers(list(np.concatenate(list(confidence))[:, None]), list(right.numpy()[:, None]))


def _points(before: Tensor, after: Tensor) -> tuple[float, Interval | None]:
    """Change of a share in percentage points."""
    change, interval = paired_change(int((after & ~before).sum()), int((before & ~after).sum()), len(after))
    return 100 * change, transform(interval, lambda share: 100 * share)


def _in_top(logits: Tensor, labels: Tensor) -> Tensor | None:
    """Whether the label is among the first five, (n,)."""
    if logits.shape[-1] <= TOP:
        return None
    hits = (logits.topk(TOP).indices == labels[:, None]).any(-1)
    return hits & torch.isfinite(logits).all(-1)


def _at(values: Tensor, places: Tensor) -> Tensor:
    return values.gather(1, places[:, None])[:, 0]


def _joined(scores: Sequence[BatchScore], name: str) -> Tensor:
    return torch.cat([getattr(score, name) for score in scores])
