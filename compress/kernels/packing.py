"""Codes in the order in which the compiled kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# as in lookup.c, nibble.c and decode.c
RUN, TILE, BLOCK, EIGHT = 16, 256, 64, 8


def narrow(codes: Tensor, entries: int) -> Tensor:
    """One byte per code, two where there are more than 256 entries (int16 that holds the bits of an unsigned one)."""
    return codes.to(torch.uint8) if entries <= 256 else codes.to(torch.int32).to(torch.int16)


def by_tables(codes: Tensor) -> Tensor:
    """Codes (rows, units, m) bytes → look-up order: [run of tables][tile of rows][table][row], rows padded to 64.

    A table is one stage of one unit; a run has 16 of them, a tile 256 rows (the last run and tile what is left).
    """
    tables = F.pad(codes.flatten(1).T, (0, -len(codes) % BLOCK))
    whole = tables.shape[1] // TILE * TILE
    parts: list[Tensor] = []
    for run in torch.split(tables, RUN):
        parts += [run[:, :whole].reshape(len(run), -1, TILE).transpose(0, 1).flatten(), run[:, whole:].flatten()]
    return torch.cat(parts)


def by_nibbles(codes: Tensor) -> Tensor:
    """Codes (rows, units, m) of up to 16 entries → [tile of rows][pair of tables][row], two codes to a byte, the first
    table's in the low bits; rows padded to 64, tables to an even number."""
    tables = F.pad(codes.flatten(1).T, (0, -len(codes) % BLOCK, 0, -codes[0].numel() % 2))
    pairs = tables[::2] | tables[1::2] << 4
    return torch.cat([tile.flatten() for tile in torch.split(pairs, TILE, 1)])


def by_eights(codes: Tensor) -> Tensor:
    """Codes (rows, units, m) → [8 rows][unit][stage][row of the 8], rows padded to a multiple of 8."""
    rows, units, stages = codes.shape
    padded = F.pad(codes, (0, 0, 0, 0, 0, -rows % EIGHT))
    return padded.reshape(-1, EIGHT, units, stages).permute(0, 2, 3, 1).flatten().contiguous()


def padded_width(vector: int) -> int:
    """Entries of a vector as kept for the kernels: 4, or a multiple of 8."""
    return 4 if vector <= 4 else -(-vector // EIGHT) * EIGHT
