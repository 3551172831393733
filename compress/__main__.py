"""`compress` and `python -m compress`: run the command line and turn errors into one paragraph and an exit code."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType


class _Stop(BaseException):
    """A signal outside `Progress.catching_signals`. Of a KeyboardInterrupt typer would make a silent exit code 130."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code (README, "Exit codes")."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given)
    except _Stop as stop:
        return _fail(given, "Interrupted", "Stopped at once.", 128 + stop.number)


def _run(given: list[str]) -> int:
    import typer

    from compress.cli.main import app
    from compress.errors import CompressError, Interrupted, ResourceError, exhausted

    try:
        result = app(given, standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except (BrokenPipeError, SystemExit) as error:  # whoever read our output has closed it
        if isinstance(error, SystemExit) and not _is_broken_pipe(error):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except typer.TyperException as error:  # wrong options
        context = getattr(error, "ctx", None)
        if error.format_message().startswith("Usage:"):  # called without a verb: the help is the answer
            print(error.format_message(), file=sys.stderr)
            return 2
        where = f" See `{context.command_path} --help`." if context else ""
        text = error.format_message().rstrip(".") + "."
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
    if "--json" in given:
        print(json.dumps({"error": {"type": kind, "message": message, "exit_code": code}}))
    else:
        print(f"compress: {visible(message)}", file=sys.stderr)
    return code


def entry() -> None:
    """The console script."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    sys.exit(main())


def _stop(number: int, _frame: FrameType | None) -> None:
    """Unwind, so that temporary folders are removed."""
    raise _Stop(number)


if __name__ == "__main__":
    entry()
