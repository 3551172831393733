"""How close a compressed classifier stays to its original: pure functions on logits. Every image is a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.proportions import paired_change, proportion
from compress.quality import METRICS, Subject
from compress.records import Interval, Metric, Quality
from compress.stats import cluster_interval, transform

TASK = "image-classifier"


@dataclass(frozen=True, eq=False)
class BatchScore:
    """Per image of a batch, all (n,): whether the reference and the scored model are right, whether they agree, and
    KL(reference || scored) in nats."""

    reference_right: Tensor
    right: Tensor
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
    p = log_p.exp()
    kl = (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(-1)
    top = logits.argmax(-1)
    return BatchScore(
        reference_right=reference.argmax(-1) == labels,
        right=(top == labels) & finite,
        agreed=(top == reference.argmax(-1)) & finite,
        kl=torch.where(kl < 0, torch.zeros_like(kl), kl),  # below 0 by rounding only; NaN stays
    )


def summarize_images(
    scores: Sequence[BatchScore], subject: Subject, where: str, protocol: str, data_digest: str
) -> Quality:
    """accuracy of the scored model, for the baseline that of the reference; for the compressed one also
    accuracy_change in percentage points, top1_agreement and kl, each against the reference on the same images."""
    reference, right = _joined(scores, "reference_right"), _joined(scores, "right")
    own = reference if subject == "baseline" else right
    count = len(own)
    found: dict[str, tuple[float, Interval | None]] = {"accuracy": proportion(int(own.sum()), count)}
    if subject == "compressed":
        change, interval = paired_change(int((right & ~reference).sum()), int((reference & ~right).sum()), count)
        found["accuracy_change"] = 100 * change, transform(interval, lambda share: 100 * share)
        found["top1_agreement"] = proportion(int(_joined(scores, "agreed").sum()), count)
        value, spread = cluster_interval(_joined(scores, "kl").numpy(), np.ones(count))
        found["kl"] = value, transform(spread, lambda bound: max(bound, 0.0))
    metrics = {}
    for name, (value, interval_of) in found.items():
        unit, better = METRICS[TASK][name]
        metrics[name] = Metric(
            value=value, interval=interval_of, samples=count, unit=unit, protocol=protocol, better=better
        )
    return Quality(subject=subject, where=where, metrics=metrics, data_digest=data_digest)


def _joined(scores: Sequence[BatchScore], name: str) -> Tensor:
    return torch.cat([getattr(score, name) for score in scores])
