"""Wall time and peak memory of one process, taken the same way on every side. Standard library only."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


class Meter:
    """Made right after the imports: what is resident then is the level that peaks are counted from. Linux only."""

    def __init__(self) -> None:
        gc.collect()
        CLEAR.write_text(RESET_PEAK)
        self.level = _kilobytes("VmRSS")
        self.started = time.perf_counter()
        self.seconds = self.cpu_seconds = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the time spent inside to `seconds`, and that of all cores together to `cpu_seconds`."""
        started, processor = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - started
        self.cpu_seconds += time.process_time() - processor

    def figures(self) -> dict[str, float]:
        """Time inside `timed`, seconds since the imports, and bytes of peak memory above the level after them."""
        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "seconds_with_loading": time.perf_counter() - self.started,
            "peak_bytes": 1024 * (_kilobytes("VmHWM") - self.level),
        }


def _kilobytes(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1])
