"""`compress` and `python -m compress`: run the command line and turn errors into one paragraph and an exit code."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code (README, "Exit codes")."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given)
    except KeyboardInterrupt:
        return _fail(given, "Interrupted", "Stopped at once; what was finished is kept.", 130)


def _run(given: list[str]) -> int:
    import typer

    from compress.cli import app
    from compress.errors import CompressError, Interrupted, ResourceError

    try:
        result = app(given, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except typer.TyperException as error:  # wrong options
        context = getattr(error, "ctx", None)
        where = f" See `{context.command_path} --help`." if context else ""
        return _fail(given, "UsageError", error.format_message() + where, 2)
    except typer.Exit as error:
        return error.exit_code
    except typer.Abort:
        return _fail(given, "Interrupted", "Stopped.", 130)
    except Interrupted as error:
        again = " ".join(["compress", *given])
        return _fail(given, "Interrupted", f"{error} To resume, repeat: {again}", 128 + error.signal_number)
    except CompressError as error:
        return _fail(given, type(error).__name__, str(error), error.exit_code)
    except MemoryError:
        return _fail(given, ResourceError.__name__, "Out of memory. `compress plan` predicts what a run needs.", 6)
    except Exception as error:  # the last line of defence: a bug of ours
        text = f"{type(error).__name__}: {error}. This is a bug of compress; --debug shows where."
        return _fail(given, "Bug", text, 1)


def _fail(given: Sequence[str], kind: str, message: str, code: int) -> int:
    if "--debug" in given:
        traceback.print_exc()
    if "--json" in given:
        print(json.dumps({"error": {"type": kind, "message": message, "exit_code": code}}))
    else:
        print(f"compress: {message}", file=sys.stderr)
    return code


def entry() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
