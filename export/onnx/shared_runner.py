"""Batches through a session of the graph with GroupQueryAttention, which reads rows padded on the right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compress.export.onnx.cache import Cache
from compress.export.onnx.runner import Runner
from compress.export.onnx.runtime import Session
from compress.runtime.left_padded import Floats, Ids

ROOM = 256
"""Tokens beyond the prompt that the cache has room for at first; it doubles."""


class SharedRunner(Runner):
    """See compress.target.Runner. Rows come padded on the left and are turned; the logits are the same."""

    def __init__(self, session: Session, folder: Path) -> None:
        super().__init__(session, folder)
        self._buffers: Cache | None = None
        self._lengths: Ids = np.zeros(0, np.int64)

    def start(self, ids: Ids, mask: Ids) -> Floats:
        """See compress.target.Runner."""
        rows, width = ids.shape
        self._lengths = mask.sum(1)
        self._buffers = self._session.cache(rows, width + ROOM)
        turned = np.stack([np.roll(row, length - width) for row, length in zip(ids, self._lengths, strict=True)])
        logits = self._buffers.run(turned, self._ones(width))
        last: Floats = logits[np.arange(rows), self._lengths - 1]
        return last

    def step(self, tokens: Ids, alive: NDArray[np.bool_]) -> Floats:
        """See compress.target.Runner. A row that is not alive writes over its own last place."""
        assert self._buffers is not None
        self._lengths = self._lengths + alive
        last: Floats = self._buffers.run(tokens[:, None], self._ones(int(self._lengths.max())))[:, -1]
        return last

    def _ones(self, width: int) -> Ids:
        """The mask of rows that are padded on the right."""
        return (np.arange(width)[None] < self._lengths[:, None]).astype(np.int64)
