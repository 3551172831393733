"""One layer of a `KvCache` (compress/kv/cache.py): what it stores, what of it is attended to, and which tokens go."""

from __future__ import annotations

import copy
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from compress.errors import UsageError
from compress.kv import heads, scorers, snapkv
from compress.kv.attention import attended
from compress.kv.expected import Call, Expected
from compress.kv.recall import Recall
from compress.kv.rotation import Rotation
from compress.kv.spec import KvSpec, LayerTensors
from compress.kv.stores import SlotStore, Store
from compress.kv.storing import store_of


class KvLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's cache. Args: tensors: those that the spec wants; rotation: the model's, where the scorer needs it.

    score, position, valid (batch, heads, slots): of what is stored; seen: tokens so far, padding too; count (batch,):
    those that are none.
    """

    is_croppable = False

    def __init__(self, spec: KvSpec, tensors: LayerTensors | None = None, rotation: Rotation | None = None) -> None:
        super().__init__()
        self.spec, self.tensors, self.rotation = spec, tensors or {}, rotation
        if lacking := [name for name in spec.wants if name not in self.tensors]:
            raise UsageError(f"A cache with {spec.told()} needs its tensor {lacking[0]}, which only data give.")
        if spec.turns and rotation is None:
            raise UsageError(f"{spec.told()}: that needs the model's rotary embedding. Make it by KvCache.attach.")
        self.recall: Recall | None = None
        self.reset()

    def reset(self) -> None:
        """Empty it."""
        keys, values = store_of(self.spec, "key", self.tensors), store_of(self.spec, "value", self.tensors)
        self.stores: tuple[Store, Store] = keys, values
        self.pending: tuple[Tensor, Tensor] | None = None
        self.expected = Expected(self.rotation) if self.spec.turns and self.rotation else None
        self.seen = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads = key_states.shape[:2]
        device = key_states.device
        self.score = torch.zeros(batch, heads, 0, device=device)
        self.position = torch.zeros(batch, heads, 0, dtype=torch.int64, device=device)
        self.valid = torch.zeros(batch, heads, 0, dtype=torch.bool, device=device)
        self.count = torch.zeros(batch, dtype=torch.int64, device=device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Returns: what was stored and the new tokens, (batch, heads, slots + n, size). They are stored once they have
        been attended to."""
        self.enter()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.pending = key_states, value_states
        found = []
        for store, states in zip(self.stores, self.pending, strict=True):
            old = self._read(store)
            found.append(states if old is None else torch.cat([old, states], 2))
        return found[0], found[1]

    def _read(self, store: Store) -> Tensor | None:
        """What is stored, (batch, heads, slots, size)."""
        return store.read()

    def enter(self) -> None:
        """Be the layer whose attention follows at once. Raises: UsageError where that of the last call did not."""
        if self.pending is not None:
            raise UsageError(
                "A compressed cache must go with its own attention, which the model does not use. Make it by "
                "KvCache.attach(model, …)."
            )
        current.set(self)

    def asked(self, mask: Tensor | None) -> Tensor:
        """Which of the new tokens are no padding, (batch, n) bool. mask: (batch, all tokens so far), or None."""
        assert self.pending is not None
        batch, _, count, _ = self.pending[0].shape
        if mask is None:
            return torch.ones(batch, count, dtype=torch.bool, device=self.count.device)
        return mask[:, -count:]

    def visible(self, asked: Tensor) -> Tensor:
        """Which slots and new tokens each new token sees, (batch, heads, n, slots + n) bool."""
        count = asked.shape[1]
        causal = torch.ones(count, count, dtype=torch.bool, device=asked.device).tril() & asked[:, None, None]
        batch, heads, slots = self.valid.shape
        old = self.valid[:, :, None].expand(batch, heads, count, slots)
        return torch.cat([old, causal.expand(batch, heads, count, count)], 3)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """What the new tokens get, which are stored then: (batch, heads, n, size).

        Args: module: the attention; query (batch, heads, n, size); key, value as `update` gave them; mask as `asked`
        takes it.
        """
        asked = self.asked(mask)
        output, probabilities = attended(query, key, value, self.visible(asked), scaling)
        features = heads.features_of(self.spec.scorer, module) if self.spec.learned else None
        call = Call(query, key, value, scaling) if self.spec.turns or self.spec.compares else None
        self.commit(asked, probabilities if self.spec.reads else None, features, call)
        return output

    def commit(
        self, asked: Tensor, probabilities: Tensor | None, features: Tensor | None = None, call: Call | None = None
    ) -> None:
        """Store the new tokens, and drop what is over the budget. probabilities (batch, query heads, n, slots + n);
        features (batch, n, inputs): what a learned scorer looks at (`heads.features_of`); call: what expected attention
        and unlike keys are computed of."""
        assert self.pending is not None
        keys, values = self.pending
        self.pending = None
        new = self.count[:, None] + asked.cumsum(1) - 1
        self.seen, self.count = self.seen + asked.shape[1], self.count + asked.sum(1)
        fresh = scorers.written(self.spec, keys, new) if features is None else self._judged(features, keys.shape[1])
        shape = fresh.shape
        self.score = torch.cat([self.score, fresh], 2)
        self.position = torch.cat([self.position, new[:, None].expand(shape)], 2)
        self.valid = torch.cat([self.valid, asked[:, None].expand(shape)], 2)
        if probabilities is not None and self.spec.scorer == "snapkv":
            self.score = snapkv.read(self.spec, self.score, probabilities, asked, self.position, self.valid)
        elif probabilities is not None:
            self.score = scorers.read(self.spec, self.score, probabilities, asked)
        if self.expected is not None and call is not None:
            self.score = self.expected.renewed(self.spec, self.score, call, asked, self.valid, self.count)
        if self.spec.compares and call is not None:
            self.score = scorers.unlike(call.key, self.valid)
        self._settle(keys, values)

    def _settle(self, keys: Tensor, values: Tensor) -> None:
        """Write new tokens, whose score, position and valid are the last; what is too much goes."""
        over = self.score.shape[2] - self.spec.budget if self.spec.evicts else 0
        if over == 1 and keys.shape[2] == 1:
            self._replace(keys, values)
            return
        for store, states in zip(self.stores, (keys, values), strict=True):
            store.append(states)
        if over > 0:
            self._compact()

    def _judged(self, features: Tensor, kv_heads: int) -> Tensor:
        """What the layer's head says, (batch, kv heads, n)."""
        heads.check(features, kv_heads, self.tensors)
        self.tensors = {name: tensor.to(features.device) for name, tensor in self.tensors.items()}
        return heads.scores_of(features, self.tensors)

    @property
    def _slots(self) -> tuple[SlotStore, SlotStore]:
        """The stores of a layer that drops tokens."""
        keys, values = self.stores
        assert isinstance(keys, SlotStore) and isinstance(values, SlotStore), "KvSpec refuses a residual here"
        return keys, values

    def _ranked(self) -> Tensor:
        return scorers.ranked(self.spec, self.score, self.position, self.valid, self.count - 1)

    def _replace(self, keys: Tensor, values: Tensor) -> None:
        """One token for one that goes, in its place: nothing else moves."""
        last = self.score.shape[2] - 1
        victim = self._ranked()[..., -1:]
        for store, states in zip(self._slots, (keys, values), strict=True):
            # a padding row's own new token goes: its slot is the one past the end, and nothing is written
            self._write(store, victim, states, last)
        into = victim.clamp(max=last - 1)
        is_new = victim == last
        for name in ("score", "position", "valid"):
            held = getattr(self, name)
            kept = torch.where(is_new, held[..., :last].gather(-1, into), held[..., last:])
            setattr(self, name, held[..., :last].scatter(-1, into, kept))

    @staticmethod
    def _write(store: SlotStore, victim: Tensor, states: Tensor, last: int) -> None:
        if not bool((victim == last).any()):
            store.replace(victim, states)
            return
        store.append(states)
        every = torch.arange(last, device=victim.device).expand(*victim.shape[:2], last)
        store.keep(torch.where(every == victim, last, every))

    def _compact(self) -> None:
        index = self._ranked()[..., : self.spec.budget].sort(-1).values
        for store in self._slots:
            store.keep(index)
        for name in ("score", "position", "valid"):
            setattr(self, name, getattr(self, name).gather(-1, index))

    def get_seq_length(self) -> int:
        """Tokens seen, padding too: of these positions follow, not of what is stored."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of the mask that transformers would make; ours is made of what is stored."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what was dropped or rounded does not come back."""
        raise UsageError("A compressed cache cannot be rewound. Use greedy search or sampling without a draft model.")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused where tokens are dropped."""
        if self.spec.evicts:
            raise UsageError(
                "Beam search reorders what beams have in common, which a cache that drops tokens no longer has. "
                "Use greedy search or sampling (num_beams=1)."
            )
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        if not self.is_initialized:
            return
        for store in self.stores:
            store.rows(indices)
        if self.expected is not None:
            self.expected.rows(indices)
        for name in ("score", "position", "valid", "count"):
            setattr(self, name, getattr(self, name).index_select(0, indices))

    def fork(self) -> Self:
        """See `KvCache.fork`."""
        forked = copy.copy(self)
        forked.stores = (self.stores[0].fork(), self.stores[1].fork())
        forked.expected = copy.copy(self.expected)
        return forked

    @property
    def nbytes(self) -> int:
        """Of all that is held: codes, scales, tokens in float, scores, positions, what queries were like."""
        if not self.is_initialized:
            return 0
        states = [self.score, self.position, self.valid] if self.spec.evicts else []
        more = self.expected.nbytes if self.expected is not None else 0
        more += sum(store.nbytes for store in self.stores)
        return more + sum(held.numel() * held.element_size() for held in states)


current: ContextVar[KvLayer] = ContextVar("current")
"""The layer that was updated last: its attention follows at once."""
