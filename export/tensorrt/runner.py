"""Batches through an engine, or through its graph on the CPU: padded on the left, with the cache that comes back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from compress.export.tensorrt import slotted
from compress.runtime.left_padded import Floats, Ids, LeftPadded
from compress.target import Placement

A = TypeVar("A", bound=np.generic)


class Batched(slotted.Computes, Protocol):
    """What a session offers here. Values stay wherever they are computed, an engine's on the GPU."""

    @property
    def placement(self) -> Placement:
        """Where it runs."""
        ...

    @property
    def most_rows(self) -> int:
        """That it takes at once."""
        ...


class Runner(LeftPadded[Batched]):
    """See compress.target.Runner. Positions and what may be seen follow from the mask, inside the graph. More rows than
    the engine takes at once go through it in turn."""

    @property
    def placement(self) -> Placement:
        """See compress.target.Runner."""
        return self._session.placement

    def hidden(self, ids: Ids, mask: Ids) -> Floats:
        """See compress.target.Runner."""
        parts = zip(self._split(ids), self._split(mask), strict=True)
        return np.concatenate([self._main(self._session.run(self._session.tokens(*part))) for part in parts])

    def _empty(self, ids: Ids) -> Any:
        return [self._session.empty_cache(len(rows)) for rows in self._split(ids)]

    def _run(self, ids: Ids) -> Floats:
        last = []
        for rows, mask, cache in zip(self._split(ids), self._split(self._mask), self._cache, strict=True):
            for found in slotted.read(self._session, rows, mask, cache):
                logits = found[:, -1]
            last.append(self._session.host(logits))
        return np.concatenate(last)

    def _main(self, found: Mapping[str, Any]) -> Floats:
        return self._session.host(found[self._session.main])

    def _split(self, values: NDArray[A]) -> list[NDArray[A]]:
        most = self._session.most_rows
        return [values[start : start + most] for start in range(0, len(values), most)]
