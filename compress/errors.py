"""The error tree. Each class carries the exit code of the command line (README, "Exit codes").

A user's mistake raises one of these with a message that names what, where, the value found, what is
allowed and what to do; the command prints it as one paragraph. Anything else that escapes is a bug of ours.
"""

from __future__ import annotations

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
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"{hint} Allowed: {', '.join(names) or 'none'}."


def visible(text: str) -> str:
    """For a terminal: names out of files may hold escape sequences and direction marks, which are told, not obeyed."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
