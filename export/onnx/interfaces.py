"""transformers' attention, mask and experts interfaces as placeholder nodes, for `capture`.

Domain `compress`: `Attention(q, k, v[, past_k, past_v[, hidden, projections …]]) {scale, softcap, before, after}` with
q, k after rotary; the last are what learned scorers of a cache look at (compress/kv/heads.py), read by nothing else;
`ExpertInput(hidden[, bias]) {layer}` and `Experts(input, activated, top_k_index, top_k_weights[, bias]) {layer,
count}`, between which the graph holds one expert's activation, to be repeated for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from compress.errors import UnsupportedError
from compress.kv import heads
from compress.models import experts

DOMAIN = "compress"
PLACEHOLDER = "compress_placeholder"
# May be passed to the attention function, whatever their value: they do not change what it computes.
_HARMLESS = {
    "position_ids",
    "use_cache",
    "output_attentions",
    "cache_position",
    "output_router_logits",
    "return_dict",
    "output_hidden_states",
    "deterministic",
}
# Where masks are probed: farther than any window.
_FAR = 2**18


class PastSlots:
    """Passed as `past_key_values`: hands the graph's past to the attention placeholder and takes the present."""

    is_compileable = False

    def __init__(self, past: list[tuple[Tensor, Tensor]]) -> None:
        self.past = past
        self.present: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.past[0][0].shape[2]

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[Any, int]:
        return self.get_seq_length() + query_length, 0

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key, value

    def __len__(self) -> int:
        return len(self.past)


current: list[PastSlots] = []
"""The past of the decoder that is being traced, if any."""


class Reach(NamedTuple):
    """How many positions a query sees before and after its own; -1: all. Travels as the attention mask."""

    before: int
    after: int


def register() -> None:
    """Make `PLACEHOLDER` known to transformers as attention, mask and experts."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(PLACEHOLDER, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PLACEHOLDER, _mask)
    ALL_EXPERTS_FUNCTIONS.register(PLACEHOLDER, _experts)


def _mask(*, mask_function: Callable[..., Tensor], **_: Any) -> Reach | object:
    """transformers' mask interface → the reach, read off the mask function itself. Padding is the lowering's.

    A mask of another kind is refused where it is used: some models make masks that no layer takes.
    """
    try:
        with unset_fake_temporarily(), disable_proxy_modes_tracing():
            found = {_reach_at(mask_function, query) for query in (_FAR, _FAR - 1, _FAR - 7)}
    except Exception:  # whatever a mask function that needs more than positions raises
        return object()
    return found.pop() if len(found) == 1 else object()


def _reach_at(mask_function: Callable[..., Tensor], query: int) -> Reach | object:
    """What one query sees."""
    zero, keys = torch.zeros(1, dtype=torch.int64), torch.arange(2 * _FAR)
    seen = mask_function(zero, zero, torch.tensor([query]), keys).expand(2 * _FAR).nonzero()
    first, last = int(seen[0]), int(seen[-1])
    if len(seen) != last - first + 1:
        return object()
    return Reach(-1 if first == 0 else query - first, -1 if last == 2 * _FAR - 1 else last - query)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,  # the mask says it
    softcap: float | None = None,
    is_causal: bool | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface → one placeholder node. query (b, heads, s, d); returns (b, s, heads, d)."""
    unknown = {name for name, value in extras.items() if value is not None and value is not False} - _HARMLESS
    if attention_mask is None:  # as transformers' own functions take it
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        attention_mask = Reach(-1, 0 if causal else -1)
    if unknown or not isinstance(attention_mask, Reach):
        what = ", ".join(sorted(unknown)) or "a mask of another kind"
        raise UnsupportedError(
            f"{type(module).__name__} passes {what} to its attention, which the onnx target does not know. Supported: "
            "scaled dot products with causal, sliding-window or full masks and soft caps."
        )
    scale = float(scaling if scaling is not None else query.shape[-1] ** -0.5)
    attributes = {"scale": scale, "softcap": float(softcap or 0.0), **attention_mask._asdict()}
    batch, heads, length, _ = query.shape
    shape = (batch, length, heads, value.shape[-1])
    if current:
        return _cached(module, (query, key, value), attributes, shape), None
    out = torch.onnx.ops.symbolic(
        f"{DOMAIN}::Attention", (query, key, value), attributes, dtype=query.dtype, shape=shape, version=1
    )
    return out, None


def _cached(
    module: Any, inputs: tuple[Tensor, Tensor, Tensor], attributes: dict[str, Any], shape: tuple[Any, ...]
) -> Tensor:
    """The same with a past, whose successor is noted."""
    query, key, value = inputs
    slots = current[-1]
    past_key, past_value = slots.past[module.layer_idx]
    if attributes["after"]:
        raise UnsupportedError(f"{type(module).__name__} sees tokens ahead of its own, which no cache holds.")
    for new, past in ((key, past_key), (value, past_value)):
        if new.shape[1::2] != past.shape[1::2]:
            raise UnsupportedError(
                f"{type(module).__name__} caches {new.shape[1]} heads of {new.shape[3]}; by its config the onnx target "
                f"expects {past.shape[1]} of {past.shape[3]} for keys and values alike."
            )
    total = past_key.shape[2] + key.shape[2]
    shapes = (
        shape,
        (key.shape[0], key.shape[1], total, key.shape[3]),
        (value.shape[0], value.shape[1], total, value.shape[3]),
    )
    out, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::Attention",
        (query, key, value, past_key, past_value, *heads.kept(module)),
        attributes,
        dtypes=(query.dtype,) * 3,
        shapes=shapes,
        version=1,
    )
    slots.present[module.layer_idx] = (present_key, present_value)
    return out


def _experts(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' experts interface → two placeholder nodes with one expert's activation between them."""
    if module.has_post_expert_norm:
        raise UnsupportedError(
            f"{type(module).__name__} norms what its experts put out, which the onnx target does not know."
        )
    name, key = module.__dict__["_compress_experts"], experts.up_key(module)
    count, rows = getattr(module, key).shape[0], getattr(module, key).shape[2 if module.is_transposed else 1]
    first, last = ([getattr(module, f"{part}_bias")] if module.has_bias else [] for part in (key, "down_proj"))
    values = torch.onnx.ops.symbolic(
        f"{DOMAIN}::ExpertInput",
        (hidden, *first),
        {"layer": f"{name}.{key}"},
        dtype=hidden.dtype,
        shape=(hidden.shape[0], rows),
        version=1,
    )
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::Experts",
        (values, experts.activate(module, values), top_k_index, top_k_weights, *last),
        {"layer": f"{name}.down_proj", "count": count},
        dtype=hidden.dtype,
        shape=hidden.shape,
        version=1,
    )
