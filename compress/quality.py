"""How close a compressed model stays to its original: pure functions on logits and on embeddings.

Nothing here runs a model, so one definition serves torch and every runtime. Sums are kept per window (one forward
pass), because tokens of a window are correlated: intervals are clustered by window. Information is in nats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import UsageError, nearest
from compress.records import Gate, Interval, Metric, Quality
from compress.stats import cluster_interval, paired_difference, transform

Array = Tensor | NDArray[np.floating]
Indices = Tensor | NDArray[np.integer]
Subject = Literal["baseline", "compressed"]
Better = Literal["lower", "higher"]

CHUNK_ROWS = 128
CHUNK_ELEMENTS = 1 << 22  # 32 MiB per float64 buffer, so 128k-word vocabularies go 32 rows at a time
METRICS: dict[str, dict[str, tuple[str, Better]]] = {  # task → metric → its unit and which way is better
    "causal-lm": {
        "perplexity": ("1", "lower"),
        "nll": ("nats/token", "lower"),
        "kl": ("nats/token", "lower"),
        "top1_agreement": ("fraction", "higher"),
        "nll_change": ("nats/token", "lower"),
    },
    "encoder": {"cosine": ("1", "higher"), "nearest_neighbour_agreement": ("fraction", "higher")},
    "image-classifier": {
        "accuracy": ("fraction", "higher"),
        "accuracy_change": ("percentage points", "higher"),
        "kl": ("nats/image", "lower"),
        "top1_agreement": ("fraction", "higher"),
    },
}
FEWEST_NEIGHBOURS = 3  # of two samples each is the other's nearest, whatever the vectors


@dataclass(frozen=True)
class WindowScore:
    """Sums over the scored tokens of one window; the last three are None without a reference."""

    tokens: int
    nll: float
    reference_nll: float | None = None
    kl: float | None = None
    agreed: int | None = None

    def of_reference(self) -> WindowScore:
        """The reference's own score of this window, for the baseline's Quality."""
        if self.reference_nll is None:
            raise ValueError("this window was scored without a reference")
        return WindowScore(self.tokens, self.reference_nll)


@dataclass(frozen=True, eq=False)
class EmbeddingScores:
    """Per sample, both (samples,): cosine to the reference's vector, and whether the nearest neighbour is the same."""

    cosines: NDArray[np.float64]
    agreed: NDArray[np.bool_]


