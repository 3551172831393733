"""Arrays out of an .npz that nobody vouches for: no objects, nothing declared that is not there, no more than fits."""

from __future__ import annotations

import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from compress.errors import InputError, ResourceError
from compress.memory import allowed_memory

SHARE = 0.5
"""Of the memory here, the most that the arrays of a file may take."""
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_BROKEN = (OSError, ValueError, EOFError, NotImplementedError, RuntimeError, SyntaxError, struct.error)
"""What zipfile and numpy raise for files that are none; RuntimeError: encrypted, NotImplementedError: packed unlike."""


def load_npz(path: Path, choose: Callable[[Sequence[str]], Sequence[str]]) -> dict[str, NDArray[Any]]:
    """Some arrays of a file by name. Args: choose: names of all → those to read.

    Raises: InputError for what is no .npz, holds objects, or declares other bytes than it has; ResourceError for more
    than half of the memory here; what `choose` raises.
    """
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as stream:
                is_array = stream.read(6) == npy.MAGIC_PREFIX
            raise ValueError("it holds one array without a name" if is_array else "it is no zip file")
        with np.load(path, allow_pickle=False) as content:
            wanted = choose(list(content))
            _check(path, content.zip, wanted)
            return {name: content[name] for name in wanted}
    except (*_BROKEN, zipfile.BadZipFile, zlib.error, lzma.LZMAError, tokenize.TokenError) as error:
        raise InputError(f"{path} cannot be read as .npz without pickles ({error}). Use numpy.savez.") from error


def _check(path: Path, archive: Any, wanted: Sequence[str]) -> None:
    """Raises: ValueError, ResourceError. Of a zip no more is unpacked than it says that a member has."""
    names = set(archive.namelist())
    members = {name: archive.getinfo(f"{name}.npy" if f"{name}.npy" in names else name) for name in wanted}
    needed, allowed = sum(each.file_size for each in members.values()), allowed_memory()
    if allowed is not None and needed > SHARE * allowed:
        raise ResourceError(
            f"{path} unpacks to {needed / 1e9:.1f} GB, more than {SHARE:.0%} of the {allowed / 1e9:.1f} GB of memory "
            "here. Give fewer samples, or use a larger machine."
        )
    for name, member in members.items():
        with archive.open(member) as stream:
            shape, _, dtype = _header(stream, name)
            taken = stream.tell() + prod(shape) * dtype.itemsize
        if dtype.hasobject or dtype.names is not None:
            raise ValueError(f"{name} holds objects")
        if taken != member.file_size or min(shape, default=0) < 0:
            raise ValueError(f"{name} has {member.file_size} bytes, but {dtype} {shape} takes {taken}")


def _header(stream: Any, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"{name} is an .npy of version {version}")
    found: tuple[tuple[int, ...], bool, np.dtype[Any]] = _HEADERS[version](stream)
    return found
