"""A layer that keeps every token and attends at each step to some: the first, the newest, and those the query chooses.

How these are chosen is compress/kv/token_select.py and compress/kv/retrieval.py. Keys are read from any store. As long
as nothing is left out, attention is that of the cache without it, bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from compress.kv import selection
from compress.kv.attention import attended
from compress.kv.layer import KvLayer


class SelectLayer(KvLayer, ABC):
    """One layer's cache.

    position (batch, slots) int64, valid (batch, slots) bool: of what is stored, the same for all heads; recall: where
    it is set, each step adds to it how much of the true top keys was chosen, which takes all products.
    """

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, device = len(key_states), key_states.device
        self.position = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        self.valid = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        self.count = torch.zeros(batch, dtype=torch.int64, device=device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Returns: the new tokens alone; `attend` reads what is stored, and only what it needs of it."""
        self.enter()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.pending = key_states, value_states
        return self.pending

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        asked = self.asked(mask)
        candidates = self._candidates(asked)
        if self._takes_all(query, candidates):
            output = self._plainly(query, key, value, asked, scaling)
        else:
            output = self._selectively(query, key, value, asked, candidates, scaling)
        self._learn(query, asked)
        self._store(key, value, asked)
        return output

    def _candidates(self, asked: Tensor) -> Tensor:
        """Stored tokens that are neither of the first nor of the newest, (batch, slots) bool. The newest are counted
        with the first of the call's own."""
        oldest = self.count + 1 - self.spec.recent
        return self.valid & (self.position >= self.spec.sinks) & (self.position < oldest[:, None])

    def _takes_all(self, query: Tensor, candidates: Tensor) -> bool:
        """Whether nothing is left out."""
        return not candidates.numel() or int(candidates.sum(1).max()) <= self.spec.select

    def _plainly(self, query: Tensor, key: Tensor, value: Tensor, asked: Tensor, scaling: float) -> Tensor:
        keys, values = (store.read() for store in self.stores)
        if keys is not None and values is not None:
            key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        return attended(query, key, value, self.visible(asked), scaling)[0]

    def visible(self, asked: Tensor) -> Tensor:
        return self._seen(self.valid, asked)

    def _seen(self, slots: Tensor, asked: Tensor) -> Tensor:
        """slots (batch, some) bool that all new tokens see → with these, (batch, kv heads, n, some + n) bool."""
        assert self.pending is not None
        count, heads = asked.shape[1], self.pending[0].shape[1]
        causal = torch.ones(count, count, dtype=torch.bool, device=asked.device).tril() & asked[:, None]
        old = slots[:, None].expand(len(slots), count, slots.shape[1])
        return torch.cat([old, causal], 2)[:, None].expand(-1, heads, -1, -1)

    @abstractmethod
    def _selectively(
        self, query: Tensor, key: Tensor, value: Tensor, asked: Tensor, candidates: Tensor, scaling: float
    ) -> Tensor:
        """As `attend`, where there are more candidates than are chosen."""

    def _learn(self, query: Tensor, asked: Tensor) -> None:
        """Take note of queries."""

    def _store(self, key: Tensor, value: Tensor, asked: Tensor) -> None:
        new = self.count[:, None] + asked.cumsum(1) - 1
        self.seen, self.count, self.pending = self.seen + asked.shape[1], self.count + asked.sum(1), None
        self.position, self.valid = torch.cat([self.position, new], 1), torch.cat([self.valid, asked], 1)
        for store, states in zip(self.stores, (key, value), strict=True):
            store.append(states)

    def _with_new(self, index: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of slots (batch, n), the same for all heads, and after them the new ones."""
        wide = index[:, None].expand(-1, key.shape[1], -1)
        return torch.cat([self.stores[0].take(wide), key], 2), torch.cat([self.stores[1].take(wide), value], 2)

    def _keys(self) -> Tensor:
        keys = self.stores[0].read()
        assert keys is not None, "there are candidates"
        return keys

    def _recalled(self, query: Tensor, chosen: Tensor, candidates: Tensor, scaling: float) -> None:
        """Add a step to `recall`. query (batch, heads, size); chosen (batch, heads or 1, slots) bool."""
        if self.recall is None:
            return
        assert self.pending is not None
        new = self.pending[0][:, :, -1:]
        own = torch.ones_like(self.valid[:, :1])
        product = selection.products(query, torch.cat([self._keys(), new], 2), scaling)
        chosen = torch.cat([chosen, torch.zeros_like(chosen[..., :1])], -1)
        candidates = torch.cat([candidates, ~own], 1)
        self.recall.add(product, chosen, candidates, torch.cat([self.valid, own], 1), self.spec.select)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        if not self.is_initialized:
            return
        for store in self.stores:
            store.rows(indices)
        for name in ("position", "valid", "count"):
            setattr(self, name, getattr(self, name).index_select(0, indices))

    @property
    def nbytes(self) -> int:
        """Of all that is held: tokens, room for more of them, positions, what choices go by."""
        if not self.is_initialized:
            return 0
        beside = [self.position, self.valid, *self._beside()]
        return sum(store.nbytes for store in self.stores) + sum(held.numel() * held.element_size() for held in beside)

    def _beside(self) -> list[Tensor]:
        return []
