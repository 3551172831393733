"""Trellis codes: weights as values of states of 16 bits that overlap (QTIP, Tseng et al. 2024, arXiv 2406.11235).

A tile is 16 inputs by 16 outputs, 256 weights. Each has a symbol of 1 to 8 bits; the state at a weight is the last 16
bits of symbols, its own lowest, and a computed code makes a value like a Gaussian's of it. Before the first symbol
come the last ones of the tile (tail-biting), so that nothing but symbols is stored. Order of the weights, stream of
bits and codes are those of EXL3 files. Pure functions on tensors.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

STATE_BITS = 16
STATES = 1 << STATE_BITS
SIDE, SYMBOLS = 16, 256
# what states are multiplied with, which also marks a file that holds the code
MULTIPLIERS: dict[str, int] = {"3inst": 89226354, "mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}
# torch searches so many tiles at a time: more do not stay in a processor's cache
TOGETHER = 2


@cache
def table(code: str) -> Tensor:
    """(65536,) float32: the value of each state. Not to be written to.

    `3inst` and `mcg`: the bits of a product with the state, but for some, as the sum of two float16 numbers; `mul1`:
    the sum of the four bytes of a product, which is nearly normal, scaled by two float16 numbers.
    """
    states = torch.arange(STATES, dtype=torch.int64)
    product = states * MULTIPLIERS[code] + (64248484 if code == "3inst" else 0)
    if code == "mul1":
        total = (product[:, None] >> torch.tensor([0, 8, 16, 24]) & 255).sum(1)
        factor, offset = _halves(torch.tensor([0x1EEE, 0xC931])).unbind()
        return (1024 + total) * factor + offset
    words = (product & 0x8FFF8FFF) ^ 0x3B603B60
    return _halves(words & 0xFFFF) + _halves(words >> 16)


def _halves(words: Tensor) -> Tensor:
    """Numbers below 2^16 as the float16 whose bits they are, in float32."""
    return _signed(words).view(torch.float16).float()


def _signed(words: Tensor) -> Tensor:
    """Numbers below 2^16 as the int16 of the same bits."""
    return torch.where(words < 1 << 15, words, words - (1 << 16)).to(torch.int16)


@cache
def places() -> Tensor:
    """(256,) int64: where in a tile, input · 16 + output, each symbol in turn has its weight: the order in which tensor
    cores hold a fragment of a matrix."""
    lane, part = torch.arange(SYMBOLS) // 8, torch.arange(SYMBOLS) % 8
    row = lane % 4 * 2 + part % 2 + part // 2 % 2 * 8
    return row * SIDE + lane // 4 + part // 4 * 8


def to_tiles(values: Tensor) -> Tensor:
    """(in, out), multiples of 16 → (in / 16, out / 16, 256) in the order of the symbols."""
    inputs, outputs = values.shape
    tiles = values.reshape(inputs // SIDE, SIDE, outputs // SIDE, SIDE).transpose(1, 2)
    return tiles.reshape(inputs // SIDE, outputs // SIDE, SYMBOLS)[..., places()]


def from_tiles(tiles: Tensor) -> Tensor:
    """Inverse of `to_tiles`."""
    rows, columns, _ = tiles.shape
    square = tiles[..., torch.argsort(places())].reshape(rows, columns, SIDE, SIDE)
    return square.transpose(1, 2).reshape(rows * SIDE, columns * SIDE)


def states(symbols: Tensor, bits: int) -> Tensor:
    """symbols (…, 256) of `bits` bits → the state at each, int64."""
    symbols = symbols.long()
    found = symbols.clone()
    for back in range(1, -(-STATE_BITS // bits)):
        found |= symbols.roll(back, -1) << (back * bits)
    return found & (STATES - 1)


def decode(symbols: Tensor, bits: int, code: str) -> Tensor:
    """symbols (…, 256) → values (…, 256) float32."""
    return table(code)[states(symbols, bits)]


def pack(symbols: Tensor, bits: int) -> Tensor:
    """symbols (…, 256) → (…, 16 · bits) int16: one stream, highest bits first, in words of 32 bits whose low half comes
    first."""
    stream = (symbols.long()[..., None] >> torch.arange(bits - 1, -1, -1)) & 1
    halves = stream.reshape(*symbols.shape[:-1], -1, 2, 16).flip(-2)
    words = (halves << torch.arange(15, -1, -1)).sum(-1).flatten(-2)
    return _signed(words)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: symbols uint8."""
    halves = (words.long() & 0xFFFF).reshape(*words.shape[:-1], -1, 2).flip(-1)
    stream = (halves[..., None] >> torch.arange(15, -1, -1)) & 1
    values = stream.reshape(*words.shape[:-1], SYMBOLS, bits) << torch.arange(bits - 1, -1, -1)
    return values.sum(-1).to(torch.uint8)


