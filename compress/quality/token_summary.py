"""How close a compressed language model stays to its original, from sums over windows; and where the other figures are.

Sums are kept per window (one forward pass), because tokens of a window are correlated: intervals are clustered by
window. Information is in nats. Figures per token are in compress/quality/token_quality.py, of encoders and image
classifiers in compress/quality/embedding_scores.py and compress/quality/classification.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from compress.quality.metrics import Figures, Subject, measured
from compress.quality.token_scores import WindowScore
from compress.records import Quality
from compress.stats.intervals import cluster_interval, fraction, not_negative, paired_difference, transform

TASK = "causal-lm"


def summarize(scores: Sequence[WindowScore], subject: Subject, where: str, protocol: str, data_digest: str) -> Quality:
    """perplexity and nll of the scored model; for the compressed one also kl, top1_agreement and nll_change.

    Those three compare with the reference on the same tokens, and are left out where there was none. The baseline's
    own Quality comes from `[score.of_reference() for score in scores]`.
    """
    tokens = _column(scores, "tokens")
    nll, nll_interval = cluster_interval(_column(scores, "nll"), tokens)
    found: Figures = {"perplexity": (_exp(nll), transform(nll_interval, _exp)), "nll": (nll, nll_interval)}
    if subject == "compressed" and any(score.kl is not None for score in scores):
        kl, kl_interval = cluster_interval(_column(scores, "kl"), tokens)
        top1, top1_interval = cluster_interval(_column(scores, "agreed"), tokens)
        found["kl"] = kl, transform(kl_interval, not_negative)
        found["top1_agreement"] = top1, transform(top1_interval, fraction)
        found["nll_change"] = paired_difference(_column(scores, "nll"), _column(scores, "reference_nll"), tokens)
    metrics = measured(TASK, found, len(scores), protocol)
    return Quality(subject=subject, where=where, metrics=metrics, data_digest=data_digest)


def _column(scores: Sequence[WindowScore], name: str) -> NDArray[np.float64]:
    values = [getattr(score, name) for score in scores]
    if not values or None in values:
        raise ValueError(f"summarize: {values.count(None)} of {len(values)} windows have no {name}")
    return np.array(values, dtype=np.float64)


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):  # a broken model's perplexity is inf, not an exception
        return float(np.exp(value))
