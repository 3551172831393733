"""A place on disk that a run writes to: room for it, and what the system's refusals mean for the user."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import FULL, ResourceError, exhausted, place_of
from compress.files import is_short_write

UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EFBIG)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a ResourceError; what was finished stays for a resume. An error about a file
    elsewhere, such as one for temporary files, is told of that place."""
    try:
        yield
    except OSError as error:
        if _is_elsewhere(error, folder) and (lacking := exhausted(error)):
            raise ResourceError(lacking) from error
        if is_short_write(error) or error.errno in FULL:
            raise ResourceError(
                f"No space left while writing {_told(folder)}. Free some, then repeat the command: finished work is "
                "kept."
            ) from error
        if error.errno in UNWRITABLE:
            raise ResourceError(
                f"{_told(folder)} cannot be written ({error.strerror}). Give an -o that can."
            ) from error
        raise


def require_space(folder: Path, needed: int) -> None:
    """Raises: ResourceError when a file system has less than `needed` bytes (plus 5 %) free."""
    existing = _told(folder)
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed * 1.05:
        raise ResourceError(
            f"{existing} has {free / 1e6:.0f} MB free; this run needs about {needed * 1.05 / 1e6:.0f} MB. "
            "Free some, or give an -o on another disk."
        )


def _is_elsewhere(error: OSError, folder: Path) -> bool:
    """Whether an error names a file outside of a folder, and not one on the way to it."""
    place = place_of(error)
    if place is None:
        return False
    named, ours = (Path(os.path.abspath(name)) for name in (place, folder))  # noqa: PTH100 (nothing is resolved)
    output = next((part for part in (ours, *ours.parents) if part.suffix == ".partial"), ours)
    return not named.is_relative_to(output.parent) and not output.is_relative_to(named)


def _told(path: Path) -> Path:
    """The output that a user named, in place of `OUT.partial`, which may be gone when an error is read."""
    return Path(*(part.removesuffix(".partial") for part in path.parts))
