"""What a model's own attention meets on data: for passes that fit a cache to it (`KvPass.observe`)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UnsupportedError

SEEN = "compress_kv_seen"
"""Plain attention that tells what it was given, as transformers knows it."""

_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",), ("query_key_value",), ("c_attn",))


@dataclass(frozen=True)
class Attended:
    """One batch at one attention, without padding; positions are 0 to n − 1.

    hidden (batch, n, hidden size): what goes into its projections; query (batch, heads, n, size), key, value (batch, kv
    heads, n, size): with their rotation, as they are attended to and cached; scaling: of the products; named: what else
    the attention was called with (`position_embeddings` …).
    """

    module: nn.Module
    hidden: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    named: Mapping[str, Any] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        """Query heads of a key-value head; those of head i are i · groups and the next."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def projected(self) -> Tensor:
        """Queries, keys and values of each token side by side as the projections put them out, before any rotation or
        norm: (batch, n, (heads + 2 kv heads) · size)."""
        return torch.cat([each(self.hidden) for each in projections(self.module)], -1)

    def logits(self, queries: slice) -> Tensor:
        """Scaled products of some queries with all keys, not masked, (batch, kv heads, groups, queries, n) float32."""
        batch, kv_heads, _, size = self.key.shape
        asked = self.query[:, :, queries].reshape(batch, kv_heads, self.groups, -1, size).float()
        return torch.einsum("bhgqd,bhkd->bhgqk", asked, self.key.float()) * self.scaling

    def weights(self, queries: slice) -> Tensor:
        """The attention of some queries to all keys up to their own, shaped as `logits`, in sum 1."""
        places = torch.arange(self.key.shape[2], device=self.key.device)
        return self.logits(queries).masked_fill(places > places[queries, None], -torch.inf).softmax(-1)


def again(seen: Attended, hidden: Tensor) -> Attended:
    """The same attention at the same positions on other hidden states, shaped alike."""
    caches = ("past_key_values", "layer_past")  # which would grow
    named = {name: value for name, value in seen.named.items() if name not in caches}
    with torch.no_grad(), watching(seen.module) as found:
        seen.module(hidden_states=hidden, **named)
    return found[0]


def projections(module: nn.Module) -> list[nn.Module]:
    """What makes an attention's queries, keys and values: one module each, or one for all.

    Raises: UnsupportedError for an attention that has them under other names.
    """
    for names in _PROJECTIONS:
        found = [child for name in names if (child := getattr(module, name, None)) is not None]
        if len(found) == len(names):
            return found
    known = "; ".join(", ".join(names) for names in _PROJECTIONS)
    raise UnsupportedError(f"{type(module).__name__} has projections under names that are not known. Known: {known}.")


def attentions_in(model: nn.Module) -> list[nn.Module]:
    """All attentions in a model, or in a block, as far as they are known."""
    return [
        module
        for module in model.modules()
        if any(all(hasattr(module, name) for name in names) for names in _PROJECTIONS)
    ]


def attention_of(block: nn.Module) -> nn.Module:
    """The attention in a block. Raises: UnsupportedError where there is none, or none that is known."""
    for module in attentions_in(block):
        return module
    raise UnsupportedError(
        f"{type(block).__name__} has no attention with projections {', '.join(_PROJECTIONS[0])} or one for all."
    )


_watch: ContextVar[tuple[list[tuple[Tensor, dict[str, Any]]], list[Attended]]] = ContextVar("_watch")


@contextmanager
def watching(module: nn.Module) -> Iterator[list[Attended]]:
    """What an attention meets meanwhile, in the order of its calls. Its model uses the attention `SEEN`."""
    hidden: list[tuple[Tensor, dict[str, Any]]] = []
    found: list[Attended] = []
    places = list(inspect.signature(module.forward).parameters)

    def enter(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        rest = {**dict(zip(places, given, strict=False)), **named}
        hidden.append((rest.pop("hidden_states"), rest))

    handle, token = module.register_forward_pre_hook(enter, with_kwargs=True), _watch.set((hidden, found))
    try:
        yield found
    finally:
        _watch.reset(token)
        handle.remove()


def use_seen(model: nn.Module) -> None:
    """Let a model of transformers attend so that it can be watched."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(SEEN, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(SEEN, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(SEEN)  # type: ignore[operator]


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    hidden, found = _watch.get(([], []))
    if hidden:  # only the one that is watched told what went into it
        scaling = settings.get("scaling") or query.shape[-1] ** -0.5
        entered, named = hidden.pop()
        found.append(Attended(module, entered, query, key, value, float(scaling), named))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **settings)
