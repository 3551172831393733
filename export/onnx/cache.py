"""The cache of one batch between calls: handed back and concatenated, or one buffer that the graph writes into.

Imports numpy only, as `runtime` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from compress.export.onnx.runtime import Session

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


class Cache(Protocol):
    """What a batch has seen so far."""

    def run(self, ids: Ids, mask: Ids) -> Floats:
        """Read ids (batch, length); mask (batch, seen + length). Returns logits (batch, length, vocabulary)."""
        ...


class Concatenated:
    """Of the portable graph: each call gives a longer cache, which is the next call's input."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._past: Mapping[str, NDArray[Any]] = {}

    def run(self, ids: Ids, mask: Ids) -> Floats:
        """See `Cache`."""
        feeds = {"input_ids": ids, **self._past} if self._past else self._session.feeds(ids)
        found = self._session.session.run(self._session.outputs, {**feeds, "attention_mask": mask})
        named = dict(zip(self._session.outputs, found, strict=True))
        self._past = {name: named[name.replace("past_key_values.", "present.")] for name in self._session.cache_names}
        result: Floats = named["logits"]
        return result

    def held(self, name: str) -> NDArray[Any]:
        """An input of the graph's cache as the next call gets it."""
        return self._past[name]


class Shared:
    """Of the GroupQueryAttention graph: past and present are one buffer, bound to both, so nothing is copied.

    Rows are padded on the right: each mask row holds ones first. More than one row after a past takes one id at a time.
    Args: length: tokens that the buffer has room for; it doubles where that is passed.
    """

    def __init__(self, session: Session, batch: int, length: int) -> None:
        self._session, self._batch, self._room = session, batch, 0
        self.binding = session.session.io_binding()
        self.binding.bind_output("logits", "cpu")  # the first output, also where the buffers are bound again
        self._buffers: dict[str, Any] = {}
        self._grow(length)

    def run(self, ids: Ids, mask: Ids) -> Floats:
        """See `Cache`."""
        self.bind(ids, mask)
        self.again()
        result: Floats = self.binding.get_outputs()[0].numpy()
        return result

    def held(self, name: str) -> NDArray[Any]:
        """The buffer of an input of the graph's cache."""
        found: NDArray[Any] = self._buffers[name].numpy()
        return found

    def bind(self, ids: Ids, mask: Ids) -> None:
        """Set what the next call reads."""
        if mask.shape[1] > self._room:
            self._grow(max(mask.shape[1], 2 * self._room))
        self.binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        self.binding.bind_cpu_input("attention_mask", np.ascontiguousarray(mask))

    def again(self) -> None:
        """Run what is bound; repeated, it computes and writes the same."""
        self.binding.bind_output("logits", "cpu")  # a new one: a caller may keep the last
        self._session.session.run_with_iobinding(self.binding)

    def _grow(self, room: int) -> None:
        from onnxruntime import OrtValue

        for name, (heads, size) in self._session.cache_shapes.items():
            array = np.zeros((self._batch, heads, room, size), self._session.cache_types[name])
            if name in self._buffers:
                array[:, :, : self._room] = self._buffers[name].numpy()
            buffer = self._buffers[name] = OrtValue.ortvalue_from_numpy(array, self._session.device)
            self.binding.bind_ortvalue_input(name, buffer)
            self.binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), buffer)
        self._room = room
