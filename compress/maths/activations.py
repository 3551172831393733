"""Room for the hidden states of all batches: in memory, or above a limit in a mapped file that has no name."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from math import prod
from pathlib import Path

import torch
from torch import Tensor

SPILL_BYTES = 32 * 2**20


def allocate(
    shapes: Sequence[tuple[int, ...]], folder: Path | None = None, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """One uninitialised tensor per shape.

    Above `SPILL_BYTES` in all, they are views of one file in `folder` (the system's temporary folder by default), whose
    blocks are reserved now (a full disk is an OSError here, not a crash later) and which goes with the last view.
    """
    total = sum(prod(shape) for shape in shapes)
    if total * dtype.itemsize <= SPILL_BYTES:
        return [torch.empty(shape, dtype=dtype) for shape in shapes]
    handle, name = tempfile.mkstemp(prefix="activations-", dir=folder)
    try:
        os.posix_fallocate(handle, 0, total * dtype.itemsize)
        flat = torch.from_file(name, shared=True, size=total, dtype=dtype)
    finally:
        os.close(handle)
        Path(name).unlink()
    views, at = [], 0
    for shape in shapes:
        views.append(flat[at : at + prod(shape)].view(shape))
        at += prod(shape)
    return views


def rest(*values: Tensor) -> None:
    """Take the pages of mapped tensors out of this process's memory until they are next used; others stay.

    Nothing is lost: the system keeps what was written in its cache of the file, which it may write out and drop.
    """
    if sys.platform != "linux":
        return
    for tensor in values:
        if tensor.untyped_storage().filename is None:
            continue
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - start
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
