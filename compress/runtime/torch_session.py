"""A language model or encoder of transformers in torch on the CPU: what sessions of such folders have in common."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from compress.kv.cache import KvCache, use_attention
from compress.kv.recall import Recall
from compress.kv.spec import KvSpec, LayerTensors
from compress.models.folder import positions
from compress.runtime.greedy import greedy
from compress.runtime.probing import LONG

Ids = NDArray[np.int64]


class TorchSession:
    """See compress.target.Session; what loads a folder is added by its target, with `name` and `load_s`.

    Args: model: of transformers, with its weights; threads for torch while a call runs; caches: how each layer's keys
    and values are cached, empty where transformers does it, and tensors what they need beside that. Then `logits` are
    those of tokens that come one by one, as in generating, so that what the cache loses is in them.
    """

    name: str
    image_shape = ()
    """It takes token ids."""

    def __init__(
        self, model: Any, threads: int, caches: tuple[KvSpec, ...] = (), tensors: tuple[LayerTensors, ...] = ()
    ) -> None:
        self.model, self.threads, self.caches, self.tensors = model, threads, caches, tensors
        self.is_decoder = model.get_output_embeddings() is not None
        self._attention = str(model.config._attn_implementation)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    @property
    def provider(self) -> str:
        """What computes, as a placement tells it."""
        return f"torch {next(self.model.parameters()).device}"

    def logits(self, ids: Ids) -> NDArray[np.float32]:
        """See compress.target.Session."""
        return self.one_by_one(ids, self.fresh_cache()) if self.caches else self._at_once(ids)

    @property
    def plain(self) -> Self | Plain:
        """The model without what its cache loses."""
        if not self.caches:
            return self
        return Plain(self.name, self._at_once, getattr(self, "level", "ran"), tuple(getattr(self, "notes", ())))

    @contextlib.contextmanager
    def _own_attention(self) -> Iterator[None]:
        """The model's own attention, where another goes with its cache."""
        if not self.caches:
            yield
            return
        self.model.set_attn_implementation(self._attention)
        try:
            yield
        finally:
            use_attention(self.model)

    def cache_use(self) -> tuple[int, int]:
        """Tokens of a sequence as long as the model reads, at most `probing.LONG`, and bytes that are held of its keys
        and values once it was read."""
        tokens = min(LONG, positions(self.model.config.get_text_config()))
        with using_threads(self.threads):
            found = self.read(torch.zeros((1, tokens), dtype=torch.int64), self.fresh_cache(), logits_to_keep=1)
        cache = found.past_key_values
        if isinstance(cache, KvCache):
            return tokens, cache.nbytes
        states = [held for layer in cache.layers for held in (layer.keys, layer.values)]
        return tokens, sum(held.numel() * held.element_size() for held in states)

    def fresh_cache(self) -> Any:
        """An empty cache; None where transformers makes its own."""
        return KvCache.attach(self.model, self.caches, self.tensors) if self.caches else None

    @property
    def chunk(self) -> int:
        """Tokens of a prompt that are read at once; 0: all."""
        return min((spec.chunk for spec in self.caches if spec.evicts or spec.selects), default=0)

    @torch.no_grad()
    def read(self, ids: torch.Tensor, cache: Any, mask: torch.Tensor | None = None, **settings: Any) -> Any:
        """What the model puts out for tokens after a cache, which grows by them: a prompt in pieces of `chunk`.

        Args: mask (batch, all tokens so far): 0 for padding, on the left; None where there is none.
        """
        size, before = self.chunk or ids.shape[1], 0 if mask is None else mask.shape[1] - ids.shape[1]
        for at in range(0, ids.shape[1], size):
            piece = ids[:, at : at + size]
            if mask is not None:
                settings["attention_mask"] = seen = mask[:, : before + at + size]
                if self._takes_positions:
                    settings["position_ids"] = (seen.cumsum(-1) - 1).clamp(min=0)[:, -piece.shape[1] :]
            output = self.model(input_ids=piece, past_key_values=cache, use_cache=True, **settings)
            cache = output.past_key_values
        return output

    @torch.no_grad()
    def one_by_one(self, ids: Ids, cache: KvCache | None = None) -> NDArray[np.float32]:
        """ids (batch, length) → logits (batch, length, vocabulary), read a token at a time as generating does. cache:
        an empty one; None for transformers' own, with the attention that goes with it."""
        found, past = [], cache
        with using_threads(self.threads), self._own_attention() if cache is None else contextlib.nullcontext():
            for token in torch.from_numpy(ids).T[..., None]:
                output = self.model(input_ids=token, past_key_values=past, use_cache=True)
                past = output.past_key_values
                found.append(output.logits)
        result: NDArray[np.float32] = torch.cat(found, 1).float().numpy()
        return result

    def recall(self, ids: Ids) -> Recall:
        """What choices of tokens find of the true top keys, ids (batch, length) being read one by one."""
        cache = KvCache.attach(self.model, self.caches, self.tensors)
        cache.watch()
        self.one_by_one(ids, cache)
        return cache.recall

    @torch.no_grad()
    def _at_once(self, ids: Ids) -> NDArray[np.float32]:
        settings = {"use_cache": False} if self.is_decoder else {}
        with using_threads(self.threads), self._own_attention():
            output = self.model(input_ids=torch.from_numpy(ids), **settings)
        first = output.logits if self.is_decoder else output.last_hidden_state
        result: NDArray[np.float32] = first.float().numpy()
        return result

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> list[int]:
        """See compress.target.Session."""
        cache = self.fresh_cache()

        def step(ids: Ids, _: Ids) -> torch.Tensor:
            nonlocal cache
            output = self.read(torch.from_numpy(ids), cache)
            cache = output.past_key_values
            last: torch.Tensor = output.logits[0, -1]
            return last

        with using_threads(self.threads):
            return greedy(step, prompt, count, stop)

    @torch.no_grad()
    def call(self, ids: Ids, past: int) -> Callable[[], None]:
        """See compress.target.Session. The cached tokens are zeros, read once."""
        tensor, cache = torch.from_numpy(ids), self.fresh_cache()
        if past and self.is_decoder:
            with using_threads(self.threads):
                filler = torch.zeros((len(ids), past), dtype=torch.int64)
                cache = self.read(filler, cache, logits_to_keep=1).past_key_values

        @torch.no_grad()
        def once() -> None:
            with using_threads(self.threads):
                if self.is_decoder:
                    self.read(tensor, _fork(cache))
                else:
                    self.model(input_ids=tensor)

        return once


@dataclass(frozen=True)
class Plain:
    """A runner of logits alone."""

    name: str
    logits: Callable[[Ids], NDArray[np.float32]]
    level: str
    notes: tuple[str, ...]


@contextlib.contextmanager
def using_threads(count: int) -> Iterator[None]:
    """torch with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fork(cache: Any) -> Any:
    """A cache that may grow while the original stays: layers put new tensors in place of theirs, none is written to."""
    if cache is None:
        return None
    if isinstance(cache, KvCache):
        return cache.fork()
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    return forked
