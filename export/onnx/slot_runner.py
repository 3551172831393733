"""Batches through a session of the slot graph, padded on the left."""

from __future__ import annotations

from compress.export.onnx.runner import Runner
from compress.export.onnx.slot_session import Slots, SlotSession
from compress.runtime.left_padded import Floats, Ids


class SlotRunner(Runner):
    """See compress.target.Runner. Padding and rows that have ended take no slot."""

    def _empty(self, ids: Ids) -> Slots:  # type: ignore[override]
        assert isinstance(self._session, SlotSession)
        return Slots(self._session, len(ids))

    def _run(self, ids: Ids) -> Floats:
        found: Floats = self._cache.last(ids, self._mask)
        return found
