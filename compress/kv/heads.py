"""Heads that score a token as it is written, from what its attention makes of it: trained on the model's own attention.

`locret` (Huang et al. 2024, arXiv 2410.01805) looks at the token's query, key and value, `kvzap` (arXiv 2601.07891) at
the hidden state that goes into the attention. A head's tensors, all float32:

    head.first        (width, inputs)     absent from one that is linear
    head.first_bias   (width,)            of kvzap
    head.second       (kv heads, width), or (kv heads, inputs) of one that is linear
    head.second_bias  (kv heads,)         of kvzap

`scores_of` is plain operators of torch, so that a captured graph holds the very same head. Its features are caught by
hooks (`catch`) which do nothing but keep them until the attention is done.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.errors import InputError, UnsupportedError, UsageError
from compress.kv.observed import attentions_in, projections
from compress.kv.spec import LayerTensors


def scores_of(features: Tensor, tensors: LayerTensors) -> Tensor:
    """What a head says of tokens: features (batch, n, inputs) → scores (batch, kv heads, n) float32, higher ones stay.

    SiLU lies between the two layers, where there are two. Scores of different heads are not on one scale.
    """
    inner = features.float()
    if "head.first" in tensors:
        inner = functional.silu(functional.linear(inner, tensors["head.first"], tensors.get("head.first_bias")))
    return functional.linear(inner, tensors["head.second"], tensors.get("head.second_bias")).transpose(1, 2)


def check(features: Tensor, kv_heads: int, tensors: LayerTensors) -> None:
    """Raises: InputError for a head that is not of this attention."""
    inputs, outputs = tensors.get("head.first", tensors["head.second"]).shape[1], tensors["head.second"].shape[0]
    if (inputs, outputs) != (features.shape[-1], kv_heads):
        raise InputError(
            f"A cache's head makes {outputs} scores of {inputs} features, but the attention has {kv_heads} key-value "
            f"heads and {features.shape[-1]} features: it is of another model. Copy model and caches again."
        )


@dataclass
class _Caught:
    """Of the attention that computes now: what went in, and what its projections put out so far."""

    module: nn.Module
    hidden: Tensor
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)


_caught: ContextVar[_Caught | None] = ContextVar("_caught", default=None)


def _enter(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    hidden = given[0] if given else named.get("hidden_states")
    _caught.set(_Caught(module, hidden) if isinstance(hidden, Tensor) else None)


def _project(module: nn.Module, _: tuple[Any, ...], output: Tensor) -> None:
    caught = _caught.get()
    if caught is not None:
        caught.outputs[module] = output


def _leave(*_: Any) -> None:
    _caught.set(None)


def catch(model: nn.Module) -> None:
    """Let all attentions of a model keep what heads look at while they compute, once however often this is called.

    Raises: UnsupportedError where there is none that is known.
    """
    found = attentions_in(model)
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__} has no attention whose projections are known to learned scorers."
        )
    for module in found:
        if _enter not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_enter, with_kwargs=True)
            module.register_forward_hook(_leave, always_call=True)  # after an error too
        for each in projections(module):
            if _project not in each._forward_hooks.values():
                each.register_forward_hook(_project)


def kept(module: nn.Module) -> tuple[Tensor, ...]:
    """What goes into an attention that computes now, and what its projections put out; nothing where `catch` was not
    called, or the attention computes otherwise."""
    caught = _caught.get()
    if caught is None or caught.module is not module:
        return ()
    outputs = [caught.outputs.get(each) for each in projections(module)]
    found = [each for each in outputs if each is not None]
    return (caught.hidden, *found) if len(found) == len(outputs) else ()


def features_of(scorer: str, module: nn.Module) -> Tensor:
    """What a learned scorer looks at, of the tokens that an attention computes now: (batch, n, inputs).

    Raises: UsageError where nothing was kept.
    """
    found = kept(module)
    if not found:
        raise UsageError(
            f"Scores by {scorer} look at what goes into the attention, which was not kept. Make the cache by "
            "KvCache.attach(model, …), again where modules of the model were exchanged after it."
        )
    return found[0] if scorer == "kvzap" else torch.cat(found[1:], -1)
