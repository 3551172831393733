"""How a cache is examined: it reads a context, drops what it drops, and then is asked.

`blind`: it reads the context, and the question comes after. `aware`: the question is read with the context, so that
what it attends to can be kept; the answer's first token then comes of the full cache, and only answers of several
tokens tell something. Answers are greedy: right where each token is the likeliest after those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tasks import Batch
from torch import Tensor, nn

from compress.kv import scorers
from compress.kv.cache import KvCache, use_attention
from compress.kv.layer import KvLayer
from compress.kv.spec import KvSpec

Protocol = Literal["blind", "aware"]
MakeCache = Callable[[slice], KvCache]
ROWS = 64
"""Examples that are read at once."""


class GivenLayer(KvLayer):
    """A layer that keeps by scores that are known beforehand, of every position: what an oracle or chance would do."""

    def __init__(self, spec: KvSpec, given: Tensor) -> None:
        """given: (batch, heads, positions) float; tokens past the end score 0."""
        super().__init__(spec)
        self.given = given

    def _ranked(self) -> Tensor:
        past = max(0, int(self.position.max()) + 1 - self.given.shape[-1])
        score = nn.functional.pad(self.given, (0, past)).gather(-1, self.position.clamp(min=0))
        return scorers.ranked(self.spec, score, self.position, self.valid, self.count - 1)


@dataclass(frozen=True)
class Answered:
    """right (examples,): whether the whole answer was; nbytes: held per example once the context had been read."""

    right: NDArray[np.bool_]
    nbytes: float


def plain(model: nn.Module, specs: Sequence[KvSpec]) -> MakeCache:
    """Our caches, as users have them."""
    return lambda _: KvCache.attach(model, specs)


def oracle(model: nn.Module, specs: Sequence[KvSpec], asked: Batch, heads: int) -> MakeCache:
    """Needed tokens first, those that follow them next, then the newest: nothing that knows the budget alone does
    better."""
    needed = torch.from_numpy(asked.needed).float()
    after = nn.functional.pad(needed, (1, 0))[:, :-1]
    newest = torch.arange(needed.shape[1]) / needed.shape[1]
    score = (4 * needed + 2 * after + newest)[:, None].expand(-1, heads, -1)
    return _given(model, specs, lambda layer: score)


def chance(model: nn.Module, specs: Sequence[KvSpec], asked: Batch, heads: int, shared: bool, seed: int) -> MakeCache:
    """Random scores; shared: the same in all heads and layers."""
    count, length = asked.context.shape
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(len(specs), count, heads, length, generator=generator)
    if shared:
        drawn = drawn[:1, :, :1].expand_as(drawn)
    return _given(model, specs, lambda layer: drawn[layer])


def _given(model: nn.Module, specs: Sequence[KvSpec], scores: Callable[[int], Tensor]) -> MakeCache:
    def make(rows: slice) -> KvCache:
        use_attention(model)
        return KvCache(layers=[GivenLayer(spec, scores(layer)[rows]) for layer, spec in enumerate(specs)])

    return make


@torch.no_grad()
def examine(model: nn.Module, asked: Batch, make: MakeCache, protocol: Protocol) -> Answered:
    """Answers of a model with a cache, example by example."""
    right, held = [], 0
    for start in range(0, len(asked.context), ROWS):
        rows = slice(start, start + ROWS)
        context, question, answer = (
            torch.from_numpy(part[rows]) for part in (asked.context, asked.question, asked.answer)
        )
        cache = make(rows)
        read = context if protocol == "blind" else torch.cat([context, question], 1)
        first = model(read, past_key_values=cache, use_cache=True).logits[:, -1:]
        held += cache.nbytes
        rest = torch.cat([question, answer], 1)[:, :-1] if protocol == "blind" else answer[:, :-1]
        logits = model(rest, past_key_values=cache, use_cache=True).logits if rest.shape[1] else first[:, :0]
        logits = torch.cat([first, logits], 1)[:, -answer.shape[1] :]
        right.append((logits.argmax(-1) == answer).all(1).numpy())
    return Answered(np.concatenate(right), held / len(asked.context))
