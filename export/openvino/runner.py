"""Batches through a session: padded on the left, with the cache that the model hands back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.export.openvino.runtime import GRAPH, Session
from compress.target import Placement

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


class Runner:
    """See compress.target.Runner. Positions and what may be seen follow from the mask, inside the graph."""

    def __init__(self, session: Session, folder: Path) -> None:
        self._session, self._folder = session, folder
        self._mask: Ids = np.zeros((0, 0), np.int64)
        self._cache: dict[str, NDArray[Any]] = {}

    @property
    def placement(self) -> Placement:
        """See compress.target.Runner."""
        runtime, devices = " ".join(self._session.name.split()[:2]), ", ".join(self._session.devices)
        return Placement(runtime, devices, self._session.threads, f"{self._folder.name}/{GRAPH}")

    def start(self, ids: Ids, mask: Ids) -> Floats:
        """See compress.target.Runner."""
        empty = self._session.feeds(ids)
        self._cache = {name: empty[name] for name in self._session.cache_shapes}
        self._mask = mask
        return self._run(ids)

    def step(self, tokens: Ids, alive: NDArray[np.bool_]) -> Floats:
        """See compress.target.Runner."""
        self._mask = np.concatenate([self._mask, alive[:, None].astype(np.int64)], axis=1)
        return self._run(tokens[:, None])

    def hidden(self, ids: Ids, mask: Ids) -> Floats:
        """See compress.target.Runner."""
        found = self._session.run({"input_ids": ids, "attention_mask": mask})
        return np.array(found[self._session.outputs[0]])

    def _run(self, ids: Ids) -> Floats:
        found = self._session.run({"input_ids": ids, "attention_mask": self._mask, **self._cache})
        last: Floats = np.array(found["logits"][:, -1])
        self._cache = self._session.present(found)
        return last
