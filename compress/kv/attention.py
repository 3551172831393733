"""Attention of new tokens to what a cache holds and to each other, and which models let theirs be exchanged for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UnsupportedError


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


def require_plain(model: nn.Module) -> None:
    """Raises: UnsupportedError for a model, with or without weights, whose attention cannot be exchanged for ours."""
    config: Any = model.config
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])
    other = ", ".join(sorted(kinds)) if kinds != {"full_attention"} else ""
    if other or not model._can_set_attn_implementation():  # type: ignore[operator]
        what = f"attention of another kind ({other})" if other else "an attention of its own"
        raise UnsupportedError(
            f"{type(model).__name__} has {what}, whose cache cannot be compressed. Supported: full attention through "
            "transformers' interface (Llama, Qwen, Mistral)."
        )


def padding_mask(*, mask_function: Callable[..., Any], attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """transformers' mask interface: which tokens are no padding, (batch, all so far); the slots tell the rest."""
    from transformers.masking_utils import causal_mask_function

    if mask_function is not causal_mask_function:
        raise UnsupportedError("A compressed cache goes with plain causal attention, and this model masks otherwise.")
    return attention_mask
