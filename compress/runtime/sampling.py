"""Choosing the next token from logits: greedy, or drawn after temperature, top-k and top-p. Pure functions on numpy.

The order is that of transformers: temperature, then top-k, then top-p over what is left. Sums are in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import InputError, UsageError

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0: the likeliest each time; top_k 0 and top_p 1: no limit.

    Raises: UsageError for a value outside its range, or a limit that temperature 0 would make void.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature={self.temperature}: allowed are 0 (greedy) and numbers above it, often 0.7.")
        if self.top_k < 0:
            raise UsageError(f"top_k={self.top_k}: allowed are 0 (no limit) and numbers above it.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p}: allowed are numbers above 0 up to 1 (no limit).")
        if self.seed < 0:
            raise UsageError(f"seed={self.seed}: allowed are whole numbers from 0.")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise UsageError(
                "top_k and top_p limit what is drawn, but temperature 0 draws nothing: give a temperature."
            )

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    def generators(self, rows: int) -> list[np.random.Generator]:
        """One source of numbers per row of a batch, so that no row's draws depend on another's length."""
        return [np.random.default_rng([self.seed, row]) for row in range(rows)]


def choose(logits: NDArray[Any], sampling: Sampling, generators: Sequence[np.random.Generator]) -> NDArray[np.int64]:
    """One token per row. logits (rows, vocabulary); generators: one per row, each gives one number.

    Raises: InputError for logits of which no distribution can be made.
    """
    if bool(np.isnan(logits).any()) or not bool(np.isfinite(logits.max(axis=-1)).all()):
        raise InputError(
            "The model's logits hold NaN or infinite values: the artifact is broken. Run `compress verify`."
        )
    if sampling.is_greedy:
        return np.asarray(logits.argmax(axis=-1), np.int64)
    chances = probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p)
    return draw(chances, np.array([generator.random() for generator in generators]))


def probabilities(logits: NDArray[Any], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Floats:
    """What tokens are drawn with: (rows, vocabulary) float64 from logits of that shape, each row of sum 1."""
    kept = softmax(logits, temperature)
    if 0 < top_k < logits.shape[-1]:
        kept = _renormalized(kept, top_k_mask(logits, top_k))
    return _renormalized(kept, top_p_mask(kept, top_p)) if top_p < 1 else kept


def softmax(logits: NDArray[Any], temperature: float = 1.0) -> Floats:
    """exp(logits / temperature) by row, of sum 1; float64, and safe from overflow."""
    values = np.asarray(logits, np.float64)
    with np.errstate(over="ignore", under="ignore"):  # far from the largest: 0
        powers = np.exp((values - values.max(axis=-1, keepdims=True)) / temperature)
    result: Floats = powers / powers.sum(axis=-1, keepdims=True)
    return result


def top_k_mask(logits: NDArray[Any], k: int) -> Flags:
    """The k largest of each row (rows, vocabulary); of equal ones the first."""
    bound = np.partition(logits, -k, axis=-1)[:, -k, None]
    above, equal = logits > bound, logits == bound
    room = k - above.sum(axis=-1, keepdims=True)
    result: Flags = above | (equal & (equal.cumsum(axis=-1) <= room))
    return result


def top_p_mask(chances: Floats, p: float) -> Flags:
    """The fewest tokens of each row that together have probability p, likeliest first, of equal ones the first.

    (Holtzman et al. 2020, arXiv 1904.09751.) chances (rows, vocabulary), each row of sum 1.
    """
    kept = np.zeros(chances.shape, np.bool_)
    # tokens at or below this sum to at most 1 - p, so the rest reach p without them; halved against rounding
    floor = (1 - p) / chances.shape[-1] / 2
    for row, values in enumerate(chances):
        places = np.flatnonzero(values > floor)
        places = places[np.argsort(-values[places], kind="stable")]
        sums = values[places].cumsum()
        kept[row, places[: int(np.searchsorted(sums, p)) + 1]] = True
    return kept


def draw(chances: Floats, numbers: Floats) -> NDArray[np.int64]:
    """A token per row by its number in [0, 1): the first whose cumulative probability exceeds it."""
    sums = chances.cumsum(axis=-1)
    wanted = numbers[:, None] * sums[:, -1:]  # the last sum may miss 1 by rounding
    return np.asarray((sums > wanted).argmax(axis=-1), np.int64)


def _renormalized(chances: Floats, mask: Flags) -> Floats:
    kept = np.where(mask, chances, 0.0)
    result: Floats = kept / kept.sum(axis=-1, keepdims=True)
    return result
