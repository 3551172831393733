"""The first NVIDIA GPU of this machine, through PyTorch: which one it is, and buffers in its memory.

PyTorch is installed anyway and its usual wheels come with CUDA; a library for buffers alone would be one more thing to
match with the driver.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import ResourceError


def capability() -> int | None:
    """Its SM, 90 for compute capability 9.0; None where PyTorch sees no GPU."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def name() -> str:
    """`NVIDIA H200`."""
    return str(torch.cuda.get_device_name())


def describe() -> str:
    """PyTorch's version, and for which CUDA it was made."""
    made = f"made for CUDA {torch.version.cuda}" if torch.version.cuda else "made without CUDA"
    return f"torch {torch.__version__}, {made}"


def total_bytes() -> int:
    """Of its memory."""
    return int(torch.cuda.get_device_properties(0).total_memory)


def free_bytes() -> int:
    """Of its memory, whatever program took the rest."""
    free, _ = torch.cuda.mem_get_info()
    return int(free)


class Buffers:
    """Tensors on the GPU and one stream of its own, on which all of them are filled and read."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @property
    def stream(self) -> int:
        """As CUDA's C interface takes it."""
        return int(self._stream.cuda_stream)

    def put(self, values: NDArray[Any]) -> Tensor:
        """A copy. Raises: ResourceError."""
        with self._filling():
            return torch.from_numpy(values).to("cuda")

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Filled with anything. Raises: ResourceError."""
        with self._filling():
            return torch.empty(shape, dtype=dtype, device="cuda")

    @contextmanager
    def _filling(self) -> Iterator[None]:
        try:
            with torch.cuda.stream(self._stream):
                yield
        except torch.OutOfMemoryError as error:
            raise ResourceError(f"{name()} has too little memory for this ({error}). Free some there.") from error

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Raises: ResourceError."""
        with self._filling():
            return torch.zeros(shape, dtype=dtype, device="cuda")

    def wait(self) -> None:
        """Until all that was asked for is done."""
        self._stream.synchronize()
