"""Safetensors files of bounded size, with an index where there are several."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from compress.files import umask
from compress.models.weight_files import library_errors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2_000_000_000
"""A file is written once it holds this many: what memory the writing takes."""


class ShardWriter:
    """Takes tensors in any order and writes them in files of about `limit` bytes."""

    def __init__(self, folder: Path, limit: int = SHARD_BYTES) -> None:
        self.folder, self.limit = folder, limit
        self._waiting: dict[str, Tensor] = {}
        self._homes: list[list[str]] = []
        self._bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors to be written; a full file is written first."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._waiting and sum(tensor.nbytes for tensor in self._waiting.values()) + size > self.limit:
            self._flush()
        self._waiting |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._bytes += size

    def finish(self) -> None:
        """Write what is left, and name the files as readers look for them."""
        if self._waiting or not self._homes:
            self._flush()
        count = len(self._homes)
        if count == 1:
            self._part(0).rename(self.folder / SINGLE)
            return
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        for place, name in enumerate(names):
            self._part(place).rename(self.folder / name)
        homes = {key: name for name, keys in zip(names, self._homes, strict=True) for key in keys}
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(homes.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf8")

    def _part(self, place: int) -> Path:
        return self.folder / f"part-{place}.safetensors"

    def _flush(self) -> None:
        path = self._part(len(self._homes))
        with library_errors(path):
            save_file(dict(sorted(self._waiting.items())), path, metadata={"format": "pt"})
        path.chmod(0o666 & ~umask())  # the library writes files that only their owner can read
        self._homes.append(sorted(self._waiting))
        self._waiting = {}


def header_bytes(entries: Mapping[str, tuple[tuple[int, ...], int]]) -> int:
    """Bytes of a file's header. entries: name → shape and bytes of a tensor."""
    offset, header = 0, {"__metadata__": {"format": "pt"}}
    found: dict[str, object] = dict(header)
    for name, (shape, size) in sorted(entries.items()):
        found[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    return 8 + -(-len(json.dumps(found, separators=(",", ":"))) // 8) * 8
