"""Which channels of a key are rotated together, found by running: pairs keep their length at every position."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import UnsupportedError
from compress.kv.observed import Attended, again

# Lengths are equal but for rounding (bfloat16 has 8 bits); those of channels that are no pair differ by about
# themselves.
TOLERANCE = 0.05


def partners(seen: Attended) -> Tensor:
    """The channel that each is rotated with, (size,) int64; itself where nothing rotates it.

    One token's hidden state stands at every position of the window, so its keys differ by their rotation alone. Known
    are halves (d with d + w / 2, as transformers has Llama) and neighbours (2 d with 2 d + 1) within the first w
    channels, w as wide as the cosines are, or twice.

    Raises: UnsupportedError for rotations in other pairs.
    """
    size = seen.key.shape[-1]
    alone = torch.arange(size)
    if "position_embeddings" not in seen.named or seen.key.shape[2] < 2:
        return alone
    token = seen.hidden[:1, -1:]
    keys = again(seen, token.expand(seen.hidden.shape)).key[0].float()  # (kv heads, n, size)
    if _is_fixed(keys, alone):
        return alone
    width = int(seen.named["position_embeddings"][0].shape[-1])
    for wide in (width, 2 * width):
        for pairs in (_halves(wide, size), _neighbours(wide, size)):
            if pairs is not None and _is_fixed(keys, pairs):
                return pairs
    raise UnsupportedError(
        f"{type(seen.module).__name__} rotates keys in pairs that are neither halves nor neighbours, so no range can "
        "be taken over them. Give envelope=false, which takes each channel by itself."
    )


def lengths(keys: Tensor, pairs: Tensor) -> Tensor:
    """(…, size) → each channel's length with its partner's: √(x_d² + x_p²), |x_d| where it has none."""
    squares = keys.float().square()
    other = squares[..., pairs] * (pairs != torch.arange(len(pairs))).to(keys.device)
    return (squares + other).sqrt()


def _is_fixed(keys: Tensor, pairs: Tensor) -> bool:
    """Whether each length is the same at all positions."""
    found = lengths(keys, pairs)
    return bool((found.amax(1) - found.amin(1) <= TOLERANCE * found.amax(1)).all())


def _halves(width: int, size: int) -> Tensor | None:
    if width % 2 or not 0 < width <= size:
        return None
    pairs = torch.arange(size)
    pairs[:width] = (pairs[:width] + width // 2) % width
    return pairs


def _neighbours(width: int, size: int) -> Tensor | None:
    if width % 2 or not 0 < width <= size:
        return None
    pairs = torch.arange(size)
    pairs[:width] ^= 1
    return pairs
