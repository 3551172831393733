"""Progress on stderr, and the point where a signal may stop the run."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from compress.errors import Interrupted, visible


class Progress:
    """Told after each unit of work that is safely stored; raises `Interrupted` there once a signal has come.

    On a terminal one line is rewritten, elsewhere a plain line is written at the first, the last, and every
    30 seconds. `quiet` writes nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.signal_number: int | None = None
        self._stage = ""
        self._started = 0.0
        self._written = 0.0
        self._open_line = False

    def tick(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` units of `stage` are finished. Raises: Interrupted after a signal."""
        now = time.monotonic()
        if stage != self._stage:
            self._close()
            self._stage, self._started, self._written = stage, now, 0.0
        if not self.quiet:
            self._write(done, total, now)
        self.check()

    def check(self) -> None:
        """Raises: Interrupted after a signal."""
        if self.signal_number is not None:
            self._close()
            raise Interrupted("Stopped; what was finished is kept.", self.signal_number)

    def note(self, text: str) -> None:
        """One line of its own."""
        self._close()
        if not self.quiet:
            print(visible(text), file=sys.stderr, flush=True)

    def _write(self, done: int, total: int, now: float) -> None:
        elapsed = now - self._started
        left = f", about {elapsed / done * (total - done):.0f} s left" if 0 < done < total and elapsed > 2 else ""
        line = f"{self._stage}: {done}/{total} ({elapsed:.0f} s{left})"
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
            self._open_line = True
            if done >= total:
                self._close()
        elif done in (0, total) or now - self._written >= 30:
            print(line, file=sys.stderr, flush=True)
            self._written = now

    def _close(self) -> None:
        if self._open_line:
            print(file=sys.stderr, flush=True)
            self._open_line = False

    @contextmanager
    def catching_signals(self, told: bool = True) -> Iterator[None]:
        """The first SIGINT or SIGTERM asks for a stop at the next `tick`; the second stops at once. told: say so, which
        a process that passes a signal on has done already.

        Raises: Interrupted, with the second signal's number. Inside it is a KeyboardInterrupt, which no
        `except Exception` takes for a failure; it must not get out, for typer makes a plain exit code 130 of it.
        """

        def ask(number: int, _frame: FrameType | None) -> None:
            if self.signal_number is not None:
                raise KeyboardInterrupt(number)
            self.signal_number = number
            self._close()
            if told and not self.quiet:
                print("Stopping after this step. Press Ctrl-C again to stop at once.", file=sys.stderr, flush=True)

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except KeyboardInterrupt as error:
            number = next((item for item in error.args if isinstance(item, int)), signal.SIGINT)
            raise Interrupted("Stopped at once; what was finished is kept.", number) from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Named(Progress):
    """The progress of one of several things, whose name its stages begin with."""

    def __init__(self, outer: Progress, name: str) -> None:
        super().__init__(outer.quiet)
        self._outer, self._name = outer, name

    def tick(self, stage: str, done: int, total: int) -> None:
        """See `Progress`."""
        self._outer.tick(f"{self._name}: {stage}", done, total)

    def check(self) -> None:
        """See `Progress`."""
        self._outer.check()

    def note(self, text: str) -> None:
        """See `Progress`."""
        self._outer.note(text)
