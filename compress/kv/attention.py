"""Attention of new tokens to what a cache holds and to each other: a pure function on tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def attended(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention as transformers computes it: (batch, heads, n, size), and its probabilities (batch, heads, n, slots).

    Args: query (batch, heads, n, size); key, value (batch, kv heads, slots, size); seen (batch, kv heads, n, slots)
    bool.
    """
    groups = query.shape[1] // key.shape[1]
    products = torch.matmul(query, _repeat(key, groups).transpose(2, 3)) * scaling
    products = products.masked_fill(~seen.repeat_interleave(groups, 1), torch.finfo(products.dtype).min)
    probabilities = products.softmax(-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(probabilities, _repeat(value, groups)), probabilities


def _repeat(states: Tensor, groups: int) -> Tensor:
    """Each head of keys or values for the query heads of its group."""
    return states.repeat_interleave(groups, 1) if groups > 1 else states
