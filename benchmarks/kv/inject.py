"""Outliers put into the keys and values of a Llama-type model without changing what it computes.

Small models lack the channels of large absolute value that keys of large models have (KIVI, arXiv 2402.02750; KVQuant,
arXiv 2401.18079), and without them a scale per token and one per channel cost the same. A factor moved from a query to
its key, or from W_o's columns to V's rows, cancels: the model stays the same and its cache becomes as hard as theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FACTOR = 16.0
"""A power of two, so that nothing is rounded."""
PAIRS, CHANNELS = 2, 2
"""Of keys and of values, per head."""


@torch.no_grad()
def inject(
    model: nn.Module, seed: int = 0, factor: float = FACTOR, pairs: int = PAIRS, channels: int = CHANNELS
) -> None:
    """Change every attention of a model in place.

    Keys: `pairs` rotary pairs of channels (d, d + size/2) of each key-value head times `factor`, the same of its query
    heads divided by it: both members, or the rotation would not commute. They are of the slower half, which hardly
    turns within a text, as in models that have outliers of their own. Values: `channels` rows of V times `factor`, the
    columns of W_o that read them divided.

    Raises: ValueError for an attention that normalizes queries or keys, which undoes it.
    """
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    for attention in _attentions(model):
        if hasattr(attention, "q_norm") or hasattr(attention, "k_norm"):
            raise ValueError(f"{type(attention).__name__} normalizes queries and keys: a factor of them has no effect.")
        size, heads = attention.head_dim, config.num_key_value_heads
        groups = config.num_attention_heads // heads
        for head in range(heads):
            half = size // 2
            first = half // 2 + torch.randperm(half - half // 2, generator=generator)[:pairs]
            chosen = torch.cat([first, first + half])
            _scale(attention.k_proj, head * size + chosen, factor)
            for query in range(head * groups, (head + 1) * groups):
                _scale(attention.q_proj, query * size + chosen, 1 / factor)
            rows = torch.randperm(size, generator=generator)[:channels]
            _scale(attention.v_proj, head * size + rows, factor)
            for query in range(head * groups, (head + 1) * groups):
                attention.o_proj.weight[:, query * size + rows] /= factor


def _attentions(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "q_proj") and hasattr(module, "o_proj")]


def _scale(linear: nn.Linear, rows: Tensor, factor: float) -> None:
    linear.weight[rows] *= factor
    if linear.bias is not None:
        linear.bias[rows] *= factor
