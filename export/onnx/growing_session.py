"""A graph whose growing cache is in codes (see `growing` and `grouped_codes`) in ONNX Runtime.

Imports numpy and onnxruntime only, as `runtime` does: it is also what measures memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.export.onnx.cache import Floats
from compress.export.onnx.runtime import PORTABLE, Session


class GrowingSession(Session):
    """See `Session`; `logits` are those of tokens that come one by one, as in generating, so that what is rounded is in
    them."""

    @property
    def plain(self) -> Session:
        """The same model with a cache in float."""
        return Session(self.folder, self.threads, graph=PORTABLE)

    def logits(self, ids: NDArray[Any]) -> Floats:
        """See `Session`."""
        if self.shares_cache:  # which rounds before it attends, so that it makes no difference how tokens come
            return super().logits(ids)
        cache, (rows, length) = self.cache(len(ids), ids.shape[1]), ids.shape
        found = [cache.run(ids[:, at : at + 1], np.ones((rows, at + 1), np.int64)) for at in range(length)]
        return np.concatenate(found, axis=1)
