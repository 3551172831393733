"""Batches through a session of the portable graph: padded on the left, with the cache that the graph hands back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.export.onnx.runtime import Session
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
        """See compress.target.Runner; every provider that onnxruntime may place a node on, in its order."""
        loaded = self._session.session
        providers = ", ".join(name.removesuffix("ExecutionProvider") for name in loaded.get_providers())
        threads = int(loaded.get_session_options().intra_op_num_threads)
        version = " ".join(self._session.name.split()[:2])
        return Placement(version, providers, threads, f"{self._folder.name}/{self._session.graph}")

    def start(self, ids: Ids, mask: Ids) -> Floats:
        """See compress.target.Runner."""
        empty = self._session.feeds(ids)
        self._cache = {name: empty[name] for name in self._session.cache_names}
        self._mask = mask
        return self._run(ids)

    def step(self, tokens: Ids, alive: NDArray[np.bool_]) -> Floats:
        """See compress.target.Runner."""
        self._mask = np.concatenate([self._mask, alive[:, None].astype(np.int64)], axis=1)
        return self._run(tokens[:, None])

    def hidden(self, ids: Ids, mask: Ids) -> Floats:
        """See compress.target.Runner."""
        feeds = {"input_ids": ids, "attention_mask": mask}
        result: Floats = self._session.session.run([self._session.outputs[0]], feeds)[0]
        return result

    def _run(self, ids: Ids) -> Floats:
        feeds = {"input_ids": ids, "attention_mask": self._mask, **self._cache}
        logits, *present = self._session.session.run(self._session.outputs, feeds)
        self._cache = dict(zip(self._session.cache_names, present, strict=True))
        last: Floats = logits[:, -1]
        return last
