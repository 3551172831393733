"""Which codebook a budget of bits buys, for layers of given shapes: on small ones a large codebook costs more than it
saves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod

from compress.errors import UsageError
from compress.formats.codebook import Codebook

VECTORS, INDEX_BITS, STAGES = (2, 3, 4, 5, 6, 8, 10, 12, 16), range(2, 13), (1, 2, 3)
# So many vectors for each entry at least: with fewer, entries are what they stand for.
USES = 4
# Counted bits may pass the budget by this share.
SLACK = 0.005


def choose(shapes: Sequence[tuple[int, int]], bits: float, like: Codebook) -> Codebook:
    """The codebook of least expected error whose counted bits per weight, codes, codebooks and scales together, stay
    within `bits`.

    Args: shapes (out, in) of the layers that hold it in common; one for a codebook of its own; like: all else of it is
    kept.
    Raises: UsageError where none is small enough, or fits the widths.
    """
    return _choose(tuple(shapes), bits, like)


@lru_cache(maxsize=1024)
def _choose(shapes: tuple[tuple[int, int], ...], bits: float, like: Codebook) -> Codebook:
    fitting = [form for form in _candidates(shapes, like) if counted(form, shapes) <= bits * (1 + SLACK)]
    if not fitting:
        sizes = ", ".join(f"{rows}x{columns}" for rows, columns in shapes)
        raise UsageError(
            f"No codebook fits {bits:g} bits per weight, everything counted, in layers of {sizes}. Give more bits, "
            "share codebooks (share=block), or write the format out."
        )
    return min(fitting, key=lambda form: (expected_error(form), form.entries * form.stages))


def counted(form: Codebook, shapes: Sequence[tuple[int, int]]) -> float:
    """Stored bits per weight, over layers that hold the codebooks in common."""
    return 8 * sum(form.stored_bytes(shape) for shape in shapes) / sum(prod(shape) for shape in shapes)


def expected_error(form: Codebook) -> float:
    """Mean squared error of weights like a Gaussian's of variance 1.

    4^−b is what no code of b bits per weight goes below; the factors are fitted to 18 runs of k-means on Gaussian
    vectors, 2 to 8 long, of 1 to 3 bits and one to three stages, which they meet within 5 %.
    """
    rate = form.bits * form.stages / form.vector
    return float(4**-rate * (1 + 0.555 * rate**0.7 * form.vector**-0.27) * (1.05 if form.stages > 1 else 1.0))


def _candidates(shapes: Sequence[tuple[int, int]], like: Codebook) -> list[Codebook]:
    """Those that fit the widths, and are learned from vectors enough."""
    found = []
    for vector, width, stages in itertools.product(VECTORS, INDEX_BITS, STAGES):
        form = replace(like, vector=vector, entries=2**width, stages=stages, share=len(shapes))
        if not all(form.fits(columns) for _, columns in shapes):
            continue
        vectors = sum(prod(form.units(shape)) for shape in shapes)
        if vectors >= USES * form.entries * form.groups:
            found.append(form)
    return found
