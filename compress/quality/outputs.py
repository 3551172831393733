"""How close the outputs of a compressed model of images stay to the original's, whatever they mean: pure functions.

Every image is a sample. A detector's scores and boxes, say, have no accuracy without boxes to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.quality.metrics import METRICS, Subject
from compress.records import Interval, Metric, Quality
from compress.stats.intervals import cluster_interval, transform

TASK = "image-outputs"


@dataclass(frozen=True, eq=False)
class OutputScore:
    """Per image of a batch and output, both (n, outputs) float64: the cosine of the output with the reference's, and
    the norm of their difference as a share of the reference's norm."""

    cosine: Tensor
    error: Tensor


def score_outputs(reference: Tensor, found: Tensor, sizes: Sequence[int]) -> OutputScore:
    """reference, found (n, sum of sizes): the outputs of an image in a row, of these sizes each.

    Two outputs that are all zero are alike. Where one is not finite, cosine is 0 and the error infinite.
    """
    if reference.shape != found.shape or reference.ndim != 2 or reference.shape[1] != sum(sizes):
        raise ValueError(f"found {tuple(reference.shape)}, {tuple(found.shape)} and sizes {list(sizes)}")
    cosines, errors = [], []
    for one, two in zip(*(torch.split(rows.double(), list(sizes), 1) for rows in (reference, found)), strict=True):
        first, second, apart = one.norm(dim=1), two.norm(dim=1), (one - two).norm(dim=1)
        same = (first == 0) & (second == 0)
        cosine = (one * two).sum(1) / (first * second).clamp(min=torch.finfo(torch.float64).tiny)
        error = apart / first.clamp(min=torch.finfo(torch.float64).tiny)
        finite = torch.isfinite(one).all(1) & torch.isfinite(two).all(1)
        same |= (one == two).all(1)  # where rounding would leave a trace
        cosines.append(torch.where(same, 1.0, cosine.clamp(-1, 1)).where(finite, torch.zeros(())))
        errors.append(torch.where(same, 0.0, error).where(finite, torch.full((), torch.inf, dtype=torch.float64)))
    return OutputScore(torch.stack(cosines, 1), torch.stack(errors, 1))


def farthest(reference: Tensor, found: Tensor, sizes: Sequence[int]) -> float:
    """The largest norm of a difference over samples and outputs, as a share of the reference's norm or, where that is
    less, of the output's root mean square norm: one number near zero says nothing of a graph. Infinite for NaN."""
    largest = 0.0
    parts = (torch.split(rows.double(), list(sizes), 1) for rows in (reference, found))
    for one, two in zip(*parts, strict=True):
        norms = one.norm(dim=1)
        usual = norms.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        share = float(((two - one).norm(dim=1) / norms.maximum(usual)).max())
        largest = max(largest, share if math.isfinite(share) else math.inf)
    return largest


def summarize_outputs(
    scores: Sequence[OutputScore], names: Sequence[str], subject: Subject, where: str, protocol: str, data_digest: str
) -> Quality:
    """cosine of the least alike output of an image and relative_error of the farthest, as means over images, and
    where there are several outputs the same of each, as `cosine[name]`."""
    cosine = torch.cat([score.cosine for score in scores])
    error = torch.cat([score.error for score in scores])
    found = {"cosine": _mean(cosine.amin(1)), "relative_error": _mean(error.amax(1), floor=0.0)}
    if len(names) > 1:
        for place, name in enumerate(names):
            found[f"cosine[{name}]"] = _mean(cosine[:, place])
            found[f"relative_error[{name}]"] = _mean(error[:, place], floor=0.0)
    metrics = {}
    for name, (value, interval) in found.items():
        unit, better = METRICS[TASK][name.partition("[")[0]]
        metrics[name] = Metric(
            value=value, interval=interval, samples=len(cosine), unit=unit, protocol=protocol, better=better
        )
    return Quality(subject=subject, where=where, metrics=metrics, data_digest=data_digest)


def _mean(values: Tensor, floor: float = -1.0) -> tuple[float, Interval | None]:
    value, interval = cluster_interval(values.numpy(), np.ones(len(values)))
    high = 1.0 if floor < 0 else float("inf")
    return value, transform(interval, lambda bound: min(max(bound, floor), high))
