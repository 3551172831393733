"""A place on disk that a run writes to: room for it, and what the system's refusals mean for the user."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import ResourceError

UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EFBIG)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a ResourceError; what was finished stays for a resume."""
    try:
        yield
    except OSError as error:
        # numpy's short write carries no number: "1048576 requested and 0 written"
        is_short = error.errno is None and "requested and" in str(error) and str(error).endswith("written")
        if is_short or error.errno in (errno.ENOSPC, errno.EDQUOT):
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


def _told(path: Path) -> Path:
    """The output that a user named, in place of `OUT.partial`, which may be gone when an error is read."""
    return Path(*(part.removesuffix(".partial") for part in path.parts))
