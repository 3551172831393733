"""Whether a model is as often right as it says: pure functions on the top answer's probability and its correctness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.quality.fidelity import binned
from compress.quality.metrics import Figures
from compress.quality.token_scores import Flags, Floats
from compress.records.quality import Curve
from compress.stats.intervals import cluster_interval, not_negative, paired_difference, transform

BINS = 15
FEWEST = 10 * BINS
"""Answers that a calibration error is given for: with fewer, chance alone makes each bin miss by several points."""
PROTOCOL = f"top answer, {BINS} bins of equal mass"
FIT_ROWS = 1024
FIT_ELEMENTS = 1 << 24  # 64 MiB of float32 logits per model: all rows of a vocabulary of 16k, 128 of one of 128k
COLDEST, HOTTEST = 0.05, 20.0
_LOWEST = -1e100  # for -inf, whose square times 0 must be 0
_CHUNK = 1 << 21


@dataclass(frozen=True, eq=False)
class Answers:
    """The top answers of a model by cluster (a window, or an image): their probabilities, and whether they are right,
    (n,) each."""

    confidence: Sequence[Floats]
    right: Sequence[Flags]

    @property
    def counts(self) -> list[int]:
        """Answers per cluster."""
        return [len(each) for each in self.right]


def equal_mass_bins(confidence: Floats, bins: int = BINS) -> NDArray[np.intp]:
    """(n,) → the bin of each, 0 to bins - 1 by rising confidence, all of n / bins answers; of equal ones the first
    are below."""
    place = np.empty(len(confidence), np.intp)
    place[np.argsort(confidence, kind="stable")] = np.arange(len(confidence))
    return place * bins // len(confidence)


def error_parts(confidence: Floats, right: Flags) -> Floats:
    """(n,) terms whose mean is the expected calibration error (Naeini et al. 2015; bins of equal mass as in Nguyen and
    O'Connor 2015): confidence - right, with the sign of its sum over the answer's bin.

    As a mean it has an interval clustered like any other; bins and signs count as given. It is above 0 by chance even
    for a calibrated model, by about 1 point with 1,000 answers, so the change against the original, where that cancels,
    tells more than its height.
    """
    gaps = confidence - right
    bins = equal_mass_bins(confidence)
    signs = np.sign(np.bincount(bins, weights=gaps, minlength=BINS))
    parts: Floats = signs[bins] * gaps
    return parts


def calibration_figures(own: Answers, original: Answers | None, suffix: str = "") -> Figures:
    """ece and brier, (confidence - right)², of the top answer; with the original on the same answers also their
    changes, each paired and clustered. suffix: "_fitted" after a temperature. Empty of fewer than `FEWEST` answers."""
    counts = own.counts
    if sum(counts) < FEWEST:
        return {}
    found: Figures = {}
    before = _sums(original) if original else {}
    for name, sums in _sums(own).items():
        value, interval = cluster_interval(sums, counts)
        found[f"{name}{suffix}"] = value, transform(interval, not_negative)
        if original:
            found[f"{name}{suffix}_change"] = paired_difference(sums, before[name], counts)
    return found


def reliability_curve(own: Answers, protocol: str) -> Curve:
    """How often the top answer is right, by bins of equal mass of its probability."""
    pooled = np.sort(np.concatenate(list(own.confidence)))
    edges = np.unique(np.concatenate([[0.0], pooled[[len(pooled) * one // BINS for one in range(1, BINS)]], [1.0]]))
    points = binned([right.astype(np.float64) for right in own.right], own.confidence, edges)
    x, y = "probability of the top answer", "share that is right"
    return Curve(name="reliability", x=x, y=y, unit="fraction", protocol=protocol, points=points)


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """The temperature T of least loss of softmax(logits / T) (Guo et al. 2017, §4.2), 0.05 to 20.

    logits (n, V) float, targets (n,) int64. The loss is convex in 1 / T, where Newton's steps are taken, halving where
    one would leave the bracket. nan for logits that are none.
    """
    low, high, inverse = 1 / HOTTEST, 1 / COLDEST, 1.0
    for _ in range(60):
        slope, curvature = _slope(logits, targets, inverse)
        if not np.isfinite(slope):
            return float("nan")
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        step = inverse - slope / curvature if curvature > 0 else low
        new = step if low < step < high else (low + high) / 2
        done, inverse = abs(new - inverse) <= 1e-9 * inverse, new
        if done:
            break
    return 1 / inverse


def confidence_at(logits: Tensor, temperature: float) -> Floats:
    """Probability of the top answer of softmax(logits / temperature): (n, V) → (n,) float64."""
    found = []
    for rows in torch.split(logits, max(1, _CHUNK // logits.shape[-1])):
        scaled = rows.double() / temperature
        found.append((scaled.max(dim=-1).values - scaled.logsumexp(dim=-1)).exp())
    return torch.cat(found).cpu().numpy()


class TemperatureFit:
    """One model's temperature, fitted on some clusters to judge others by: `keep` the former, then `confidence` of the
    latter. What is kept are evenly spaced rows, `FIT_ROWS` in all or as many as `FIT_ELEMENTS` hold; of more clusters
    than that, one row of evenly spaced ones."""

    def __init__(self, clusters: int, vocabulary: int) -> None:
        rows = min(FIT_ROWS, max(1, FIT_ELEMENTS // vocabulary))
        self._each = max(1, rows // max(1, clusters))
        self._every = -(-clusters // rows) if clusters > rows else 1
        self._seen = 0
        self._logits: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._found: float | None = None

    def keep(self, logits: Tensor, targets: Tensor) -> None:
        """Rows to fit on: logits (n, V), targets (n,) int64."""
        self._seen += 1
        if (self._seen - 1) % self._every:
            return
        rows = torch.linspace(0, len(targets) - 1, min(self._each, len(targets))).long()
        self._logits.append(logits[rows].clone())
        self._targets.append(targets[rows].clone())

    @property
    def temperature(self) -> float:
        """Fitted when it is first asked for."""
        if self._found is None:
            self._found = fit_temperature(torch.cat(self._logits), torch.cat(self._targets))
            self._logits.clear()
        return self._found

    def confidence(self, logits: Tensor) -> Floats:
        """At that temperature: (n, V) → (n,)."""
        return confidence_at(logits, self.temperature)


@dataclass(frozen=True, eq=False)
class Fitted:
    """Confidences after one temperature per model, of the windows (or batches) that it was not fitted on.

    places: theirs among all; own, original: (T,) per such window.
    """

    places: Sequence[int]
    own: Sequence[Floats]
    original: Sequence[Floats]
    temperature: float
    original_temperature: float

    def told(self, of_original: bool) -> str:
        """For a note."""
        own = self.original_temperature if of_original else self.temperature
        against = "" if of_original else f" (the original's: {self.original_temperature:.4f})"
        return f"Temperature {own:.4f}{against}, fitted on every second part of the data; 'fitted' is of the others."


class Halves:
    """The temperatures of both models, fitted on the windows (or batches) of even number, and the confidences of the
    others. They are to be seen in `order`."""

    def __init__(self, count: int) -> None:
        self._count, self._fits = count, list[TemperatureFit]()
        self._judged: list[int] = []
        self._found: tuple[list[Floats], list[Floats]] = [], []

    @property
    def order(self) -> list[int]:
        """Those that are fitted on, then those that are judged."""
        return [*range(0, self._count, 2), *range(1, self._count, 2)]

    def see(self, place: int, reference: Tensor, logits: Tensor, targets: Tensor) -> None:
        """One window or batch. Logits (T, V), targets (T,) int64."""
        if self._count < 2:
            return
        if not self._fits:
            self._fits = [TemperatureFit((self._count + 1) // 2, logits.shape[-1]) for _ in range(2)]
        for fit, found, values in zip(self._fits, self._found, (reference, logits), strict=True):
            if place % 2:
                found.append(fit.confidence(values))
            else:
                fit.keep(values, targets)
        if place % 2:
            self._judged.append(place)

    def fitted(self) -> Fitted | None:
        """None of one window, which leaves none to judge."""
        if not self._judged:
            return None
        original, own = self._found
        return Fitted(tuple(self._judged), own, original, self._fits[1].temperature, self._fits[0].temperature)


def _sums(answers: Answers) -> dict[str, list[float]]:
    """Per cluster, the sums whose means are ece and brier."""
    cuts = np.cumsum(answers.counts)[:-1]
    confidence, right = np.concatenate(list(answers.confidence)), np.concatenate(list(answers.right))
    terms = {"ece": error_parts(confidence, right), "brier": (confidence - right) ** 2}
    return {name: [float(part.sum()) for part in np.split(values, cuts)] for name, values in terms.items()}


def _slope(logits: Tensor, targets: Tensor, inverse: float) -> tuple[float, float]:
    """First and second derivative of the summed loss by 1 / T: Σ E[l] - l(true), and Σ Var[l]."""
    slope = curvature = 0.0
    step = max(1, _CHUNK // logits.shape[-1])
    for rows, true in zip(torch.split(logits, step), torch.split(targets, step), strict=True):
        values = rows.double().clamp(min=_LOWEST)
        chances = (values * inverse).softmax(dim=-1)
        weighted = chances * values
        mean = weighted.sum(dim=-1)
        slope += float((mean - values.gather(1, true[:, None])[:, 0]).sum())
        curvature += float(((weighted * values).sum(dim=-1) - mean**2).sum())
    return slope, curvature
