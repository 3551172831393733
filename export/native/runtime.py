"""Running a folder: transformers' own modules in torch on the CPU, in float32, with our kernels for codebook layers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from compress import kernels
from compress.export.native.loading import load_module
from compress.models.cache_tensors import read_tensors
from compress.runtime import probing
from compress.runtime.torch_session import Ids, TorchSession, using_threads

TORCH = "torch"
"""The path of the kernels that is exact: codes are decoded to float32 and multiplied by torch."""


class Session(TorchSession):
    """A folder in torch.

    Args: threads for torch and the kernels while a call runs; exact: products in float32 of decoded weights, without
    the kernels' rounded tables.
    Raises: InputError for a folder that the exporter did not write.
    """

    level = "ran"

    def __init__(self, folder: Path, threads: int, *, exact: bool = False) -> None:
        started = time.perf_counter()
        with using_threads(threads):
            model, self.kernels, caches = load_module(folder, TORCH if exact else None)
        caches = () if exact else caches
        super().__init__(model, threads, caches, read_tensors(folder, caches))
        self.load_s = time.perf_counter() - started
        version = torch.__version__.partition("+")[0]
        self.name = f"torch {version} CPU" + (f" with {self.provider}" if self.kernels else "")
        self.notes = () if exact else _notes(self.kernels)

    def logits(self, ids: Ids) -> NDArray[np.float32]:
        """See TorchSession. Where kernels round, every token is computed as in generating, so that rounding is in the
        measured quality; prompts, as `call` times them, are multiplied in float32."""
        rounds = any(not kernel.endswith((TORCH, "rows")) for kernel in self.kernels)
        with kernels.as_decoding() if rounds else nullcontext():
            return super().logits(ids)

    @property
    def provider(self) -> str:
        """See TorchSession; the kernels of codebook layers, that of most of them first."""
        return ", ".join(kernel for kernel, _ in self.kernels.most_common()) or super().provider


def _notes(found: Mapping[str, int]) -> tuple[str, ...]:
    """For the report: how many layers have no compiled kernel, and why."""
    slow = sum(count for kernel, count in found.items() if kernel.endswith(TORCH))
    if not slow:
        return ()
    reason = kernels.missing() or "this machine or COMPRESS_KERNELS allows no other path"
    return (f"{slow} codebook layer(s) were computed by torch, many times slower than by a kernel: {reason}",)


if __name__ == "__main__":
    probing.main(Session)
