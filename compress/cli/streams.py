"""The standard streams of a command: closed ones, full disks behind them, and characters that they do not have.

Imports nothing but the standard library.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
STDOUT = "standard output"


def open_closed() -> None:
    """Put the null device where standard input, output or error is closed.

    Left free, its number would be given to the next file that is opened, and what libraries print would land there.
    """
    for number, (name, mode) in enumerate(_STREAMS):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf8", closefd=False))  # noqa: SIM115 (as long as we live)


class _Output(io.TextIOWrapper):
    """Its errors name it, so that they are not taken for those of a file."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            error.filename = STDOUT
            raise


def name_output() -> None:
    """Let errors of standard output name it, and write a character that it lacks as its code."""
    given = sys.stdout
    if isinstance(given, io.TextIOWrapper):
        encoding, by_line, at_once = given.encoding, given.line_buffering, given.write_through
        sys.stdout = _Output(given.detach(), encoding, "backslashreplace", None, by_line, at_once)


def flushed(stream: TextIO) -> OSError | None:
    """Write out what a stream holds back. Returns: why it could not; the rest is dropped then, else Python would try it
    again at its end and exit with 120."""
    try:
        stream.flush()
    except OSError as error:
        silence(stream)
        return error
    return None


def put(text: str) -> OSError | None:
    """A line on standard output, written now. Returns: why it could not."""
    try:
        print(text)
    except OSError as error:
        silence(sys.stdout)
        return error
    return flushed(sys.stdout)


def silence(stream: TextIO) -> None:
    """Drop all that a stream is given from now on."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def say(text: str) -> None:
    """A line on standard error, if there is still anyone to read it: not for that does a command end another way."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)
