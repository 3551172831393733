"""Expected attention: how much queries that are yet to come will attend to a token (arXiv 2510.00636).

Queries before their rotation are taken for normally distributed, each head's with the mean μ and covariance Σ of all
queries that the cache has seen. The next `AHEAD` positions turn them, on average, by one matrix R. So a key k can
expect E exp(q·k / √d) = exp(k·Rμ / √d + k·RΣRᵀk / 2d), as a share of what all keys expect; times its value's length.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compress.kv.rotation import Rotation, turned
from compress.kv.spec import KvSpec

AHEAD = 512
"""Positions that queries are expected at."""


class Call(NamedTuple):
    """Of one call. query (batch, heads, n, size); key, value (batch, kv heads, slots + n, size), the new tokens last;
    scaling: of the products."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float


class Expected:
    """The queries that one layer's cache has seen: count (batch,), mean (batch, heads, size), scatter (batch, heads,
    size, size): the sum of the products of what is away from the mean. All float32."""

    def __init__(self, rotation: Rotation) -> None:
        self.rotation = rotation
        self.held: dict[str, Tensor] = {}

    def meet(self, query: Tensor, positions: Tensor, asked: Tensor) -> None:
        """Take in the queries of a call (batch, heads, n, size), rotated at positions (batch, n), but for padding."""
        batch, heads, _, size = query.shape
        if not self.held:
            zeros = torch.zeros(batch, heads, size, size, device=query.device)
            self.held = {"count": zeros[:, 0, 0, 0], "mean": zeros[..., 0], "scatter": zeros}
        weights = asked[:, None, :, None].float()
        plain = self.rotation.back(query, positions)
        fresh, before = asked.sum(1).float(), self.held["count"]
        mean = (plain * weights).sum(2) / fresh.clamp(min=1)[:, None, None]
        away = (plain - mean[:, :, None]) * weights
        apart = mean - self.held["mean"]
        after = (before + fresh).clamp(min=1)
        # two sets of samples joined (Chan et al. 1979)
        between = apart[..., None] * apart[..., None, :] * (before * fresh / after)[:, None, None, None]
        self.held = {
            "count": before + fresh,
            "mean": self.held["mean"] + apart * (fresh / after)[:, None, None],
            "scatter": self.held["scatter"] + away.transpose(2, 3) @ away + between,
        }

    def scores(self, call: Call, valid: Tensor, now: Tensor) -> Tensor:
        """Of all slots, (batch, kv heads, slots) float32. valid as they are; now (batch,) the newest position."""
        keys, values = call.key.float(), call.value.float()
        batch, heads, _, size = keys.shape
        cos, sin = (each[:, None] for each in self.rotation.ahead(now, AHEAD))
        count = self.held["count"].clamp(min=1)[:, None, None, None]
        mean = turned(self.held["mean"], cos, sin).reshape(batch, heads, -1, size)
        half = turned(self.held["scatter"] / count, cos[:, :, None], sin[:, :, None])
        spread = turned(half.transpose(2, 3), cos[:, :, None], sin[:, :, None])
        spread = spread.reshape(batch, heads, -1, size, size)
        level = torch.einsum("bhsd,bhgd->bhgs", keys, mean) * call.scaling
        bent = torch.einsum("bhsd,bhgde,bhse->bhgs", keys, spread, keys) * (call.scaling**2 / 2)
        hidden = ~valid[:, :, None]
        shares = (level + bent).masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1).mean(2)
        lengths: Tensor = torch.linalg.vector_norm(values, dim=-1)
        return shares * lengths

    def renewed(self, spec: KvSpec, scores: Tensor, call: Call, asked: Tensor, valid: Tensor, count: Tensor) -> Tensor:
        """Scores after a call, computed anew if it had several tokens or every `interval` tokens of a row, and if any
        may go before the next time. Args: count (batch,): tokens of each row, without padding."""
        self.meet(call.query, (count[:, None] - asked.flip(1).cumsum(1).flip(1)).clamp(min=0), asked)
        if scores.shape[2] + spec.interval <= spec.budget:
            return scores
        due = (asked.sum(1) > 1) | (count % spec.interval == 0)
        if not bool(due.any()):
            return scores
        return torch.where(due[:, None, None], self.scores(call, valid, count - 1), scores)

    def rows(self, index: Tensor) -> None:
        """Take these rows of the batch."""
        self.held = {name: held.index_select(0, index) for name, held in self.held.items()}

    @property
    def nbytes(self) -> int:
        return sum(held.numel() * held.element_size() for held in self.held.values())
