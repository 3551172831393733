"""The compiled library: where it lies, which paths this machine has, why it is not there, how it is built."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sysconfig
import threading
from ctypes import c_int, c_long, c_void_p
from functools import cache
from pathlib import Path

import torch

from compress.errors import ResourceError, UnsupportedError, UsageError, nearest

HERE = Path(__file__).parent
SOURCES = ("lookup.c", "nibble.c", "decode.c", "trellis.c", "pool.c")
# the numbers are those of kernels.h; the order is fastest first
PATHS = {"avx512-vbmi": 2, "avx2": 1, "portable": 0}
TORCH = "torch"
# for GPUs, see gpu.py
TRITON = "triton"
# of the functions and layouts in the C sources, which say the same
VERSION = 3
VARIABLE = "COMPRESS_KERNELS"
BUILD = "python -m compress.kernels build"

_LOOKUP = (c_int, c_int, *(c_long,) * 5, *(c_void_p,) * 6)
_NIBBLES = (c_int, c_int, *(c_long,) * 5, *(c_void_p,) * 6)
_PRODUCT = (c_int, c_int, c_int, c_int, *(c_long,) * 7, *(c_void_p,) * 4)
_ROWS = (c_int, c_int, c_int, c_int, *(c_long,) * 7, c_void_p, c_void_p, c_long, c_long, c_void_p)
_SEARCH = (c_int, c_int, c_int, c_long, c_void_p, c_void_p, c_void_p)
_SIGNATURES = {
    "codebook_version": ((), c_int),
    "codebook_has": ((c_int,), c_int),
    "codebook_lookup_memory": ((c_int, c_long), c_long),
    "codebook_lookup": (_LOOKUP, None),
    "codebook_nibbles_memory": ((c_long, c_long), c_long),
    "codebook_nibbles": (_NIBBLES, None),
    "codebook_product": (_PRODUCT, None),
    "codebook_rows": (_ROWS, None),
    "trellis_search": (_SEARCH, c_int),
}


@cache
def _opened() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    found = sorted(HERE.glob("_codebook*.so")) + sorted(HERE.glob("_codebook*.pyd"))
    if not found:
        return f"the compiled kernels were not built when the package was installed; `{BUILD}` builds them"
    try:
        opened = ctypes.CDLL(str(found[-1]))
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(opened, name)
            function.argtypes, function.restype = arguments, result
    except (OSError, AttributeError) as error:
        return f"{found[-1].name} cannot be used ({error}); `{BUILD}` builds it anew"
    if opened.codebook_version() != VERSION:
        return f"{found[-1].name} is of another version of this package; `{BUILD}` builds it anew"
    return opened


def library() -> ctypes.CDLL:
    """Raises: UnsupportedError: there is none, and why."""
    found = _opened()
    if isinstance(found, str):
        raise UnsupportedError(f"No compiled kernels: {found}.")
    return found


def missing() -> str:
    """Why the compiled library is not there; empty where it is."""
    found = _opened()
    return found if isinstance(found, str) else ""


def kernel_paths() -> tuple[str, ...]:
    """Paths that this machine has, fastest first; `torch`, which needs no library, last."""
    found = _opened()
    return (*(() if isinstance(found, str) else (p for p, n in PATHS.items() if found.codebook_has(n))), TORCH)


def named_path(asked: str | None = None) -> str:
    """The path asked for, else the one that COMPRESS_KERNELS names, else "". Raises: UsageError: no such path."""
    named, allowed = asked or os.environ.get(VARIABLE, ""), (*PATHS, TRITON, TORCH)
    if named and named not in allowed:
        where = "path" if asked else VARIABLE
        raise UsageError(f"{where}={named!r} is no path of the kernels.{nearest(named, allowed)}")
    return named


def chosen_path(asked: str | None = None) -> str:
    """The path on the CPU asked for, else the one that COMPRESS_KERNELS names, else the fastest.

    Raises: UsageError: no such path. UnsupportedError: this machine lacks it.
    """
    named = named_path(asked)
    if not named:
        return kernel_paths()[0]
    if named in kernel_paths():
        return named
    why = missing() or f"this processor lacks what '{named}' needs"
    why = "they compute on a GPU, not on the CPU" if named == TRITON else why
    raise UnsupportedError(f"Kernels '{named}': {why}. This machine has: {', '.join(kernel_paths())}.")


def thread_count(work: int) -> int:
    """Threads for so many codes: torch's number where the work outweighs waking them."""
    return torch.get_num_threads() if work >= 1 << 18 else 1


_memory = threading.local()


def scratch(size: int) -> int:
    """Address of `size` bytes that this thread may use until its next call."""
    held = getattr(_memory, "held", None)
    if held is None or held.numel() < size:
        _memory.held = held = torch.empty(size, dtype=torch.uint8)
    return int(held.data_ptr())


def build(compiler: str = "") -> Path:
    """Compile the library into the package's folder, by CC and CFLAGS where these are set. Its path.

    Raises: UnsupportedError: no compiler, or one that cannot compile it. ResourceError: a folder not to be written.
    """
    command = compiler or os.environ.get("CC", "") or shutil.which("cc") or shutil.which("clang") or ""
    if not command:
        raise UnsupportedError("There is no C compiler (`cc`). Install GCC or Clang, or let CC name one.")
    if not os.access(HERE, os.W_OK):
        raise ResourceError(f"{HERE} cannot be written. Build as the user that installed the package.")
    target = HERE / f"_codebook{sysconfig.get_config_var('SHLIB_SUFFIX') or '.so'}"
    started = target.with_suffix(f".{os.getpid()}.new")
    words = [
        *command.split(),
        "-O3",
        "-shared",
        "-fPIC",
        "-pthread",
        "-fvisibility=hidden",
        "-Wno-psabi",
        *os.environ.get("CFLAGS", "").split(),
        "-o",
        str(started),
    ]
    done = subprocess.run(
        [*words, *(str(HERE / name) for name in SOURCES), "-lm"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UnsupportedError(f"'{command}' could not compile the kernels:\n{done.stderr[-2000:].strip()}")
    started.replace(target)
    _opened.cache_clear()
    return target
