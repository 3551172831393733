"""By what tokens are dropped: pure functions on tensors. Higher scores stay.

Some scores are known when a token is written (`written`), some follow from what later queries read of it (`read`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kv.spec import KvSpec


def written(spec: KvSpec, keys: Tensor, positions: Tensor) -> Tensor:
    """Scores (batch, heads, n) float32 of tokens as they come. keys (batch, heads, n, size); positions (batch, n).

    `position`: the newest stay (StreamingLLM, arXiv 2309.17453); `key_norm`: those with short keys (Devoto et al. 2024,
    arXiv 2406.11430); the others begin at 0.
    """
    if spec.scorer == "key_norm":
        norms: Tensor = torch.linalg.vector_norm(keys.float(), dim=-1)
        return -norms
    if spec.scorer == "position":
        return positions[:, None].expand(keys.shape[:3]).float()
    return torch.zeros(keys.shape[:3], device=keys.device)


def read(spec: KvSpec, scores: Tensor, probabilities: Tensor, asked: Tensor) -> Tensor:
    """Scores after some queries read the cache.

    Args: scores (batch, kv heads, slots); probabilities (batch, heads, queries, slots) after the softmax; asked (batch,
    queries) which queries are no padding. `h2o`: the sum of what all queries gave it, over the heads of a group (Zhang
    et al. 2023, arXiv 2306.14048), older queries counting `decay` per step less; `tova`: what the last query gave it,
    over all heads, so that heads agree (Oren et al. 2024, arXiv 2401.06104).
    """
    if not spec.reads:
        return scores
    batch, _, queries, slots = probabilities.shape
    weights = probabilities.float() * asked[:, None, :, None]
    if spec.scorer == "tova":
        last = weights[:, :, -1].mean(1, keepdim=True)
        return torch.where(asked[:, -1, None, None], last.expand_as(scores), scores)
    grouped = weights.reshape(batch, scores.shape[1], -1, queries, slots).sum(2)
    if spec.decay == 1:
        return scores + grouped.sum(2)
    later = asked.float().flip(1).cumsum(1).flip(1) - asked.float()  # queries after each, padding left out
    factors = spec.decay**later
    return scores * (spec.decay ** asked.sum(1).float())[:, None, None] + torch.einsum("bhqs,bq->bhs", grouped, factors)


def unlike(keys: Tensor, valid: Tensor) -> Tensor:
    """How little each key looks like the others, (batch, heads, slots) float32: the negated cosine with the mean of the
    unit keys (KeyDiff, Park et al. 2025, arXiv 2504.15364). keys (batch, heads, slots, size); valid as of `ranked`."""
    units = torch.nn.functional.normalize(keys.float(), dim=-1)
    mean = (units * valid[..., None]).sum(2, keepdim=True)
    return -torch.nn.functional.cosine_similarity(units, mean, dim=-1)


def ranks(spec: KvSpec, scores: Tensor, positions: Tensor, valid: Tensor, now: Tensor) -> Tensor:
    """What each slot is worth now, (batch, heads, slots) float64: ∞ for the first `sinks` and the newest `recent`
    tokens, −∞ for padding.

    Args: scores, positions, valid (batch, heads, slots); now (batch,) the newest token's position.
    """
    rank = scores.double()
    if spec.by_age:
        age = (now[:, None, None] - positions + 1).clamp(min=1)
        rank = rank - age.double().log() if spec.learned else rank / age  # learned scores are logarithms
    fixed = (positions < spec.sinks) | (positions > now[:, None, None] - spec.recent)
    return rank.masked_fill(fixed, torch.inf).masked_fill(~valid, -torch.inf)


def ranked(spec: KvSpec, scores: Tensor, positions: Tensor, valid: Tensor, now: Tensor) -> Tensor:
    """Slots of each head from the one to keep first to the one to drop first, (batch, heads, slots) int64: by `ranks`,
    which has the arguments; of equal ones the older goes."""
    newest = positions.argsort(dim=-1, descending=True, stable=True)
    rank = ranks(spec, scores, positions, valid, now).gather(-1, newest)
    return newest.gather(-1, rank.argsort(dim=-1, descending=True, stable=True))
