"""`compress` and `python -m compress`: run the command line and turn errors into one paragraph and an exit code."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from compress.cli import streams
from compress.progress import heeded


class _Stop(BaseException):
    """A signal outside `Progress.catching_signals`. Of a KeyboardInterrupt typer would make a silent exit code 130."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code (README, "Exit codes")."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["help"]:  # `compress help run` is `compress run --help`
        given = [*given[1:], "--help"]
    try:
        problem = _unfit(given)
        code = _fail(given, "UsageError", problem, 2) if problem else _run(given)
        return _told(given, code)
    except _Stop as stop:
        return _fail(given, "Interrupted", "Stopped at once.", 128 + stop.number)


def _unfit(given: Sequence[str]) -> str:
    """What no verb can work with: a report holds its command as text, and relative paths start at a folder."""
    for word in given:
        if any("\ud800" <= char <= "\udfff" for char in word):
            return f"{word!a} is not UTF-8. Rename the file or folder, or link to it under another name."
    try:
        os.getcwd()  # noqa: PTH109 (nothing else here needs pathlib)
    except OSError as error:
        return f"The current folder cannot be used ({error.strerror}): was it removed? Change to another one."
    return ""


def _told(given: Sequence[str], code: int) -> int:
    """Write the output now, where a failure can still be told. Returns the exit code."""
    error = streams.flushed(sys.stdout)
    if error is None:
        return code
    return 141 if isinstance(error, BrokenPipeError) else _lost(given, error)


def _lost(given: Sequence[str], error: OSError) -> int:
    text = f"Standard output cannot be written ({error.strerror}), and what it should have held is lost."
    return _fail([word for word in given if word != "--json"], "ResourceError", text, 6)


def _run(given: list[str]) -> int:
    import typer

    from compress.cli.main import app
    from compress.errors import CompressError, Interrupted, ResourceError, exhausted

    try:
        result = app(given, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (BrokenPipeError, SystemExit) as error:  # whoever read our output has closed it
        if isinstance(error, SystemExit) and not _is_broken_pipe(error):
            raise
        streams.silence(sys.stdout)
        return 141
    except typer.TyperException as error:  # wrong options
        context = getattr(error, "ctx", None)
        if error.format_message().startswith("Usage:"):  # called without a verb: the help is the answer
            streams.say(error.format_message())
            return 2
        where = f" See `{context.command_path} --help`." if context else ""
        text = error.format_message()
        text += "" if text.endswith((".", "?")) else "."
        return _fail(given, "UsageError", text + where, 2)
    except typer.Exit as error:
        return error.exit_code
    except typer.Abort:
        return _fail(given, "Interrupted", "Stopped.", 130)
    except Interrupted as error:
        again = shlex.join(["compress", *given])
        return _fail(given, "Interrupted", f"{error} To resume, repeat: {again}", 128 + error.signal_number)
    except CompressError as error:
        return _fail(given, type(error).__name__, str(error), error.exit_code)
    except Exception as error:  # the last line of defence: too small a machine, or a bug of ours
        if isinstance(error, OSError) and error.filename == streams.STDOUT:
            streams.silence(sys.stdout)
            return _lost(given, error)
        lacking = exhausted(error)
        if lacking:
            return _fail(given, ResourceError.__name__, lacking, ResourceError.exit_code)
        if _is_profile_error(error):
            return _fail(given, "UsageError", str(error), 2)
        text = f"{type(error).__name__}: {error}. This is a bug of compress; --debug shows where."
        return _fail(given, "Bug", text, 1)


def _is_broken_pipe(error: SystemExit) -> bool:
    """Typer turns a broken pipe into exit 1 and wraps stdout; rich exits with 1 while it handles the error. Any other
    exit is not ours to change."""
    return type(sys.stdout).__name__ == "PacifyFlushWrapper" or isinstance(error.__context__, BrokenPipeError)


def _is_profile_error(error: Exception) -> bool:
    """hwprofiles imports nothing of ours, so its mistakes are none of our errors."""
    from compress.hwprofiles import ProfileError

    return isinstance(error, ProfileError)


def _fail(given: Sequence[str], kind: str, message: str, code: int) -> int:
    from compress.errors import visible

    if "--debug" in given:
        traceback.print_exc()
    described = {"type": kind, "message": message, "exit_code": code}
    if "--json" in given and streams.put(json.dumps({"error": described})) is None:
        return code
    streams.say(f"compress: {visible(message)}")
    return code


def entry() -> None:
    """The console script."""
    streams.open_closed()
    streams.name_output()
    _on_signals(_stop)
    try:
        code = main()
    except _Stop as stop:  # after the last word
        code = 128 + stop.number
    _on_signals(signal.SIG_DFL)  # nothing of ours is to be interrupted while Python ends
    sys.exit(code)


def _on_signals(do: Callable[[int, FrameType | None], Any] | int) -> None:
    """What becomes of SIGINT, SIGTERM and, unless nohup keeps it away, SIGHUP."""
    for number in heeded():
        signal.signal(number, do)


def _stop(number: int, _frame: FrameType | None) -> None:
    """Unwind, so that temporary folders are removed. The next signal lets that go on, the one after it ends all."""
    _on_signals(lambda *_: _on_signals(signal.SIG_DFL))
    raise _Stop(number)


if __name__ == "__main__":
    entry()
