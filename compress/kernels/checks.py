"""What every product takes."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import UsageError

# decode.c keeps as many in arrays of its own
LONGEST, STAGES = 64, 4


def check_input(x: Tensor, columns: int, device: torch.device) -> None:
    """Raises: UsageError: x is not (..., columns) floating on the device, or gradients are wanted of it."""
    if x.shape[-1:] != (columns,) or not x.is_floating_point() or x.device != device:
        where, found = "the CPU" if device.type == "cpu" else str(device), f"{tuple(x.shape)}, {x.dtype} on {x.device}"
        raise UsageError(f"This product takes floating inputs (..., {columns}) on {where}, not {found}.")
    if x.requires_grad and torch.is_grad_enabled():
        raise UsageError("These kernels give no gradients. Multiply by `dequantize()`, or use torch.no_grad().")


def check_rows(start: int, stop: int | None, out: int) -> int:
    """The last row that is wanted. Raises: UsageError: rows that there are not."""
    stop = out if stop is None else stop
    if not 0 <= start <= stop <= out:
        raise UsageError(f"Rows {start} to {stop} of a weight of {out} rows.")
    return stop


def check_parts(codes: Tensor, codebook: Tensor, scale: Tensor, shape: tuple[int, int], axis: str) -> None:
    """Raises: UsageError: codes, codebooks and scale that do not make a weight, see `CodebookProduct`."""
    if axis not in ("in", "out"):
        raise UsageError(f"axis={axis!r} is not allowed. Allowed: in, out.")
    if codes.dim() != 3 or codebook.dim() != 4 or codes.shape[2] != codebook.shape[1]:
        found = f"{tuple(codes.shape)} and {tuple(codebook.shape)}"
        raise UsageError(
            f"Codes are (rows, units, stages) and codebooks (groups, stages, entries, vector), not {found}."
        )
    (rows, units, _), (groups, _, entries, vector) = codes.shape, codebook.shape
    covered = (rows, units * vector) if axis == "in" else (-(-shape[0] // vector), units)
    if covered != (shape[0] if axis == "in" else rows, shape[1]) or units % groups:
        raise UsageError(
            f"Codes {tuple(codes.shape)} and codebooks {tuple(codebook.shape)} along axis {axis} do not make a weight "
            f"{tuple(shape)}."
        )
    if not (1 <= vector <= LONGEST and 1 <= entries <= 65536 and 1 <= codes.shape[2] <= STAGES):
        found = f"Vectors of {vector}, {entries} entries, {codes.shape[2]} stages"
        raise UsageError(f"{found}: at most {LONGEST}, 65536 and {STAGES} are allowed.")
    if tuple(scale.shape) not in ((shape[0], 1), (1, shape[1]), (1, 1)):
        raise UsageError(
            f"A scale is (out, 1), (1, in) or (1, 1) of a weight {tuple(shape)}, not {tuple(scale.shape)}."
        )
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < entries:
        raise UsageError(f"Codes from {int(codes.min())} to {int(codes.max())} of a codebook of {entries} entries.")
