"""Batches padded on the left, with the cache that a model hands back: the part that no runtime changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
S = TypeVar("S")


class LeftPadded(ABC, Generic[S]):
    """See compress.target.Runner. Positions and what may be seen follow from the mask."""

    def __init__(self, session: S, folder: Path) -> None:
        self._session, self._folder = session, folder
        self._mask: Ids = np.zeros((0, 0), np.int64)
        self._cache: Any = None

    def start(self, ids: Ids, mask: Ids) -> Floats:
        """See compress.target.Runner."""
        self._mask, self._cache = mask, self._empty(ids)
        return self._run(ids)

    def step(self, tokens: Ids, alive: NDArray[np.bool_]) -> Floats:
        """See compress.target.Runner."""
        self._mask = np.concatenate([self._mask, alive[:, None].astype(np.int64)], axis=1)
        return self._run(tokens[:, None])

    @abstractmethod
    def _empty(self, ids: Ids) -> Any:
        """The cache before anything was read."""

    @abstractmethod
    def _run(self, ids: Ids) -> Floats:
        """Tokens (batch, length) after the cache, which grows by them → logits (batch, vocabulary) of the last."""
