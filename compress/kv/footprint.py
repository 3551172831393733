"""How much a cache will hold, before there is any: for the plan. Asked of the very stores, with tokens of zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

from compress.kv.spec import KvSpec
from compress.kv.storing import store_of

STATE_BYTES = 4 + 8 + 1
"""Of a token where tokens are dropped: its score, position, and whether it is one."""


def held_bytes(
    spec: KvSpec, heads: int, kv_heads: int, size: int, tokens: int, shapes: Mapping[str, tuple[int, ...]]
) -> int:
    """Bytes of one layer's cache of one sequence in torch, in float32 where it does not round.

    Args: heads of queries and of keys and values, their size; tokens that were read; shapes of the tensors that the
    spec wants.
    """
    kept = min(tokens, spec.budget) if spec.evicts else tokens
    tensors = {name: torch.ones(shapes[name]) for name in spec.wants if name.endswith("_scale")}
    total = 0
    parts: tuple[Literal["key", "value"], ...] = ("key", "value")
    for part in parts:
        store = store_of(spec, part, tensors)
        store.append(torch.zeros(1, kv_heads, kept, size))
        total += store.nbytes
    if spec.evicts:
        total += kv_heads * kept * STATE_BYTES
    if spec.turns:  # what its queries were like: their number, mean and scatter
        total += 4 * (1 + heads * size + heads * size * size)
    return total
