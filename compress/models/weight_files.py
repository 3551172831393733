"""The safetensors files of a folder: which they are, opened safely, their keys and digest."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.errors import InputError, ResourceError, is_out_of_memory
from compress.files import read_json

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MAX_TENSORS = 1_000_000


def open_file(path: Path) -> Any:
    """A lazy safetensors handle. Raises: InputError for a malformed or truncated file."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        if is_out_of_memory(error):
            raise MemoryError(f"{path} cannot be mapped ({error})") from error
        if path.exists() and not os.access(path, os.R_OK):  # the library says that there is no such file
            raise InputError(f"{path} cannot be read: you lack the permission to.") from error
        raise InputError(
            f"{path} cannot be read as safetensors ({error}). It is truncated or malformed: fetch or save it again."
        ) from error


def read_tensor(handle: Any, key: str, path: Path) -> Tensor:
    """One tensor of an opened file. Raises: InputError for one that is not in it."""
    try:
        tensor: Tensor = handle.get_tensor(key)
    except SafetensorError as error:
        raise InputError(f"{path}: tensor {key} cannot be read ({error}). Fetch or save the file again.") from error
    return tensor


def find_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint folder: those its index names, else all.

    Raises: InputError when there is none, naming the pickles found instead.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _indexed_files(folder, index)
    single = folder / "model.safetensors"
    others = (path for path in sorted(folder.glob("*.safetensors")) if path.is_file())  # a pipe would never end
    files = (single,) if single.is_file() else tuple(others)
    if files:
        return files
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}). A pickle can run code when it is "
            "opened, so it is not. Save the model as safetensors: model.save_pretrained(folder)."
        )
    raise InputError(f"{folder} holds no *.safetensors file. Give a folder that save_pretrained wrote, or a hub id.")


def _indexed_files(folder: Path, index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        files = tuple(folder / str(name) for name in names)
        strays = [path for path in files if path.parent != folder or not path.is_file()]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} is not a checkpoint index ({error!r}). Fetch or save it again.") from error
    if strays:
        raise InputError(f"{index} names {strays[0].name!r}, which is not a file beside it. Fetch the missing part.")
    if not files:
        raise InputError(f"{index} names no file. Fetch or save it again.")
    return files


def digest_files(files: Iterable[Path]) -> str:
    """sha256 over the names and bytes of files, in order."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def _check_header(path: Path) -> None:
    """Of two tensors of one name the library gives the last, another reader the first. Raises: InputError."""
    with path.open("rb") as stream:
        text = stream.read(int.from_bytes(stream.read(8), "little"))
    pairs = json.loads(text, object_pairs_hook=list)  # the library has read it, so it is JSON
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise InputError(f"{path}: its header holds {twice[0]} twice. It is malformed: fetch or save it again.")


def keys(files: tuple[Path, ...]) -> list[tuple[Path, str]]:
    """Every key with its file, in natural order. Raises: InputError for one that two files hold, or too many."""
    from transformers.core_model_loading import dot_natural_key

    found = [(path, key) for path in files for key in open_file(path).keys()]  # noqa: SIM118 (a handle, not a dict)
    for path in files:
        _check_header(path)
    owners: dict[str, Path] = {}
    for path, key in found:
        if owners.setdefault(key, path) != path:
            raise InputError(
                f"{key} is in both {owners[key].name} and {path.name}. Keep the files of one checkpoint in the folder, "
                "or a model.safetensors.index.json that says which count."
            )
    if len(found) > MAX_TENSORS:
        raise InputError(f"{files[0].parent} lists {len(found)} tensors; at most {MAX_TENSORS} are read.")
    return sorted(found, key=lambda item: dot_natural_key(item[1]))


@contextmanager
def library_errors(path: Path) -> Iterator[None]:
    """The library's errors while it writes, as the OSError that they hold only as text: 'I/O … (os error 28)'.

    path: what is being written.
    """
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise ResourceError(f"{path} could not be written ({error}). Look at its disk, then repeat.") from error
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error
