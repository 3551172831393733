"""What else happened to this machine while a round was timed: counters read before and after it, and their causes.

A round is voided by its cause, never by its times, so nothing is left out for being slow. Linux tells all of this,
other systems some of it or nothing: what cannot be read is None and voids nothing. Readings are taken between rounds,
so their own time is in none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

STEAL_SHARE = 0.02
"""Of the round's time: another guest had a processor of ours. The kernel counts in hundredths of a second, so a single
count voids a round shorter than half a second; an undisturbed round has none."""
SWITCHES_PER_S, FEWEST_SWITCHES = 50.0, 3
"""Involuntary context switches of this process: one scheduled beside nothing has a few in a second, one that shares its
processor with another has hundreds. Fewer than three in a round are kernel threads passing by."""
CLOCK_SHARE = 0.1
"""Change of the highest clock frequency among our processors, that of the busy ones, over a round."""
MOST_VOIDED = 1 / 3
"""Beyond this share of disturbed rounds the disturbance is what the machine is like: all are kept, with a warning."""

STEAL, PREEMPTED, SWAP, THROTTLED, CLOCK = "steal", "preempted", "swap", "throttled", "clock"
WORDS = {
    STEAL: "processor time taken by other guests",
    PREEMPTED: "involuntary context switches",
    SWAP: "memory read back from swap",
    THROTTLED: "thermal throttling",
    CLOCK: "a change of clock frequency",
}


@dataclass(frozen=True)
class Counters:
    """One reading; None is what this machine does not tell. Counts grow from an arbitrary start."""

    seconds: float
    steal_s: float | None = None
    switches: int | None = None
    pages_from_swap: int | None = None
    throttles: int | None = None
    clock_khz: float | None = None


Watch = Callable[[], Counters]


def causes(before: Counters, after: Counters) -> tuple[str, ...]:
    """What disturbed the time between two readings; a counter that either lacks tells nothing."""
    seconds = after.seconds - before.seconds
    most_switches = max(FEWEST_SWITCHES, SWITCHES_PER_S * seconds)
    clock = _grown(before.clock_khz, after.clock_khz) / before.clock_khz if before.clock_khz else 0.0
    found = {
        STEAL: _grown(before.steal_s, after.steal_s) > STEAL_SHARE * seconds,
        PREEMPTED: _grown(before.switches, after.switches) > most_switches,
        SWAP: _grown(before.pages_from_swap, after.pages_from_swap) > 0,
        THROTTLED: _grown(before.throttles, after.throttles) > 0,
        CLOCK: abs(clock) > CLOCK_SHARE,
    }
    return tuple(name for name, is_cause in found.items() if is_cause)


def watch(root: Path = Path("/")) -> Watch:
    """A reader of this machine's counters, over the processors that this process may use. root: of /proc and /sys."""
    processors = _processors()
    folders = [root / f"sys/devices/system/cpu/cpu{number}" for number in processors]
    clocks = _readable(folder / "cpufreq/scaling_cur_freq" for folder in folders)
    throttles = _readable(folder / "thermal_throttle/core_throttle_count" for folder in folders)

    def read() -> Counters:
        return Counters(
            seconds=time.perf_counter(),
            steal_s=_steal(root / "proc/stat", processors),
            switches=_switches(),
            pages_from_swap=_field(root / "proc/vmstat", "pswpin"),
            throttles=_over(throttles, sum),
            clock_khz=_over(clocks, max),
        )

    return read


def _grown(before: float | None, after: float | None) -> float:
    return 0.0 if before is None or after is None else after - before


def _processors() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _steal(path: Path, processors: list[int]) -> float | None:
    """Seconds, from the eighth figure of each processor's line (proc(5))."""
    names = {f"cpu{number}" for number in processors}
    lines = [line.split() for line in read_text(path).splitlines() if line.startswith("cpu")]
    ticks = [int(words[8]) for words in lines if words[0] in names and len(words) > 8]
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None


def _switches() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _field(path: Path, name: str) -> int | None:
    found = [line.split()[1] for line in read_text(path).splitlines() if line.startswith(name + " ")]
    return int(found[0]) if found else None


def _over(paths: list[Path], of: Callable[[list[int]], int]) -> int | None:
    """The sum or maximum of what the files hold; None also where a processor went away since they were found."""
    texts = [read_text(path).strip() for path in paths]
    return of([int(text) for text in texts]) if texts and all(text.isdigit() for text in texts) else None


def _readable(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if read_text(path).strip().isdigit()]


def read_text(path: Path) -> str:
    """Empty where this system does not have, or does not show, the file."""
    try:
        return path.read_text()
    except OSError:
        return ""
