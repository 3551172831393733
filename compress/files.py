"""Files that are complete or absent, whatever stops the writing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sync_file(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_short_write(error: OSError) -> bool:
    """numpy's error of a full disk, which has no number: "1048576 requested and 0 written"."""
    return error.errno is None and "requested and" in str(error) and str(error).endswith("written")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A full disk tells no file's name: make it tell this one."""
    try:
        yield
    except OSError as error:
        if is_short_write(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        if error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def scratch_folder(prefix: str = "compress-") -> Iterator[Path]:
    """A temporary folder, removed in the end. What fills its disk is an OSError that names it."""
    with tempfile.TemporaryDirectory(prefix=prefix) as name, naming(Path(name)):
        yield Path(name)


def beside(path: Path) -> Path:
    """Where `whole_file` writes a file meanwhile; a kill leaves it there."""
    return path.with_name(path.name + ".tmp")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file: beside it, then synced and renamed, so that it is complete or absent."""
    place = beside(path)
    try:
        with naming(path):
            yield place
            sync_file(place)
            place.replace(path)
    except BaseException:
        place.unlink(missing_ok=True)  # on a full disk it takes the room that a next try needs
        raise


def write_text(path: Path, text: str) -> None:
    """Write a whole file, complete or absent."""
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf8")


def copy_folder(source: Path, target: Path, copy: Callable[[str, str], object] = shutil.copy2) -> None:
    """A folder with all that is in it, into a new one. Raises: OSError, the first that it meets; of shutil.copytree one
    would get them all together, without their numbers."""
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.is_dir():
            copy_folder(path, target / path.name, copy)
        else:
            copy(str(path), str(target / path.name))


def umask() -> int:
    """The permissions that files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def parse_json(text: str | bytes) -> Any:
    """JSON that nobody vouches for. Raises: ValueError, also where it is nested deeper than a parser follows."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path) -> Any:
    """A file of JSON in UTF-8. Raises: OSError, ValueError as `parse_json`."""
    return parse_json(path.read_text(encoding="utf8"))
