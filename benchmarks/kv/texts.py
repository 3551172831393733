"""Windows of a text, and what a model says of them with a cache."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer


def windows(folder: Path, text: Path, count: int, length: int) -> Tensor:
    """(count, length) ids of a text (.txt.gz), spread evenly over it and disjoint.

    Raises: SystemExit where it is too short.
    """
    with gzip.open(text, "rt", encoding="utf8") as stream:
        ids = AutoTokenizer.from_pretrained(folder)(stream.read(), add_special_tokens=False, verbose=False)["input_ids"]
    whole = len(ids) // length
    if whole < count:
        raise SystemExit(f"{text} has {whole} windows of {length} tokens, and {count} are asked for")
    starts = np.linspace(0, whole - 1, count).astype(int) * length
    return torch.tensor([ids[start : start + length] for start in starts])


def divergence(full: Tensor, found: Tensor) -> NDArray[np.float64]:
    """KL of what was found from the full model, nats per token (rows, tokens): logits (rows, tokens, vocabulary)."""
    full_log, found_log = functional.log_softmax(full.float(), -1), functional.log_softmax(found.float(), -1)
    return np.asarray((full_log.exp() * (full_log - found_log)).sum(-1).clamp(min=0).double().numpy())


def agreement(full: Tensor, found: Tensor) -> NDArray[np.float64]:
    """Whether both find the same token likeliest, (rows, tokens) 0 or 1."""
    return np.asarray((full.argmax(-1) == found.argmax(-1)).double().numpy())


def surprise(logits: Tensor, ids: Tensor) -> NDArray[np.float64]:
    """Negative log likelihood of tokens, nats (rows, tokens)."""
    flat = functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none")
    return np.asarray(flat.view(ids.shape).double().numpy())


@torch.no_grad()
def read(model: nn.Module, ids: Tensor, cache: Any, at_once: int) -> Tensor:
    """Logits (rows, tokens, vocabulary) of a text that is read so many tokens at a time."""
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(at_once, 1)]
    return torch.cat(parts, 1)
