"""Runs of tokens that two sets of text have in common, found by hashing every run at every offset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Tokens hashed at once: 8 MB per array, of which about six are alive.
CHUNK_TOKENS = 1 << 20
# Odd and random-looking: xxHash's primes.
_FIRST, _SECOND = np.uint64(0x9E3779B185EBCA87), np.uint64(0xC2B2AE3D27D4EB4F)


@dataclass(frozen=True, eq=False)
class Text:
    """tokens (N,) int64, and pieces (N,) int64: the number of the unbroken stretch that each token belongs to."""

    tokens: NDArray[np.int64]
    pieces: NDArray[np.int64]


def shared_runs(known: Text, other: Text, size: int) -> Iterator[int]:
    """Places in `other` where `size` tokens begin that `known` holds in a row too; no run crosses two pieces.

    Memory: 16 bytes per token of `known`, and some chunks.
    """
    hashes, places = _index(known, size)
    if not len(hashes):
        return
    for start, found in _hashes(other, size):
        nearest = np.searchsorted(hashes, found).clip(max=len(hashes) - 1)
        for offset in np.flatnonzero(hashes[nearest] == found).tolist():
            here, there = start + offset, int(places[nearest[offset]])
            # a hash can err, the tokens cannot
            if np.array_equal(other.tokens[here : here + size], known.tokens[there : there + size]):
                yield here


def _index(text: Text, size: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The hashes of all runs, sorted, and where each run begins."""
    hashes, places = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for start, found in _hashes(text, size):
        hashes.append(found[found != 0])
        places.append(start + np.flatnonzero(found))
    together = np.concatenate(hashes)
    order = np.argsort(together)
    return together[order], np.concatenate(places)[order]


def _hashes(text: Text, size: int) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """Chunks: where it starts, and the hash of the run that begins at each place of it; 0 where no run does."""
    for start in range(0, len(text.tokens) - size + 1, CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS + size - 1)
        hashes = text.tokens[chunk].astype(np.uint64) + np.uint64(1)
        covered = 1
        while covered < size:  # a run is two shorter ones, which overlap in the last turn
            step = min(covered, size - covered)
            hashes = hashes[:-step] * _FIRST + hashes[step:] * _SECOND
            hashes ^= hashes >> np.uint64(32)
            covered += step
        pieces = text.pieces[chunk]
        hashes[hashes == 0] = 1
        hashes[pieces[: len(hashes)] != pieces[size - 1 :]] = 0
        yield start, hashes
