"""Each query head's own nearest keys, by an index."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kv import selection
from compress.kv.index import KeyIndex
from compress.kv.select import SelectLayer

LEAST = 512
"""Candidates from which on an index is built; fewer are searched exactly."""
GROWTH = 0.25
"""Share of an index's keys that may come after it, searched exactly, before it is built anew."""


class RetrievalLayer(SelectLayer):
    """RetrievalAttention (Liu et al. 2024, arXiv 2409.10516): each query head attends to its own nearest keys, found in
    an index of its key-value head, and to the first and newest tokens; the two are merged. Calls of several tokens
    (prompts) attend to everything, and their queries, thinned out evenly, build the index.

    asks (batch, heads, some, size): queries so far, every `stride`-th; asks_valid (batch, some).
    """

    def reset(self) -> None:
        super().reset()
        self.asks: Tensor | None = None
        self.asks_valid: Tensor
        self.stride = 1
        self.indexes: list[list[KeyIndex]] = []
        self.span = (0, 0)

    def _takes_all(self, query: Tensor, candidates: Tensor) -> bool:
        return query.shape[2] > 1 or super()._takes_all(query, candidates)

    def _selectively(
        self, query: Tensor, key: Tensor, value: Tensor, asked: Tensor, candidates: Tensor, scaling: float
    ) -> Tensor:
        now, kv = query[:, :, 0], key.shape[1]
        if self.spec.index == "exact":
            index, counts = self._exactly(now, candidates, scaling)
        else:
            index, counts = self._searched(now, candidates, scaling)
        if self.recall is not None:
            found = torch.zeros(*index.shape[:2], candidates.shape[1] + 1, dtype=torch.bool, device=index.device)
            found.scatter_(2, torch.where(counts, index, candidates.shape[1]), True)
            self._recalled(now, found[..., :-1], candidates, scaling)
        batch, heads, count = index.shape
        keys, values = (
            store.take(index.reshape(batch, kv, -1)).reshape(batch, heads, count, -1) for store in self.stores
        )
        retrieved = selection.part(query, keys, values, counts[:, :, None], scaling)
        static = self._static(query, key, value, asked, candidates, scaling)
        return selection.merged([retrieved, static]).to(query.dtype)

    def _static(
        self, query: Tensor, key: Tensor, value: Tensor, asked: Tensor, candidates: Tensor, scaling: float
    ) -> selection.Part:
        """Attention to the first and newest tokens and the new one."""
        batch, heads, _, size = query.shape
        index, counts = selection.places(self.valid & ~candidates)
        keys, values = self._with_new(index, key, value)
        seen = torch.cat([counts, asked], 1)[:, None, None]
        grouped = query.reshape(batch, key.shape[1], -1, size)
        output, total = selection.part(grouped, keys, values, seen, scaling)
        return output.reshape(batch, heads, 1, -1), total.reshape(batch, heads, 1)

    def _exactly(self, query: Tensor, candidates: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """Slots of the largest products of each head (batch, heads, select), and which of them count."""
        product = selection.products(query, self._keys(), scaling)
        product = product.masked_fill(~candidates[:, None], -torch.inf)
        best = product.topk(min(self.spec.select, product.shape[-1]), -1)
        return best.indices, best.values > -torch.inf

    def _searched(self, query: Tensor, candidates: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """As `_exactly`, by the index, and exactly among what came after it."""
        first, end = self._middle(candidates)
        if end - first < LEAST:
            return self._exactly(query, candidates, scaling)
        if not self.indexes or end - self.span[1] > GROWTH * (self.span[1] - self.span[0]):
            self._build(first, end)
        batch, heads, size = query.shape
        grouped = query.reshape(batch, len(self.indexes[0]), -1, size)
        found = torch.stack(
            [
                torch.cat([index.search(grouped[row, head], self.spec.select) for head, index in enumerate(indexes)])
                for row, indexes in enumerate(self.indexes)
            ]
        ).to(query.device)
        later = torch.arange(self.span[1], end, device=query.device).expand(batch, heads, -1)
        index = torch.cat([found.clamp(min=0) + self.span[0], later], 2)
        known = torch.cat([found >= 0, torch.ones_like(later, dtype=torch.bool)], 2)
        known &= candidates[:, None].expand(-1, heads, -1).gather(2, index)
        return self._best(query, index, known)

    def _best(self, query: Tensor, index: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Of slots (batch, heads, some) those with the largest products."""
        batch, heads, count = index.shape
        kv = len(self.indexes[0])
        keys = self.stores[0].take(index.reshape(batch, kv, -1)).reshape(batch, heads, count, -1)
        product = (keys * query[:, :, None]).sum(-1).masked_fill(~known, -torch.inf)
        best = product.topk(min(self.spec.select, count), -1)
        return index.gather(2, best.indices), best.values > -torch.inf

    @staticmethod
    def _middle(candidates: Tensor) -> tuple[int, int]:
        """From the first slot that is a candidate in any row to past the last."""
        held = candidates.any(0).nonzero()
        return int(held[0]), int(held[-1]) + 1

    def _build(self, first: int, end: int) -> None:
        keys, spec = self._keys()[:, :, first:end], self.spec
        batch, kv = keys.shape[:2]
        asks = None
        if spec.index == "linked" and self.asks is not None:
            asks = self.asks.reshape(batch, kv, -1, *self.asks.shape[2:])
        self.indexes = [
            [KeyIndex(keys[row, head], self._asks_of(asks, row, head), spec.links, spec.effort) for head in range(kv)]
            for row in range(batch)
        ]
        self.span = (first, end)

    def _asks_of(self, asks: Tensor | None, row: int, head: int) -> Tensor | None:
        """Queries that were no padding, (some, size)."""
        return None if asks is None else asks[row, head][:, self.asks_valid[row]].flatten(0, 1)

    def _learn(self, query: Tensor, asked: Tensor) -> None:
        if self.spec.index != "linked":
            return
        new = torch.arange(self.seen, self.seen + asked.shape[1], device=asked.device) % self.stride == 0
        fresh, valid = query[:, :, new], asked[:, new]
        if self.asks is not None:
            fresh, valid = torch.cat([self.asks, fresh], 2), torch.cat([self.asks_valid, valid], 1)
        while fresh.shape[2] > self.spec.queries:
            fresh, valid, self.stride = fresh[:, :, ::2], valid[:, ::2], self.stride * 2
        self.asks, self.asks_valid = fresh, valid

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.asks is not None:
            self.asks = self.asks.index_select(0, indices)
            self.asks_valid = self.asks_valid.index_select(0, indices)
        if self.indexes:
            self.indexes = [self.indexes[int(row)] for row in indices]

    def _beside(self) -> list[Tensor]:
        return [] if self.asks is None else [self.asks, self.asks_valid]

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(index.nbytes for indexes in self.indexes for index in indexes)
