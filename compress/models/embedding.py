"""Hidden states of an encoder → one vector per text."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from compress.errors import UsageError, nearest

Pool = Literal["mean", "cls", "none"]
Floats = NDArray[np.float32]
FEWEST_NEIGHBOURS = 3
"""Texts whose nearest neighbours can be compared: of two, each is the other's nearest, whatever the vectors."""


def pool_hidden(hidden: NDArray[Any], mask: NDArray[np.int64], pool: Pool) -> list[Floats]:
    """hidden (batch, length, width), mask (batch, length) → per row (width,), or for "none" (its tokens, width).

    "mean": over the tokens that the mask counts, which is what sentence-transformers models are trained with unless
    they say otherwise; "cls": the first of them. Nothing is scaled to length 1. Raises: UsageError for another name.
    """
    if pool not in get_args(Pool):
        raise UsageError(f"pool={pool!r}.{nearest(str(pool), get_args(Pool))}")
    rows = [row[kept.astype(bool)].astype(np.float32) for row, kept in zip(hidden, mask, strict=True)]
    if pool == "none":
        return rows
    return [row[0] if pool == "cls" else row.mean(axis=0, dtype=np.float64).astype(np.float32) for row in rows]
