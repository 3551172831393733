"""Progress on stderr, and the point where a signal may stop the run."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from compress.errors import Interrupted, visible

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FEWEST_TIMED = 2
"""Units that must be finished before the rest is estimated by them."""


def heeded() -> tuple[signal.Signals, ...]:
    """The signals that stop us: SIGHUP not where nohup keeps it away."""
    return tuple(each for each in SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN)


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
        self._first = 0
        self._written = 0.0
        self._open_line = False

    def begin(self, stage: str) -> None:
        """A line for a stage that has no units to count, at its start. Raises: Interrupted after a signal."""
        self._close()
        self._stage = stage
        if not self.quiet:
            _say(visible(stage))
        self.check()

    def tick(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` units of `stage` are finished. A stage's clock starts with its first tick, which comes when
        its first unit begins: after what is set up. Raises: Interrupted after a signal."""
        now = time.monotonic()
        if stage != self._stage:
            self._close()
            self._stage, self._started, self._first, self._written = stage, now, done, 0.0
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
            _say(visible(text))

    def _write(self, done: int, total: int, now: float) -> None:
        elapsed = now - self._started
        left, timed = "", done - self._first
        if timed >= FEWEST_TIMED and done < total and elapsed > 2:
            left = f", about {elapsed / timed * (total - done):.0f} s left"
        line = f"{self._stage}: {done}/{total} ({elapsed:.0f} s{left})"
        if sys.stderr.isatty():
            _say(f"\r\x1b[K{line}", end="")
            self._open_line = True
            if done >= total:
                self._close()
        elif done in (0, total) or now - self._written >= 30:
            _say(line)
            self._written = now

    def _close(self) -> None:
        if self._open_line:
            _say("")
            self._open_line = False

    @contextmanager
    def catching_signals(self, told: bool = True) -> Iterator[None]:
        """The first SIGINT, SIGTERM or SIGHUP asks for a stop at the next `tick`; the second stops at once. told: say
        so, which a process that passes a signal on has done already. A SIGHUP that is ignored, as nohup has it, stays
        so, and a second one counts for nothing: both the shell and the terminal that closes send it.

        Raises: Interrupted, with the second signal's number. Inside it is a KeyboardInterrupt, which no
        `except Exception` takes for a failure; it must not get out, for typer makes a plain exit code 130 of it.
        """

        def ask(number: int, _frame: FrameType | None) -> None:
            if self.signal_number is not None:
                if number == signal.SIGHUP:
                    return
                raise KeyboardInterrupt(number)
            self.signal_number = number
            self._close()
            if told and not self.quiet:
                step = f" ({visible(self._stage)})" if self._stage else ""
                again = "Send SIGTERM" if number == signal.SIGHUP else "Send it again"
                again = "Press Ctrl-C again" if number == signal.SIGINT else again
                _say(f"Stopping after this step{step}. {again} to stop at once.")

        before = {number: signal.signal(number, ask) for number in heeded()}
        try:
            yield
        except KeyboardInterrupt as error:
            number = next((item for item in error.args if isinstance(item, int)), signal.SIGINT)
            raise Interrupted("Stopped at once; what was finished is kept.", number) from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _say(text: str, end: str = "\n") -> None:
    """On stderr. A terminal that is gone, or a full disk below a log, is no reason to end hours of work;
    RuntimeError: a signal that is to be told of came amid another line."""
    with suppress(OSError, RuntimeError):
        print(text, end=end, file=sys.stderr, flush=True)


class Named(Progress):
    """The progress of one of several things, whose name its stages begin with."""

    def __init__(self, outer: Progress, name: str) -> None:
        super().__init__(outer.quiet)
        self._outer, self._name = outer, name

    def begin(self, stage: str) -> None:
        """See `Progress`."""
        self._outer.begin(f"{self._name}: {stage}")

    def tick(self, stage: str, done: int, total: int) -> None:
        """See `Progress`."""
        self._outer.tick(f"{self._name}: {stage}", done, total)

    def check(self) -> None:
        """See `Progress`."""
        self._outer.check()

    def note(self, text: str) -> None:
        """See `Progress`."""
        self._outer.note(text)
