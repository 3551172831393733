"""The search for the symbols of trellis tiles in the compiled library (`trellis.c`)."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import ResourceError
from compress.kernels.library import PATHS, TORCH, chosen_path, library


def has_kernel() -> bool:
    """Whether there is one, and it is not to be passed over: see `chosen_path`."""
    return chosen_path() != TORCH


def search(wanted: Tensor, bits: int, values: Tensor) -> Tensor:
    """See `compress.maths.trellis.search`, whose twin this is. Tiles are shared among torch's threads.

    Raises: ResourceError: no memory for what is remembered of a tile, 2^24 / 2^bits bytes for each thread.
    """
    if wanted.shape[1:] != (256,) or values.shape != (1 << 16,) or not 1 <= bits <= 8:
        raise ValueError(f"Tiles {tuple(wanted.shape)}, values {tuple(values.shape)}, {bits} bits are no search.")
    wanted, values = wanted.cpu().float().contiguous(), values.cpu().float().contiguous()
    found = torch.empty(wanted.shape, dtype=torch.uint8)
    failed = library().trellis_search(
        PATHS[chosen_path()],
        torch.get_num_threads(),
        bits,
        len(wanted),
        values.data_ptr(),
        wanted.data_ptr(),
        found.data_ptr(),
    )
    if failed:
        raise ResourceError(f"No memory is left to search tiles of {bits} bits. Free some, or use fewer threads.")
    return found
