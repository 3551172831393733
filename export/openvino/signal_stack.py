"""The stack that signals are handled on, as it was before OpenVINO loaded."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """stack_t of sigaltstack(2)."""

    _fields_ = [("place", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Give this thread its own alternate signal stack back.

    OpenVINO (2026.0 and later, as it compiles its first model for the CPU) sets one to find out whether it may use AMX,
    frees the memory, and leaves it set. Python's handlers run on that stack, so the next signal, Ctrl-C say, would end
    the process with a segmentation fault. Nothing is done on systems other than Linux.
    """
    if sys.platform != "linux":
        yield
        return
    set_stack, before = ctypes.CDLL(None).sigaltstack, _Stack()
    if set_stack(None, ctypes.byref(before)):  # none is known that could be given back
        yield
        return
    try:
        yield
    finally:
        set_stack(ctypes.byref(before), None)
