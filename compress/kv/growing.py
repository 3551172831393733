"""A store in float that grows in place: a token is not copied at each later step, as where tensors are joined."""

from __future__ import annotations

import copy
import weakref
from typing import Self

import torch
from torch import Tensor

from compress.kv.stores import Store

_ROOM = 128
"""Tokens of room that are made at least."""


class GrowingStore(Store):
    """Tokens as computed in one tensor with room for more, (batch, heads, room, size).

    Forks share it until one of them would write where another has.
    """

    def __init__(self) -> None:
        self.held: Tensor | None = None
        self._sharers: weakref.WeakSet[GrowingStore] = weakref.WeakSet([self])

    def append(self, states: Tensor) -> None:
        after = self.slots + states.shape[2]
        if self.held is None or self.held.shape[2] < after or self._is_behind():
            self._take_room(states, after)
        assert self.held is not None
        self.held[:, :, self.slots : after] = states
        self.slots = after

    def _is_behind(self) -> bool:
        """Whether a fork has written past what this one holds."""
        return any(other.slots > self.slots for other in self._sharers)

    def _take_room(self, like: Tensor, slots: int) -> None:
        room = slots + max(_ROOM, slots // 4)
        held = like.new_empty(*like.shape[:2], room, like.shape[3])
        if self.held is not None:
            held[:, :, : self.slots] = self.held[:, :, : self.slots]
        self._own(held)

    def _own(self, held: Tensor) -> None:
        self._sharers.discard(self)
        self.held, self._sharers = held, weakref.WeakSet([self])

    def read(self) -> Tensor | None:
        return None if self.held is None else self.held[:, :, : self.slots]

    def rows(self, index: Tensor) -> None:
        if self.held is not None:
            self._own(self.held.index_select(0, index))

    def fork(self) -> Self:
        forked = copy.copy(self)
        self._sharers.add(forked)
        return forked

    @property
    def nbytes(self) -> int:
        return 0 if self.held is None else torch.numel(self.held) * self.held.element_size()