def score_window(reference_logits: Array | None, logits: Array, targets: Indices) -> WindowScore:
    """Score one window. Logits (T, V) in any float type, row t predicting targets[t]; targets (T,) integers.

    Softmax in float64: 16-bit or clipped references give negative divergences (ik_llama.cpp#325). KL is
    KL(reference || compressed); a word of probability 0 in the reference (a padded vocabulary at -inf) adds nothing.
    """
    _check_window(reference_logits, logits, targets)
    tokens, words = logits.shape
    step = max(1, min(CHUNK_ROWS, CHUNK_ELEMENTS // words))
    device = logits.device if isinstance(logits, Tensor) and logits.is_cuda else torch.device("cpu")
    sums = torch.zeros(4, dtype=torch.float64)  # nll, reference nll, kl, agreed
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        reference = None if reference_logits is None else _rows(reference_logits, rows, device)
        sums += _score_rows(reference, _rows(logits, rows, device), _rows(targets, rows, device).long()).cpu()
    nll, reference_nll, kl, agreed = sums.tolist()
    if reference_logits is None:
        return WindowScore(tokens, nll)
    return WindowScore(tokens, nll, reference_nll, kl, int(agreed))


def summarize(scores: Sequence[WindowScore], subject: Subject, where: str, protocol: str, data_digest: str) -> Quality:
    """perplexity and nll of the scored model; for the compressed one also kl, top1_agreement and nll_change.

    Those three compare with the reference on the same tokens, and are left out where there was none. The baseline's
    own Quality comes from `[score.of_reference() for score in scores]`.
    """
    tokens = _column(scores, "tokens")
    nll, nll_interval = cluster_interval(_column(scores, "nll"), tokens)
    found = {"perplexity": (_exp(nll), transform(nll_interval, _exp)), "nll": (nll, nll_interval)}
    if subject == "compressed" and any(score.kl is not None for score in scores):
        kl, kl_interval = cluster_interval(_column(scores, "kl"), tokens)
        top1, top1_interval = cluster_interval(_column(scores, "agreed"), tokens)
        found["kl"] = kl, transform(kl_interval, _not_negative)
        found["top1_agreement"] = top1, transform(top1_interval, _fraction)
        found["nll_change"] = paired_difference(_column(scores, "nll"), _column(scores, "reference_nll"), tokens)
    metrics = {name: _metric("causal-lm", name, *figures, len(scores), protocol) for name, figures in found.items()}
    return Quality(subject=subject, where=where, metrics=metrics, data_digest=data_digest)


def mean_pool(hidden: Array, mask: Array | Indices | None = None) -> NDArray[np.float64]:
    """Mean over the positions that count: hidden (N, T, D), mask (N, T) of 0 and 1 -> (N, D) float64."""
    states = _numpy(hidden)
    if states.ndim != 3:
        raise ValueError(f"mean_pool: hidden must be (samples, positions, features), found {states.shape}")
    weights = np.ones(states.shape[:2]) if mask is None else _numpy(mask)
    if weights.shape != states.shape[:2] or not np.all(weights.sum(axis=1) > 0):
        raise ValueError(f"mean_pool: mask must be {states.shape[:2]} with a position per sample, got {weights.shape}")
    pooled: NDArray[np.float64] = np.einsum("ntd,nt->nd", states, weights) / weights.sum(axis=1, keepdims=True)
    return pooled


def score_embeddings(reference: Array, outputs: Array) -> EmbeddingScores:
    """Compare pooled vectors (samples, features) of the reference and the compressed encoder, sample by sample.

    The nearest neighbour is that by cosine among the other samples, each encoder in its own space.
    """
    old, new = _numpy(reference), _numpy(outputs)
    if old.ndim != 2 or old.shape != new.shape or len(old) < FEWEST_NEIGHBOURS:
        raise ValueError(
            f"embeddings must be two equal (samples, features) of at least {FEWEST_NEIGHBOURS} samples, "
            f"found {old.shape} and {new.shape}"
        )
    old, new = _unit(old), _unit(new)
    cosines = np.clip(np.sum(old * new, axis=1), -1.0, 1.0)
    agreed = (_neighbours(old) == _neighbours(new)) & np.isfinite(cosines)
    return EmbeddingScores(cosines, agreed)


def summarize_embeddings(
    scores: EmbeddingScores, subject: Subject, where: str, protocol: str, data_digest: str
) -> Quality:
    """cosine and nearest_neighbour_agreement, every sample a cluster of its own."""
    found = {
        "cosine": (scores.cosines, _cosine_range),
        "nearest_neighbour_agreement": (scores.agreed, _fraction),
    }
    metrics = {}
    for name, (values, within) in found.items():
        value, interval = cluster_interval(values, np.ones(len(values)))
        metrics[name] = _metric("encoder", name, value, transform(interval, within), len(values), protocol)
    return Quality(subject=subject, where=where, metrics=metrics, data_digest=data_digest)


def _metric(task: str, name: str, value: float, interval: Interval | None, samples: int, protocol: str) -> Metric:
    unit, better = METRICS[task][name]
    return Metric(value=value, interval=interval, samples=samples, unit=unit, protocol=protocol, better=better)


def check_gates(names: Iterable[str], task: str) -> None:
    """Raises: UsageError for a gate on a metric that this kind of model does not have. Called before the work."""
    for name in names:
        if name not in METRICS[task]:
            raise UsageError(
                f"There is no quality gate '{name}' for a model of kind {task}.{nearest(name, METRICS[task])}"
            )


def gates_met(quality: Quality, gates: Mapping[str, float]) -> tuple[Gate, ...]:
    """Hold the worse end of each gated metric's interval against its bound; nan meets none.

    Where there is no interval (one window), the value itself is compared.
    """
    return tuple(_gate(quality, name, bound) for name, bound in gates.items())


def _gate(quality: Quality, name: str, bound: float) -> Gate:
    if name not in quality.metrics:
        raise UsageError(f"There is no quality gate '{name}' for these data.{nearest(name, quality.metrics)}")
    metric = quality.metrics[name]
    if metric.better == "lower":
        found = metric.value if metric.interval is None else metric.interval.high
        return Gate(name=name, bound=bound, found=found, met=found <= bound)
    found = metric.value if metric.interval is None else metric.interval.low
    return Gate(name=name, bound=bound, found=found, met=found >= bound)


def _score_rows(reference: Tensor | None, logits: Tensor, targets: Tensor) -> Tensor:
    """(4,) float64 sums of a chunk: nll, reference nll, kl, agreed. Logits (rows, V) float64, targets (rows,)."""
    at = targets[:, None]
    log_q = logits.log_softmax(dim=-1)
    nll = -log_q.gather(1, at).sum()
    if reference is None:
        return torch.nn.functional.pad(nll[None], (0, 3))
    log_p = reference.log_softmax(dim=-1)
    p = log_p.exp()
    per_token = (p * (log_p - log_q).masked_fill_(p == 0, 0.0)).sum(dim=-1)  # 0 log 0 = 0
    kl = per_token.clamp(min=0).sum()  # below 0 by rounding only
    agreed = (reference.argmax(dim=-1) == logits.argmax(dim=-1)).sum()
    return torch.stack([nll, -log_p.gather(1, at).sum(), kl, agreed.double()])


def _check_window(reference: Array | None, logits: Array, targets: Indices) -> None:
    if logits.ndim != 2 or 0 in logits.shape or tuple(targets.shape) != (logits.shape[0],):
        raise ValueError(f"logits (T, V) and targets (T,) wanted, found {logits.shape} and {targets.shape}")
    if reference is not None and tuple(reference.shape) != tuple(logits.shape):
        raise ValueError(f"reference logits {tuple(reference.shape)} differ in shape from {tuple(logits.shape)}")
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(f"targets lie in {low} to {high}, outside the {logits.shape[1]} logits; drop padding first")


def _rows(values: Array | Indices, rows: slice, device: torch.device) -> Tensor:
    """A float64 copy of some rows; a copy, since a memory-mapped reference may be read-only."""
    if isinstance(values, np.ndarray):
        return torch.from_numpy(values[rows].astype(np.float64)).to(device)
    return values[rows].detach().to(device).double()


def _numpy(values: Array | Indices) -> NDArray[np.float64]:
    if isinstance(values, Tensor):
        return values.detach().to("cpu").double().numpy()
    return values.astype(np.float64)


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of length 1; a zero vector stays zero, so that its cosine is 0."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: NDArray[np.float64] = vectors / np.where(lengths == 0, 1.0, lengths)
    return unit


def _neighbours(unit: NDArray[np.float64]) -> NDArray[np.intp]:
    """(N,) index of the most similar other row."""
    nearest_rows = np.empty(len(unit), dtype=np.intp)
    for start in range(0, len(unit), CHUNK_ROWS):
        similar = unit[start : start + CHUNK_ROWS] @ unit.T
        similar[np.arange(len(similar)), start + np.arange(len(similar))] = -np.inf
        nearest_rows[start : start + CHUNK_ROWS] = similar.argmax(axis=1)
    return nearest_rows


def _column(scores: Sequence[WindowScore], name: str) -> NDArray[np.float64]:
    values = [getattr(score, name) for score in scores]
    if not values or None in values:
        raise ValueError(f"summarize: {values.count(None)} of {len(values)} windows have no {name}")
    return np.array(values, dtype=np.float64)


def _exp(value: float) -> float:
    with np.errstate(over="ignore"):  # a broken model's perplexity is inf, not an exception
        return float(np.exp(value))


def _not_negative(value: float) -> float:
    return max(value, 0.0)


def _fraction(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _cosine_range(value: float) -> float:
    return min(max(value, -1.0), 1.0)
