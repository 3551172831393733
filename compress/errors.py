"""The error tree. Each class carries the exit code of the command line (README, "Exit codes").

A user's mistake raises one of these with a message that names what, where, the value found, what is
allowed and what to do; the command prints it as one paragraph. Anything else that escapes is a bug of ours.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class CompressError(Exception):
    """Base of every error that a user can act on."""

    exit_code: ClassVar[int] = 2


class UsageError(CompressError):
    """A wrong option, recipe, path or pattern."""

    exit_code: ClassVar[int] = 2


class UnsupportedError(CompressError):
    """A missing extra, or something that this target, machine or model family cannot do."""

    exit_code: ClassVar[int] = 4


class InputError(CompressError):
    """A model, data or artifact file that is malformed, unsafe or unreadable."""

    exit_code: ClassVar[int] = 5


class ResourceError(CompressError):
    """Too little disk or memory, or a file system that refuses to be written."""

    exit_code: ClassVar[int] = 6


class Interrupted(CompressError):  # noqa: N818 (a stop, not a mistake)
    """Stopped by a signal after the state was saved."""

    exit_code: ClassVar[int] = 130

    def __init__(self, message: str, signal_number: int = 2) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A sentence that offers the nearest allowed names: ' Did you mean X? Allowed: …'."""
    names = sorted(allowed)
    begun = [each for each in names if len(name) > 1 and each.startswith(name)]  # of nvidia-h100 there are two
    close = begun or get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"{hint} Allowed: {', '.join(names) or 'none'}."


def visible(text: str) -> str:
    """For a terminal: names out of files may hold escape sequences and direction marks, which are told, not obeyed."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def unread(error: Exception) -> str:
    """Why a file's content could not be taken, by the error that met it."""
    if isinstance(error, KeyError):
        return f"it lacks '{error.args[0] if error.args else ''}'"
    if isinstance(error, TypeError):
        return "a value is of another kind than it should be"
    return str(error) or type(error).__name__


_NO_MEMORY: tuple[str, ...] = (
    "can't allocate memory",
    "out of memory",
    "bad_alloc",
    "bad allocation",
    "Failed to allocate memory",
)
_NO_MEMORY = (*_NO_MEMORY, "Cannot allocate memory", "can't start new thread")
FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG, errno.ESTALE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was refused, which libraries say in texts of their own."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    theirs = type(error).__module__.startswith(("onnxruntime", "safetensors", "torch"))
    told = (theirs or isinstance(error, RuntimeError)) and any(text in str(error) for text in _NO_MEMORY)
    return told or isinstance(error, MemoryError)


def place_of(error: OSError) -> str | None:
    """The file that an error is about: of a copy the one that is written, which is the second where a disk is full."""
    found = error.filename2 if error.errno in FULL and error.filename2 else error.filename
    return None if found is None else os.fsdecode(found) if isinstance(found, bytes | os.PathLike) else str(found)


def exhausted(error: BaseException) -> str:
    """What this machine has too little of, or does not let us use; empty for any other error."""
    if is_out_of_memory(error):
        return "Out of memory. `compress plan` predicts what a run needs."
    if not isinstance(error, OSError):
        return ""
    if error.errno in FULL:
        where = f" while writing {place_of(error)}" if error.filename else ""
        return f"No space left{where}. Free some, or name another disk: TMPDIR for temporary files, -o for the output."
    if error.errno in _REFUSED:
        return f"{error.filename or 'A file'} cannot be used: {error.strerror}."
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "Too many files are open. Allow more: `ulimit -n` tells and sets how many a process may open."
    if error.errno == errno.EAGAIN:
        return "No further process or thread may be started. Allow more: `ulimit -u` tells and sets how many."
    if "temporary directory" in str(error):  # of the standard library, without a name
        return "No folder for temporary files can be written. Let TMPDIR name one that can."
    return ""
