"""Triton kernels for weights of additive codebooks: a product with few tokens from the packed codes, and decoding.

A tile is (R rows of codes) × (U units); each code is read from its row's stream of bits and becomes WIDTH lanes, the
vector's length filled up to a power of two with zeros. Along axis "in" a tile stands for (R, U · WIDTH) weights, along
"out" (ACROSS) for (R · WIDTH, U). Sums are float32. A program has rows of its own, so that the order of its sums, and
with it every byte, is the same in each run.

Importing this needs Triton; its interpreter (TRITON_INTERPRET=1, set before Triton is imported) runs it on the CPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# weights that one program decodes at a time, and columns of them along axis "in"; not tuned
TILE, RUN = 1024, 256
MOST_TOKENS = 4


class Weight(NamedTuple):
    """codes: `grid.pack_bits` of (rows, units · stages), flat, with two bytes more; book (groups, stages, entries,
    width); row_scale (out,), column_scale (in,) or None. vector: weights to a code, of which `width` are stored."""

    codes: Tensor
    book: Tensor
    row_scale: Tensor | None
    column_scale: Tensor | None
    shape: tuple[int, int]
    rows: int
    units: int
    row_bytes: int
    bits: int
    vector: int
    across: bool


@triton.jit  # type: ignore[untyped-decorator]
def _codes(codes, row, unit, inside, stage, row_bytes, STAGES: tl.constexpr, BITS: tl.constexpr, SPAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """One stage's codes: BITS bits each, lowest first, from as many bytes as they may lie across."""
    at = (unit * STAGES + stage) * BITS
    byte = codes + row.to(tl.int64) * row_bytes + (at >> 3)
    found = tl.load(byte, mask=inside, other=0).to(tl.int32)
    for more in tl.static_range(1, SPAN):
        found |= tl.load(byte + more, mask=inside, other=0).to(tl.int32) << (8 * more)
    return (found >> (at & 7)) & ((1 << BITS) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    codes, book, first_row, first_unit, rows, units, run, row_bytes,
    R: tl.constexpr, U: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr, ENTRIES: tl.constexpr,
    BITS: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Weights before they are scaled, (R, U · WIDTH) or (R · WIDTH, U) float32; zero beyond the last row and unit."""
    row = first_row + tl.arange(0, R)[:, None, None]
    if ACROSS:
        unit = first_unit + tl.arange(0, U)[None, None, :]
        lane = tl.arange(0, WIDTH)[None, :, None]
        values = tl.zeros((R, WIDTH, U), tl.float32)
    else:
        unit = first_unit + tl.arange(0, U)[None, :, None]
        lane = tl.arange(0, WIDTH)[None, None, :]
        values = tl.zeros((R, U, WIDTH), tl.float32)
    inside = (row < rows) & (unit < units)
    for stage in tl.static_range(STAGES):
        entry = _codes(codes, row, unit, inside, stage, row_bytes, STAGES, BITS, SPAN) + stage * ENTRIES
        if GROUPS > 1:
            entry += (unit // run) * (STAGES * ENTRIES)
        values += tl.load(book + (entry * WIDTH + lane), mask=inside & (lane < WIDTH), other=0.0).to(tl.float32)
    if ACROSS:
        return tl.reshape(values, (R * WIDTH, U))
    else:  # noqa: RET505 (Triton compiles what follows a return as well)
        return tl.reshape(values, (R, U * WIDTH))


@triton.jit  # type: ignore[untyped-decorator]
def _places(  # type: ignore[no-untyped-def]
    first_row, first_unit, units, out, R: tl.constexpr, U: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr,
    ACROSS: tl.constexpr,
):  # fmt: skip
    """Rows and columns of the weight for the two axes of a tile, and which of them there are."""
    if ACROSS:
        place = tl.arange(0, R * WIDTH)
        row = (first_row + place // WIDTH) * VECTOR + place % WIDTH
        column = first_unit + tl.arange(0, U)
        return row, (place % WIDTH < VECTOR) & (row < out), column, column < units
    else:  # noqa: RET505
        place = tl.arange(0, U * WIDTH)
        row = first_row + tl.arange(0, R)
        unit = first_unit + place // WIDTH
        return row, row < out, unit * VECTOR + place % WIDTH, (place % WIDTH < VECTOR) & (unit < units)


@triton.jit  # type: ignore[untyped-decorator]
def few_tokens(  # type: ignore[no-untyped-def]
    codes, book, row_scale, column_scale, x, y, tokens, out, columns, rows, units, run, row_bytes,
    R: tl.constexpr, U: tl.constexpr, T: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr,
    STAGES: tl.constexpr, ENTRIES: tl.constexpr, BITS: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr,
    ACROSS: tl.constexpr, HAS_ROW: tl.constexpr, HAS_COLUMN: tl.constexpr,
):  # fmt: skip
    """y (tokens, out) = x (tokens, columns) Wᵀ; a program has R rows of codes and T tokens."""
    first_row = tl.program_id(0) * R
    token = tl.program_id(1) * T + tl.arange(0, T)
    if ACROSS:  # noqa: SIM108 (of a conditional expression Triton compiles both sides)
        sums = tl.zeros((T, R * WIDTH, U), tl.float32)
    else:
        sums = tl.zeros((T, R, U * WIDTH), tl.float32)
    for first_unit in range(0, units, U):
        weight = _tile(codes, book, first_row, first_unit, rows, units, run, row_bytes,
                       R, U, WIDTH, STAGES, ENTRIES, BITS, SPAN, GROUPS, ACROSS)  # fmt: skip
        _, _, column, there = _places(first_row, first_unit, units, out, R, U, VECTOR, WIDTH, ACROSS)
        wanted = (token < tokens)[:, None] & there[None, :]
        value = tl.load(x + token.to(tl.int64)[:, None] * columns + column[None, :], mask=wanted, other=0.0)
        value = value.to(tl.float32)
        if HAS_COLUMN:
            value *= tl.load(column_scale + column, mask=there, other=0.0)[None, :]
        sums += value[:, None, :] * weight[None, :, :]
    found = tl.sum(sums, 2)
    row, inside, _, _ = _places(first_row, 0, units, out, R, U, VECTOR, WIDTH, ACROSS)
    if HAS_ROW:
        found *= tl.load(row_scale + row, mask=inside, other=0.0)[None, :]
    wanted = (token < tokens)[:, None] & inside[None, :]
    tl.store(y + token.to(tl.int64)[:, None] * out + row[None, :], found.to(y.dtype.element_ty), mask=wanted)


@triton.jit  # type: ignore[untyped-decorator]
def decode_rows(  # type: ignore[no-untyped-def]
    codes, book, row_scale, column_scale, weight, start, stop, out, columns, units, run, row_bytes,
    R: tl.constexpr, U: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr,
    STAGES: tl.constexpr, ENTRIES: tl.constexpr, BITS: tl.constexpr, SPAN: tl.constexpr, GROUPS: tl.constexpr,
    ACROSS: tl.constexpr, HAS_ROW: tl.constexpr, HAS_COLUMN: tl.constexpr,
):  # fmt: skip
    """Rows of codes start to stop → rows of the weight, scaled, from the first of them on: (…, columns)."""
    first_row, first_unit = start + tl.program_id(0) * R, tl.program_id(1) * U
    values = _tile(codes, book, first_row, first_unit, stop, units, run, row_bytes,
                   R, U, WIDTH, STAGES, ENTRIES, BITS, SPAN, GROUPS, ACROSS)  # fmt: skip
    row, inside, column, there = _places(first_row, first_unit, units, out, R, U, VECTOR, WIDTH, ACROSS)
    if HAS_ROW:
        values *= tl.load(row_scale + row, mask=inside, other=0.0)[:, None]
    if HAS_COLUMN:
        values *= tl.load(column_scale + column, mask=there, other=0.0)[None, :]
    if ACROSS:
        begin, end = start * VECTOR, stop * VECTOR
    else:
        begin, end = start, stop
    at = weight + (row - begin).to(tl.int64)[:, None] * columns + column[None, :]
    wanted = (inside & (row < end))[:, None] & there[None, :]
    tl.store(at, values.to(weight.dtype.element_ty), mask=wanted)


def product(weight: Weight, x: Tensor) -> Tensor:
    """x (tokens, in) contiguous, float16, bfloat16 or float32 → (tokens, out) of x's dtype."""
    y = torch.empty(len(x), weight.shape[0], dtype=x.dtype, device=x.device)
    many = min(MOST_TOKENS, triton.next_power_of_2(max(len(x), 1)))
    sizes = constants(weight)
    grid = (triton.cdiv(weight.rows, sizes["R"]), triton.cdiv(len(x), many))
    with _on(x):
        few_tokens[grid](
            *_pointers(weight),
            x,
            y,
            len(x),
            *weight.shape,
            weight.rows,
            weight.units,
            *_strides(weight),
            T=many,
            **sizes,
        )
    return y


def decoded(weight: Weight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows of codes start to stop → as many rows of the weight, or `vector` for each up to the last: (…, in) dtype."""
    per_code = weight.vector if weight.across else 1
    count = min(stop * per_code, weight.shape[0]) - start * per_code
    found = torch.empty(count, weight.shape[1], dtype=dtype, device=weight.codes.device)
    sizes = constants(weight)
    grid = (triton.cdiv(stop - start, sizes["R"]), triton.cdiv(weight.units, sizes["U"]))
    with _on(found):
        decode_rows[grid](
            *_pointers(weight), found, start, stop, *weight.shape, weight.units, *_strides(weight), **sizes
        )
    return found


def constants(weight: Weight) -> dict[str, Any]:
    """What the kernels are compiled for. A code lies across at most SPAN bytes."""
    groups, stages, entries, width = weight.book.shape
    r = max(1, 4 // width) if weight.across else TILE // RUN
    return {
        "R": r, "U": max(1, (TILE // r if weight.across else RUN) // width), "VECTOR": weight.vector, "WIDTH": width,
        "STAGES": stages, "ENTRIES": entries, "GROUPS": groups, "ACROSS": weight.across, "BITS": weight.bits,
        "SPAN": -(-(weight.bits + 8 - gcd(weight.bits, 8)) // 8),
        "HAS_ROW": weight.row_scale is not None, "HAS_COLUMN": weight.column_scale is not None,
    }  # fmt: skip


def _pointers(weight: Weight) -> tuple[Tensor, ...]:
    """The tensors of a weight; a scale that there is not is never read."""
    scales = (weight.row_scale, weight.column_scale)
    return weight.codes, weight.book, *(weight.book if scale is None else scale for scale in scales)


def _strides(weight: Weight) -> tuple[int, int]:
    """Units of one group, bytes of one row of codes."""
    return weight.units // len(weight.book), weight.row_bytes


def _on(tensor: Tensor) -> Any:
    """Kernels are started on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
