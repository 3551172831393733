"""How close a compressed encoder stays to its original: pure functions on pooled vectors. Every text is a sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from compress.models.embedding import FEWEST_NEIGHBOURS
from compress.quality.metrics import Figures, Subject, in_order, measured
from compress.quality.token_scores import CHUNK_ROWS, Array, Flags, Floats, Indices
from compress.records import Interval, Quality
from compress.stats.intervals import cluster_interval, fraction, transform
from compress.stats.quantiles import clustered_quantile, is_supported, needed

NEIGHBOURS = 10
"""k of recall at k."""
RANKED = 512
"""Samples whose similarities are ranked pair by pair; of more, as many evenly spaced ones."""
_GROUPS = 20  # of samples that the jackknife leaves out in turn
_P1 = 0.01


@dataclass(frozen=True, eq=False)
class EmbeddingScores:
    """Per sample, all (samples,): cosine to the reference's vector; whether the nearest neighbour is the same; share of
    the reference's `NEIGHBOURS` nearest that are found again (None of too few samples). spearman: rank correlation of
    the similarities of all pairs, of both encoders, and its interval."""

    cosines: Floats
    agreed: Flags
    recall: Floats | None = None
    spearman: tuple[float, Interval | None] | None = None


def mean_pool(hidden: Array, mask: Array | Indices | None = None) -> Floats:
    """Mean over the positions that count: hidden (N, T, D), mask (N, T) of 0 and 1 -> (N, D) float64."""
    states = _numpy(hidden)
    if states.ndim != 3:
        raise ValueError(f"mean_pool: hidden must be (samples, positions, features), found {states.shape}")
    weights = np.ones(states.shape[:2]) if mask is None else _numpy(mask)
    if weights.shape != states.shape[:2] or not np.all(weights.sum(axis=1) > 0):
        raise ValueError(f"mean_pool: mask must be {states.shape[:2]} with a position per sample, got {weights.shape}")
    pooled: Floats = np.einsum("ntd,nt->nd", states, weights) / weights.sum(axis=1, keepdims=True)
    return pooled


def score_embeddings(reference: Array, outputs: Array) -> EmbeddingScores:
    """Compare pooled vectors (samples, features) of the reference and the compressed encoder, sample by sample.

    Neighbours are by cosine among the other samples, each encoder in its own space.
    """
    old, new = _numpy(reference), _numpy(outputs)
    if old.ndim != 2 or old.shape != new.shape or len(old) < FEWEST_NEIGHBOURS:
        raise ValueError(
            f"embeddings must be two equal (samples, features) of at least {FEWEST_NEIGHBOURS} samples, "
            f"found {old.shape} and {new.shape}"
        )
    old, new = _unit(old), _unit(new)
    cosines = np.clip(np.sum(old * new, axis=1), -1.0, 1.0)
    finite = np.isfinite(cosines)
    count = NEIGHBOURS if len(old) > 2 * NEIGHBOURS else 1
    before, after = _neighbours(old, count), _neighbours(new, count)
    shared = (before[:, :, None] == after[:, None, :]).any(axis=-1).mean(axis=-1)
    return EmbeddingScores(
        cosines,
        (before[:, 0] == after[:, 0]) & finite,
        np.where(finite, shared, 0.0) if count == NEIGHBOURS else None,
        similarity_spearman(old, new) if finite.all() else (float("nan"), None),
    )


def similarity_spearman(old: Floats, new: Floats) -> tuple[float, Interval | None]:
    """Spearman's correlation of the cosines of all pairs of samples; rows (samples, features) of length 1.

    Interval: samples in up to 20 groups, each left out in turn (the delete-a-group jackknife), since a sample is in
    many pairs. None of fewer than 10 samples, where a group would be most of what is left.
    """
    kept = np.linspace(0, len(old) - 1, min(RANKED, len(old))).astype(int)
    first, second = old[kept] @ old[kept].T, new[kept] @ new[kept].T
    value = _rank_correlation(first, second, np.ones(len(kept), np.bool_))
    groups = min(_GROUPS, len(kept) // 5)
    if groups < 2 or not np.isfinite(value):
        return value, None
    group_of = np.arange(len(kept)) % groups
    without = np.array([_rank_correlation(first, second, group_of != group) for group in range(groups)])
    # (groups - 1) times the deviations are pseudo-values, whose mean has the jackknife's error
    pseudo = value - (groups - 1) * (without - without.mean())
    _, interval = cluster_interval(pseudo, np.ones(groups))
    return value, transform(interval, cosine_range)


def summarize_embeddings(
    scores: EmbeddingScores, subject: Subject, where: str, protocol: str, data_digest: str
) -> Quality:
    """cosine (its mean, first percentile and smallest), nearest_neighbour_agreement, recall_at_10 and
    similarity_spearman, every sample a cluster of its own. What the samples are too few for is named in the notes."""
    count, ones = len(scores.cosines), np.ones(len(scores.cosines))
    found: Figures = {}
    for name, values, within in (
        ("cosine", scores.cosines, cosine_range),
        ("nearest_neighbour_agreement", scores.agreed, fraction),
        ("recall_at_10", scores.recall, fraction),
    ):
        if values is not None:
            value, interval = cluster_interval(values, ones)
            found[name] = value, transform(interval, within)
    found["cosine_min"] = float(scores.cosines.min()), None
    notes = []
    if is_supported(count, _P1):
        found["cosine_p1"] = clustered_quantile(list(scores.cosines[:, None]), _P1)
    else:
        notes.append(f"cosine_p1 is not given: {count} samples, and {needed(_P1)} are needed.")
    if scores.recall is None:
        notes.append(f"recall_at_10 is not given: {count} samples, and {2 * NEIGHBOURS + 1} are needed.")
    if scores.spearman is not None:
        found["similarity_spearman"] = scores.spearman
    metrics = in_order("encoder", measured("encoder", found, count, protocol))
    return Quality(subject=subject, where=where, metrics=metrics, data_digest=data_digest, notes=tuple(notes))


def cosine_range(value: float) -> float:
    """Inside -1 to 1."""
    return min(max(value, -1.0), 1.0)


def _rank_correlation(first: Floats, second: Floats, kept: Flags) -> float:
    """Spearman's of the upper triangles of two (N, N) matrices, over the samples that are kept."""
    rows, columns = np.triu_indices(int(kept.sum()), 1)
    ranks = [rankdata(matrix[np.ix_(kept, kept)][rows, columns]) for matrix in (first, second)]
    old, new = (rank - rank.mean() for rank in ranks)
    spread = float(np.sqrt((old @ old) * (new @ new)))
    return float(old @ new) / spread if spread > 0 else float("nan")


def _numpy(values: Array | Indices) -> Floats:
    if isinstance(values, Tensor):
        return values.detach().to("cpu").double().numpy()
    return values.astype(np.float64)


def _unit(vectors: Floats) -> Floats:
    """Rows of length 1; a zero vector stays zero, so that its cosine is 0."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Floats = vectors / np.where(lengths == 0, 1.0, lengths)
    return unit


def _neighbours(unit: Floats, count: int) -> NDArray[np.intp]:
    """(N, count) indices of the most similar other rows, the nearest first."""
    found = np.empty((len(unit), count), dtype=np.intp)
    for start in range(0, len(unit), CHUNK_ROWS):
        similar = unit[start : start + CHUNK_ROWS] @ unit.T
        similar[np.arange(len(similar)), start + np.arange(len(similar))] = -np.inf
        found[start : start + CHUNK_ROWS] = np.argsort(-similar, axis=1, kind="stable")[:, :count]
    return found
