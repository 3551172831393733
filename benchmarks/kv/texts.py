"""Windows of a text, and what a model says of them with a cache."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoTokenizer

from compress.quality.token_scores import TokenScores, score_tokens
from compress.stats.intervals import cluster_interval


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


def scored(full: Tensor, found: Tensor, targets: Tensor) -> list[TokenScores]:
    """Of each row: what was found against the model with a full cache. Logits (rows, tokens, vocabulary); targets
    (rows, tokens): what comes next in truth."""
    return [score_tokens(*each) for each in zip(full, found, targets, strict=True)]


def mean(rows: Iterable[NDArray[np.generic]]) -> list[float | None]:
    """Mean over the tokens of all rows with its interval over rows; the rows are as long as each other."""
    values = np.stack([row.astype(np.float64) for row in rows])
    value, interval = cluster_interval(values.sum(1), np.full(len(values), values.shape[1]))
    return [value, interval and interval.low, interval and interval.high]


@torch.no_grad()
def read(model: nn.Module, ids: Tensor, cache: Any, at_once: int) -> Tensor:
    """Logits (rows, tokens, vocabulary) of a text that is read so many tokens at a time."""
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(at_once, 1)]
    return torch.cat(parts, 1)
