"""Additive codebooks: vectors as sums of entries, one of each stage. Pure functions on tensors.

book: (stages, entries, d) float32; codes: (n, stages) int32; a vector decodes to the sum over stages of book[stage,
code].
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.maths import kmeans

# distances held at a time
CHUNK = 1 << 22


def learn(vectors: Tensor, weights: Tensor, entries: int, stages: int, seed: int) -> Tensor:
    """A book (stages, entries, d) by k-means of the vectors, then of what is left of them, stage by stage.

    Args: vectors (n, d) float32; weights (n, d) ≥ 0: what the squared error of each counts.
    """
    left, found = vectors, []
    for stage in range(stages):
        centroids = kmeans.learn(left, weights, entries, seed + stage)
        found.append(centroids)
        left = left - centroids[assign(left, centroids[None], 1)[:, 0]]
    return torch.stack(found)


def stored(values: Tensor) -> Tensor:
    """float32 values as float16 holds them."""
    largest = torch.finfo(torch.float16).max
    return values.clamp(-largest, largest).half().float()


def decode(codes: Tensor, book: Tensor) -> Tensor:
    """codes (n, stages) → (n, d) float32."""
    total = book[0][codes[:, 0]]
    for stage in range(1, len(book)):
        total = total + book[stage][codes[:, stage]]
    return total


def assign(vectors: Tensor, book: Tensor, beam: int) -> Tensor:
    """Codes (n, stages) int32 of the smallest squared error that a search with so many candidates finds.

    The first stage keeps the `beam` nearest entries, each later one the best of all their continuations. With one
    stage, or two and beam ≥ entries, the search is exact.

    Args: vectors (n, d) float32.
    """
    rows = max(1, CHUNK // (book.shape[1] * (min(beam, book.shape[1]) if len(book) > 1 else 1)))
    return torch.cat([_search(part, book, beam) for part in torch.split(vectors, rows)] or [vectors.new_empty(0)])


def _search(vectors: Tensor, book: Tensor, beam: int) -> Tensor:
    count, entries = len(vectors), book.shape[1]
    sizes = book.square().sum(-1)  # (stages, entries)
    # squared error less |x|², (n, candidates), and the codes so far, (n, candidates, stage)
    error = torch.zeros(count, 1)
    codes = torch.empty(count, 1, 0, dtype=torch.int64)
    for stage, entry in enumerate(book):
        step = (sizes[stage] - 2 * (vectors @ entry.T))[:, None, :].expand(-1, error.shape[1], -1)
        for earlier in range(stage):  # |a + b|² has twice their product
            chosen = codes[..., earlier]
            if chosen.numel() < entries:  # a table of all pairs would cost more, and 16 GiB of 65,536 entries
                step = step + 2 * (book[earlier][chosen] @ entry.T)
            else:
                step = step + 2 * (book[earlier] @ entry.T)[chosen]
        grown = (error[..., None] + step).flatten(1)
        kept = min(beam, grown.shape[1]) if stage + 1 < len(book) else 1
        if kept == 1:
            error, place = grown.min(1, keepdim=True)
        else:
            error, place = grown.topk(kept, largest=False)
        before = codes.gather(1, (place // entries)[..., None].expand(-1, -1, stage))
        codes = torch.cat([before, (place % entries)[..., None]], -1)
    return codes[:, 0].int()
