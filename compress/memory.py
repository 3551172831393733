"""How much memory this process took and may take. Imports nothing heavy: children that are measured import it."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes.

    On Linux from /proc: getrusage would also count the parent that this process was forked from.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def allowed_memory() -> int | None:
    """Bytes that this machine, or the control group this process is in, has; None where that is not known."""
    from compress import hwprofiles

    facts = hwprofiles.machine()
    sizes = [facts.get(key, "") for key in ("memory_bytes", "memory_limit_bytes")]
    return min((int(size) for size in sizes if size.isdigit()), default=None)


def give_back() -> None:
    """Return memory that was freed in pieces to the system, where the C library keeps it (glibc does)."""
    if sys.platform == "linux" and (trim := getattr(_libc(), "malloc_trim", None)) is not None:
        trim(0)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
