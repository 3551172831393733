"""A layer whose heads hold unlike numbers of tokens (AdaKV, Feng et al. 2024, arXiv 2407.11550), really stored so.

Each row of a batch keeps heads · budget tokens in all, so a flat store of that many slots holds them without padding,
the heads one after the other; how many each has is `held`. While a call is on, heads are laid out side by side, as many
slots each as the one with the most, what is not there marked as not valid: of one layer at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compress.kv import scorers
from compress.kv.layer import KvLayer
from compress.kv.spec import KvSpec
from compress.kv.stores import SlotStore, Store


class FlatLayer(KvLayer):
    """Between calls score, position and valid are (batch, slots of all heads), and so are the stores (batch, 1, slots
    of all heads, …). held (batch, heads) int64: the slots of each head."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.score, self.position, self.valid = (each.flatten(1) for each in (self.score, self.position, self.valid))
        self.held = torch.zeros(key_states.shape[:2], dtype=torch.int64, device=key_states.device)

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """See `KvLayer.update`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.pending is None:
            self._lay_out()
        return super().update(key_states, value_states)

    def _lay_out(self) -> None:
        """Score, position and valid by head, (batch, heads, most slots of any); _index: the flat slot of each."""
        width = int(self.held.max())
        place = torch.arange(width, device=self.held.device)
        begin = self.held.cumsum(1) - self.held
        self._there = place < self.held[..., None]
        self._index = (begin[..., None] + place).clamp(max=max(self.score.shape[1] - 1, 0))
        for name in ("score", "position", "valid"):
            flat = getattr(self, name)
            setattr(self, name, flat.gather(1, self._index.flatten(1)).view(self._index.shape))
        self.valid = self.valid & self._there

    def _read(self, store: Store) -> Tensor | None:
        flat = store.read()
        if flat is None:
            return None
        index = self._index.flatten(1)[:, None, :, None]
        found = flat.gather(2, index.expand(*index.shape[:3], flat.shape[-1]))
        return found.view(*self._index.shape, flat.shape[-1])

    def _settle(self, keys: Tensor, values: Tensor) -> None:
        batch, heads, count, _ = keys.shape
        slots = int(self.held[0].sum())
        new = slots + torch.arange(heads * count, device=keys.device).view(1, heads, count)
        index = torch.cat([self._index, new.expand(batch, heads, count)], 2)
        there = torch.cat([self._there, torch.ones_like(new, dtype=torch.bool).expand(batch, heads, count)], 2)
        room = heads * self.spec.budget
        if slots + heads * count > room:
            there = kept(self.spec, self.score, self.position, self.valid, there, self.count - 1)
        order = there.flatten(1).nonzero()[:, 1].view(batch, -1)
        for store, states in zip(self.stores, (keys, values), strict=True):
            assert isinstance(store, SlotStore), "KvSpec refuses a residual here"
            store.append(states.reshape(batch, 1, heads * count, -1))
            store.keep(index.flatten(1).gather(1, order)[:, None])
        for name in ("score", "position", "valid"):
            setattr(self, name, getattr(self, name).flatten(1).gather(1, order))
        self.held = there.sum(2)
        del self._index, self._there

    def positions(self, row: int) -> list[list[int]]:
        """Of the tokens that each head holds of a row of the batch, padding left out."""
        owner = torch.arange(self.held.shape[1], device=self.held.device).repeat_interleave(self.held[row])
        return [self.position[row, (owner == head) & self.valid[row]].tolist() for head in range(self.held.shape[1])]

    def batch_select_indices(self, indices: Tensor) -> None:
        """See `KvLayer.batch_select_indices`."""
        super().batch_select_indices(indices)
        if self.is_initialized:
            self.held = self.held.index_select(0, indices)

    @property
    def nbytes(self) -> int:
        return super().nbytes + (self.held.numel() * self.held.element_size() if self.is_initialized else 0)


def kept(spec: KvSpec, scores: Tensor, positions: Tensor, valid: Tensor, there: Tensor, now: Tensor) -> Tensor:
    """Which slots stay, heads · budget of each row, (batch, heads, slots) bool.

    Each head keeps its best `floor` · budget; of the others the best of all heads stay, of equal ones the newer and of
    the lower head. Padding goes before any token. Args: as of `scorers.ranks`; there: whether it is a slot at all.
    """
    batch, heads, slots = scores.shape
    best = scorers.ranked(spec, scores, positions, valid, now)
    place = torch.empty_like(best).scatter_(2, best, torch.arange(slots, device=best.device).expand_as(best))
    own = valid & (place < math.ceil(spec.floor * spec.budget))
    level = there.long() + valid.long() + own.long()  # 0: no slot, 1 padding, 2 a token, 3 one that its head keeps
    order = torch.arange(heads * slots, device=best.device).expand(batch, -1)
    ranks = scorers.ranks(spec, scores, positions, valid, now)
    for key in (positions, ranks, level):  # from what decides last to what decides first
        order = order.gather(1, key.flatten(1).gather(1, order).argsort(dim=1, descending=True, stable=True))
    chosen = torch.zeros(batch, heads * slots, dtype=torch.bool, device=best.device)
    return chosen.scatter_(1, order[:, : heads * spec.budget], True).view(batch, heads, slots)
