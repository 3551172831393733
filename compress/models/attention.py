"""What a config tells of the attention of each block: the one place that reads it."""

from __future__ import annotations

from typing import Any, NamedTuple

from compress.errors import UnsupportedError


class Attention(NamedTuple):
    """Of one block: heads of queries, of keys and values, and their size."""

    heads: int
    kv_heads: int
    size: int


def attentions(text: Any) -> tuple[Attention, ...]:
    """Of all blocks, in their order. text: the config of the text model.

    Raises: UnsupportedError for a model without attention heads.
    """
    if not hasattr(text, "num_attention_heads"):
        raise UnsupportedError(
            f"'{text.model_type}' has no attention heads, by which keys and values are cached and timed."
        )
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    return (Attention(heads, kv_heads, size),) * int(text.num_hidden_layers)
