"""A language model or encoder of transformers in torch on the CPU: what sessions of such folders have in common."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from compress.runtime.greedy import greedy

Ids = NDArray[np.int64]


class TorchSession:
    """See compress.target.Session; what loads a folder is added by its target, with `name` and `load_s`.

    Args: model: of transformers, with its weights; threads for torch while a call runs.
    """

    name: str
    image_shape = ()
    """It takes token ids."""

    def __init__(self, model: Any, threads: int) -> None:
        self.model, self.threads = model, threads
        self.is_decoder = model.get_output_embeddings() is not None

    @property
    def provider(self) -> str:
        """What computes, as a placement tells it."""
        return f"torch {next(self.model.parameters()).device}"

    @torch.no_grad()
    def logits(self, ids: Ids) -> NDArray[np.float32]:
        """See compress.target.Session."""
        settings = {"use_cache": False} if self.is_decoder else {}
        with using_threads(self.threads):
            output = self.model(input_ids=torch.from_numpy(ids), **settings)
        first = output.logits if self.is_decoder else output.last_hidden_state
        result: NDArray[np.float32] = first.float().numpy()
        return result

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> list[int]:
        """See compress.target.Session."""
        cache = None

        def step(ids: Ids, _: Ids) -> torch.Tensor:
            nonlocal cache
            output = self.model(input_ids=torch.from_numpy(ids), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            last: torch.Tensor = output.logits[0, -1]
            return last

        with using_threads(self.threads):
            return greedy(step, prompt, count, stop)

    @torch.no_grad()
    def call(self, ids: Ids, past: int) -> Callable[[], None]:
        """See compress.target.Session. The cached tokens are zeros, read once."""
        tensor, cache = torch.from_numpy(ids), None
        if past and self.is_decoder:
            with using_threads(self.threads):
                filler = torch.zeros((len(ids), past), dtype=torch.int64)
                cache = self.model(input_ids=filler, use_cache=True, logits_to_keep=1).past_key_values

        @torch.no_grad()
        def once() -> None:
            with using_threads(self.threads):
                if self.is_decoder:
                    self.model(input_ids=tensor, past_key_values=_fork(cache), use_cache=True)
                else:
                    self.model(input_ids=tensor)

        return once


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
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    return forked
