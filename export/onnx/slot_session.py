"""The slot graph in ONNX Runtime: its state stays in buffers that every call reads and overwrites (see `slots`).

Imports numpy and onnxruntime only, as `runtime` does: it is also what measures memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.export.onnx.cache import Floats, Ids
from compress.export.onnx.runtime import PORTABLE, SLOTS, Session
from compress.runtime.greedy import greedy

FACTS = "compress.slots"
"""Metadata of the graph: JSON, the tokens of a prompt that are read at once (`chunk`) and each layer's KvSpec."""
STATE, AFTER, POSITION = "slots.", "next.", ".position"
_TYPES = {"float": np.float32, "float16": np.float16, "int8": np.int8, "int32": np.int32}


class SlotSession(Session):
    """See `Session`; `logits` are those of tokens that come one by one, as in generating, so that what is dropped and
    rounded is in them.

    chunk: tokens of a prompt that are read at once; state: type and shape of each tensor, without the batch; room:
    tokens before one is dropped; rounds: whether any are stored as codes.
    """

    def __init__(self, folder: Path, threads: int, *, exact: bool = False, profile_to: Path | None = None) -> None:
        super().__init__(folder, threads, exact=exact, graph=SLOTS, profile_to=profile_to)
        self.chunk = int(json.loads(self.session.get_modelmeta().custom_metadata_map[FACTS])["chunk"])
        self.state: dict[str, tuple[Any, tuple[int, ...]]] = {}
        for item in self.session.get_inputs():
            if item.name.startswith(STATE):
                kind = _TYPES[item.type.removeprefix("tensor(").removesuffix(")")]
                self.state[item.name] = kind, tuple(item.shape[1:])

        heads = [shape for name, (_, shape) in self.state.items() if name.endswith(POSITION)]
        self.room = min(shape[-1] for shape in heads) - 1
        self.rounds = any(kind is np.int8 for kind, _ in self.state.values())

    @property
    def plain(self) -> Session:
        """The same model with a cache that keeps everything."""
        return Session(self.folder, self.threads, graph=PORTABLE)

    def logits(self, ids: NDArray[Any]) -> Floats:
        """See `Session`."""
        cache = self.cache(len(ids), ids.shape[1])
        found = [cache.read(ids[:, at : at + 1], np.full((len(ids), 1), at)) for at in range(ids.shape[1])]
        return np.concatenate(found, axis=1)

    def greedy(self, prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> list[int]:
        """See `Session`."""
        cache = self.cache(1, len(prompt) + count)
        return greedy(lambda ids, mask: cache.last(ids, mask)[0], prompt, count, stop)

    def cache(self, batch: int, length: int) -> Slots:
        """Empty slots, which take as much however long a text becomes."""
        return Slots(self, batch)

    def call(self, ids: NDArray[Any], past: int) -> Callable[[], None]:
        """See `Session`: after tokens whose keys and values are zero. Repeated, it takes another slot each time, with
        the same work."""
        cache = self.cache(len(ids), past)
        cache.pretend(past)
        mask = np.ones((len(ids), past + ids.shape[1]), np.int64)

        def again() -> None:
            cache.last(ids, mask)

        return again

    def cache_use(self) -> tuple[int, int]:
        """See `Session`."""
        return super().cache_use()[0], self.cache(1, 0).nbytes


class Slots:
    """The state of one batch, in buffers that are inputs and outputs at once."""

    def __init__(self, session: SlotSession, batch: int) -> None:
        from onnxruntime import OrtValue

        self._session, self._batch = session, batch
        self._binding = session.session.io_binding()
        self._binding.bind_output("logits", "cpu")
        self._buffers: dict[str, Any] = {}
        for name, (kind, shape) in session.state.items():
            empty = np.full((batch, *shape), -1 if name.endswith(POSITION) else 0, kind)
            self._buffers[name] = OrtValue.ortvalue_from_numpy(empty, "cpu")
            self._bind(name)

    def run(self, ids: Ids, mask: Ids) -> Floats:
        """Read ids (batch, length), padded on the left; mask (batch, seen + length). Returns logits (batch, length,
        vocabulary)."""
        return np.concatenate(list(self._pieces(ids, mask)), axis=1)

    def last(self, ids: Ids, mask: Ids) -> Floats:
        """The same, the last token's logits alone: (batch, vocabulary)."""
        for found in self._pieces(ids, mask):
            logits = found
        return logits[:, -1]

    def _pieces(self, ids: Ids, mask: Ids) -> Iterator[Floats]:
        positions = positions_of(ids, mask)
        for at in range(0, ids.shape[1], self._session.chunk):
            piece = slice(at, at + self._session.chunk)
            yield self.read(ids[:, piece], positions[:, piece])

    def read(self, ids: Ids, positions: Ids) -> Floats:
        """One call: logits (batch, n, vocabulary) for ids and true positions (batch, n), −1 for padding."""
        self._binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids, np.int64))
        self._binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions, np.int64))
        self._binding.bind_output("logits", "cpu")  # a new one: a caller may keep the last
        self._session.session.run_with_iobinding(self._binding)
        found: Floats = self._binding.get_outputs()[0].numpy()
        return found

    def pretend(self, past: int) -> None:
        """As if so many tokens had been read, the newest of which are there."""
        from onnxruntime import OrtValue

        for name, (_, shape) in self._session.state.items():
            if name.endswith(POSITION):
                held = pretended((self._batch, *shape), past)
                self._buffers[name] = OrtValue.ortvalue_from_numpy(held, "cpu")
                self._bind(name)

    def _bind(self, name: str) -> None:
        self._binding.bind_ortvalue_input(name, self._buffers[name])
        self._binding.bind_ortvalue_output(AFTER + name.removeprefix(STATE), self._buffers[name])

    def held(self, layer: int, name: str) -> NDArray[Any]:
        """A tensor of a layer's state but for its last slot, which is always empty: position, score, key …"""
        found: NDArray[Any] = self._buffers[f"{STATE}{layer}.{name}"].numpy()
        return found[:, :, :-1]

    @property
    def nbytes(self) -> int:
        """Of all buffers."""
        return sum(
            self._batch * int(np.prod(shape)) * np.dtype(kind).itemsize for kind, shape in self._session.state.values()
        )


def positions_of(ids: Ids, mask: Ids) -> Ids:
    """True positions of ids (batch, length), −1 for padding; mask (batch, seen + length)."""
    found: Ids = np.where(mask > 0, mask.cumsum(1) - 1, -1)[:, -ids.shape[1] :]
    return found


def pretended(shape: Sequence[int], past: int) -> NDArray[np.int32]:
    """Positions of slots (…, slots + 1) when so many tokens were read, the newest of which are there."""
    held = np.full(shape, -1, np.int32)
    count = min(past, shape[-1] - 1)
    held[..., :count] = np.arange(past - count, past)
    return held
