"""The products in torch alone, for machines without the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor

# codes taken at a time: their indices are 8 bytes each
AT_ONCE = 1 << 20


def indices(codes: Tensor) -> Tensor:
    """Stored codes as int64; int16 holds the bits of unsigned ones."""
    return codes.long() & 0xFFFF if codes.dtype == torch.int16 else codes.long()


def decoded(codes: Tensor, codebook: Tensor, axis: str) -> Tensor:
    """Rows of codes (r, units, m) with codebook (g, m, k, v) → weights without a scale: (r, in), or (r · v, in)."""
    found = indices(codes).reshape(len(codes), len(codebook), -1, codes.shape[2])
    groups = [
        torch.stack([stage[found[:, g, :, s]] for s, stage in enumerate(book)]).sum(0)
        for g, book in enumerate(codebook)
    ]
    vectors = torch.cat(groups, 1)  # (r, units, v)
    return vectors.flatten(1) if axis == "in" else vectors.transpose(1, 2).reshape(-1, codes.shape[1])


def by_lookup(x: Tensor, codes: Tensor, codebook: Tensor) -> Tensor:
    """x (in) times a weight of codes (rows, units, m), axis in → (rows): entries of a table of x · codebook, summed."""
    groups, stages, entries, vector = codebook.shape
    table = torch.einsum("guv,gskv->gusk", x.view(groups, -1, vector), codebook)
    offsets = torch.arange(codes.shape[1] * stages) * entries
    flat = codes.flatten(1)
    rows = max(1, AT_ONCE // flat.shape[1])
    return torch.cat([table.flatten()[indices(part) + offsets].sum(1) for part in torch.split(flat, rows)])
