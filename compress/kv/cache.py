"""The cache of transformers whose layers store and drop as their `KvSpec` says.

`cache = KvCache.attach(model, specs)`, then `model(ids, past_key_values=cache)` or `model.generate`. Tokens keep their
true positions. A layer reads what it stored in float, attends to it and to the new tokens as they were computed, and
then stores these; when more are stored than the budget, the least important go, so what is held never exceeds the
budget by more than the tokens of one call.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import reduce
from typing import Any, Self

from torch import Tensor, nn
from transformers.cache_utils import Cache

from compress.errors import UnsupportedError
from compress.kv import heads
from compress.kv.attention import padding_mask, require_plain
from compress.kv.flat import FlatLayer
from compress.kv.layer import KvLayer, current
from compress.kv.recall import Recall
from compress.kv.retrieval import RetrievalLayer
from compress.kv.rotation import Rotation, rotation_of
from compress.kv.spec import KvSpec, LayerTensors
from compress.kv.token_select import TokenSelectLayer

ATTENTION = "compress_kv"
"""The attention that such a cache goes with, as transformers knows it."""


def layer_of(spec: KvSpec, tensors: LayerTensors | None = None, rotation: Rotation | None = None) -> KvLayer:
    """An empty layer that does as it says."""
    if not spec.selects:
        return (FlatLayer if spec.heads == "adaptive" else KvLayer)(spec, tensors, rotation)
    made = TokenSelectLayer if spec.selector == "token_select" else RetrievalLayer
    return made(spec, tensors)


class KvCache(Cache):  # type: ignore[misc]
    """One `KvLayer` per layer of a model."""

    layers: list[KvLayer]

    @classmethod
    def attach(cls, model: nn.Module, specs: Sequence[KvSpec], tensors: Sequence[LayerTensors] = ()) -> Self:
        """A new cache for a model of transformers, whose attention becomes the one that goes with it.

        Args: tensors: by layer, those that the specs want.
        Raises: UnsupportedError where the model's attention is not transformers' plain one, or its rotary embedding is
        not known to a scorer that needs it; UsageError where a tensor is not given.
        """
        rotation = rotation_of(model) if any(spec.turns for spec in specs) else None
        use_attention(model)
        if any(spec.learned for spec in specs):
            heads.catch(model)
        given = zip(specs, tensors or [{}] * len(specs), strict=True)
        return cls(layers=[layer_of(spec, held, rotation) for spec, held in given])

    def fork(self) -> Self:
        """A cache that may grow while this one stays. Of a full one the newest token overwrites another in both."""
        forked = copy.copy(self)
        forked.layers = [layer.fork() for layer in self.layers]
        return forked

    def watch(self) -> None:
        """From now on layers that choose tokens compare their choice with all products, for `recall`."""
        for layer in self.layers:
            layer.recall = Recall()

    @property
    def recall(self) -> Recall:
        """What the layers that choose tokens found since `watch`."""
        return reduce(Recall.joined, (layer.recall for layer in self.layers if layer.recall is not None), Recall())

    @property
    def nbytes(self) -> int:
        """Of all layers."""
        return sum(layer.nbytes for layer in self.layers)


def use_attention(model: nn.Module) -> None:
    """Let a model attend through this module. Raises: UnsupportedError where it cannot."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    require_plain(model)
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, padding_mask)
    model.set_attn_implementation(ATTENTION)  # type: ignore[operator]


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **extras: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. query (batch, heads, n, size); returns (batch, n, heads, size)."""
    odd = {name for name in ("softcap", "s_aux", "sliding_window") if extras.get(name) is not None}
    layer = current.get(None)
    if odd or layer is None or layer.pending is None:
        what = f"with {', '.join(sorted(odd))}" if odd else "without a compressed cache (past_key_values)"
        raise UnsupportedError(f"{type(module).__name__} attends {what}, which this attention does not do.")
    output = layer.attend(module, query, key, value, attention_mask, scaling or query.shape[-1] ** -0.5)
    return output.transpose(1, 2).contiguous(), None
