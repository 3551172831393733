"""Mixtures of experts through transformers' experts interface: one expert after the other, so that what enters each
can be seen.

The interface's modules hold 3-D parameters `gate_up_proj` (or `up_proj`) and `down_proj`, seen here as one layer per
expert: `<module>.gate_up_proj.3`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

EACH = "compress_each"
_OBSERVER = "_compress_observe"

Observer = Callable[[str, int, Tensor], None]
"""Called with the parameter's key, the expert and its inputs (tokens, in)."""


def is_experts(module: nn.Module) -> bool:
    """Whether a module goes through the interface (its decorator sets these)."""
    return all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias", "_apply_gate"))


def owner(user: str) -> tuple[str, str, int]:
    """Module path, parameter key and expert of a layer's user."""
    path, _, index = user.rpartition(".")
    module, _, key = path.rpartition(".")
    return module, key, int(index)


def up_key(module: Any) -> str:
    """The key of the parameter that the inputs meet first."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def activate(module: Any, values: Tensor) -> Tensor:
    """What is between the two products: (tokens, out of the first) → (tokens, in of the second)."""
    result: Tensor = module._apply_gate(values) if module.has_gate else module.act_fn(values)
    return result


def register() -> None:
    """Make `EACH` known to transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EACH, each)


def each(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden (tokens, features), top_k_index and top_k_weights (tokens, k) → (tokens, features)."""
    observe: Observer | None = module.__dict__.get(_OBSERVER)
    result = torch.zeros_like(hidden)
    for expert in range(getattr(module, up_key(module)).shape[0]):
        tokens, places = torch.where(top_k_index == expert)
        if tokens.numel() == 0:
            continue
        inner = activate(module, _product(module, up_key(module), expert, hidden[tokens], observe))
        outer = _product(module, "down_proj", expert, inner, observe)
        if module.has_post_expert_norm:
            outer = module.post_expert_norm(outer)
        result.index_add_(0, tokens, outer * top_k_weights[tokens, places, None])
    return result


def _product(module: Any, key: str, expert: int, values: Tensor, observe: Observer | None) -> Tensor:
    if observe is not None:
        observe(key, expert, values)
    weight = getattr(module, key)[expert]
    result: Tensor = values @ (weight if module.is_transposed else weight.T)
    if module.has_bias:
        result = result + getattr(module, f"{key}_bias")[expert]
    return result


def set_observer(module: nn.Module, observe: Observer | None) -> None:
    """Show `observe` what enters each expert of a module, or no longer."""
    if observe is None:
        module.__dict__.pop(_OBSERVER, None)
    else:
        module.__dict__[_OBSERVER] = observe
