"""Sizes of models that are made in a blink, their tokens, and calibration by them."""

from __future__ import annotations

from typing import Any

import torch

from compress.inputs.datasets import Calibration
from compress.inputs.windows import Windows

UNGROUPED: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SIZES: dict[str, Any] = {**UNGROUPED, "num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROTARY_SIZES = {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
"""Heads of 16, which GroupQueryAttention rotates."""


def tokens(rows: int = 4, length: int = 16, seed: int = 0) -> torch.Tensor:
    """(rows, length) random ids that are no special token."""
    return torch.randint(3, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def calibration(ids: torch.Tensor) -> Calibration:
    """By these very windows, (rows, length)."""
    return Calibration(Windows(ids, tuple(range(len(ids))), f"ppl/disjoint-{ids.shape[1]}", ""), 0, "made here")
