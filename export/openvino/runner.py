"""Batches through a session: padded on the left, with the cache that the model hands back."""

from __future__ import annotations

from typing import Any

import numpy as np

from compress.export.openvino.runtime import GRAPH, Session
from compress.runtime.left_padded import Floats, Ids, LeftPadded
from compress.target import Placement


class Runner(LeftPadded[Session]):
    """See compress.target.Runner. Positions and what may be seen follow from the mask, inside the graph."""

    @property
    def placement(self) -> Placement:
        """See compress.target.Runner."""
        runtime, devices = " ".join(self._session.name.split()[:2]), ", ".join(self._session.devices)
        return Placement(runtime, devices, self._session.threads, f"{self._folder.name}/{GRAPH}")

    def hidden(self, ids: Ids, mask: Ids) -> Floats:
        """See compress.target.Runner."""
        found = self._session.run({"input_ids": ids, "attention_mask": mask})
        return np.array(found[self._session.outputs[0]])

    def _empty(self, ids: Ids) -> Any:
        return self._session.empty_cache(len(ids))

    def _run(self, ids: Ids) -> Floats:
        found = self._session.run({"input_ids": ids, "attention_mask": self._mask, **self._cache})
        last: Floats = np.array(found["logits"][:, -1])
        self._cache = self._session.present(found)
        return last
