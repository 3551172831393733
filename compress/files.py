"""Files that are complete or absent, whatever stops the writing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
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


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file: beside it, then synced and renamed, so that it is complete or absent."""
    beside = path.with_name(path.name + ".tmp")
    try:
        yield beside
        sync_file(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)  # on a full disk it takes the room that a next try needs
        raise


def write_text(path: Path, text: str) -> None:
    """Write a whole file, complete or absent."""
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf8")


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
