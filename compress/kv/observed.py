"""What a model's own attention meets on data: for passes that fit a cache to it (`KvPass.observe`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
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
    heads, n, size): with their rotation, as they are attended to and cached; scaling: of the products.
    """

    module: nn.Module
    hidden: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float

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


_watch: ContextVar[tuple[list[Tensor], list[Attended]]] = ContextVar("_watch")


@contextmanager
def watching(module: nn.Module) -> Iterator[list[Attended]]:
    """What an attention meets meanwhile, in the order of its calls. Its model uses the attention `SEEN`."""
    hidden: list[Tensor] = []
    found: list[Attended] = []

    def enter(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden.append(given[0] if given else named["hidden_states"])

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
        found.append(Attended(module, hidden.pop(), query, key, value, float(scaling)))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **settings)
