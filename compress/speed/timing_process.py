"""A timing repeated in a fresh process, which reads a request from standard input and prints what it found.

Memory is laid out, and kernels are chosen, once per process: what they do to one pair of sessions stays the same over
all its rounds, and shows only from one process to the next.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from compress.errors import InputError, Interrupted
from compress.hwprofiles import Profile
from compress.progress import SIGNALS
from compress.records import Record, Timing


class TimingRequest(Record):
    """What one process times; the fields are those of `compress.speed.measure.measure`."""

    baseline: Path
    variant: Path
    profile: Profile
    vocabulary: int
    longest: int
    image: tuple[int, ...] | None = None
    seed: int = 0
    budget_s: float


class Timed(Record):
    """What it found."""

    runtime: str
    timings: tuple[Timing, ...]


def time_in_process(request: TimingRequest, most_s: float) -> Timed:
    """The timings of one fresh process. most_s: after which it is given up.

    Raises: InputError when the process does not finish.
    """
    command = [sys.executable, "-c", "from compress.speed.timing_process import main; main()"]
    failed = f"{request.variant} could not be timed in a process of its own"
    return Timed.model_validate_json(last_line(command, most_s, failed, request.model_dump_json()))


def last_line(command: Sequence[str], most_s: float, failed: str, given: str = "") -> str:
    """The last line that a process prints. most_s: after which it is given up; failed: how an error begins; given: what
    it reads.

    Raises: InputError with the process's own last words; Interrupted where a signal stopped it.
    """
    try:
        child = subprocess.run(command, input=given, capture_output=True, text=True, timeout=most_s, check=False)
    except subprocess.TimeoutExpired as late:
        raise InputError(f"{failed}: it did not end in {most_s:.0f} s.") from late
    if -child.returncode in SIGNALS:
        # of a terminal Ctrl-C reaches the children too
        raise Interrupted("Stopped; what was finished is kept.", -child.returncode)
    lines = child.stdout.splitlines()
    if child.returncode != 0 or not lines:
        last = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        raise InputError(f"{failed}: {last[0]}")
    return lines[-1]


def main() -> None:
    """Read a request, time it, print the timings as one line of JSON."""
    from compress.speed.measure import time_request

    print(time_request(TimingRequest.model_validate_json(sys.stdin.read())).model_dump_json())