def search(wanted: Tensor, bits: int, values: Tensor) -> Tensor:
    """Symbols (tiles, 256) uint8 whose values come closest to `wanted` (tiles, 256) float32, by Viterbi's algorithm
    over all 2^16 states.

    The context of the first symbol is that after the last: the best symbols of the tile turned by half give it, then
    the tile is searched from it back to it (QTIP, Algorithm 4).

    Args: values (65536,) float32 of each state.
    """
    found = [_search(part, bits, values) for part in torch.split(wanted.float(), TOGETHER)]
    return torch.cat(found) if found else torch.empty(0, SYMBOLS, dtype=torch.uint8)


def _search(wanted: Tensor, bits: int, values: Tensor) -> Tensor:
    half = SYMBOLS // 2
    seam = _walk(wanted.roll(half, 1), bits, values, None)[:, :half].long()
    context = torch.zeros(len(wanted), dtype=torch.int64)
    for column in seam[:, -STATE_BITS:].T:
        context = (context << bits | column) & (_contexts(bits) - 1)
    return _walk(wanted, bits, values, context)


def _contexts(bits: int) -> int:
    """What can stand before a symbol: all of a state but the bits that it pushes out."""
    return STATES >> bits


def _walk(wanted: Tensor, bits: int, values: Tensor, context: Tensor | None) -> Tensor:
    """Symbols of least error for (tiles, n), from a context (tiles,) back to it, or anywhere; see kernels/trellis.c."""
    tiles, length = wanted.shape
    count, rows = _contexts(bits), values.reshape(-1, 1 << bits)
    cost = torch.zeros(tiles, count)
    if context is not None:
        cost.fill_(torch.inf).scatter_(1, context[:, None], 0.0)
    came = torch.empty(length, tiles, count, dtype=torch.uint8)
    for place in range(length):
        ahead = (rows - wanted[:, place, None, None]).square_().add_(cost[..., None])  # by context and symbol
        cost, came[place] = _least(ahead.reshape(tiles, -1, count))
    end = cost.argmin(1) if context is None else context
    found = torch.empty(tiles, length, dtype=torch.uint8)
    for place in range(length - 1, -1, -1):
        state = came[place].gather(1, end[:, None])[:, 0].long() * count + end
        found[:, place] = (state & ((1 << bits) - 1)).to(torch.uint8)
        end = state >> bits
    return found


def _least(values: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest over the middle one of three dimensions, 2^k long, and a place that has it, uint8: halves are
    compared, which torch does many times faster than it looks for a minimum."""
    place = torch.zeros((), dtype=torch.uint8)
    size = values.shape[1]
    while size > 1:
        size //= 2
        low, high = values[:, :size], values[:, size:]
        better = high < low
        values = torch.minimum(low, high)
        base = torch.where(better, place[:, size:], place[:, :size]) if place.dim() else place
        place = base + better.to(torch.uint8) * size
    return values[:, 0], place[:, 0]
