"""Scales that are fixed beforehand: codes of keys and values without a scale of their own.

x ≈ q · s. Integers of b bits: q = round(x / s) within [−2^(b−1), 2^(b−1) − 1], stored as q + 2^(b−1), lowest bits
first: the codes of ONNX Runtime's GroupQueryAttention, and for 4 bits its bytes (contrib_ops/cuda/bert/
group_query_attention_qdq.cuh there).
Small floats: the nearest one, what lies beyond the largest becomes it (448 in FP8 E4M3, whose cast would give NaN).
Scales are (kv heads, size) by channel, (kv heads, 1) by head, (1, 1) for all, float32, always positive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.formats import parse_format
from compress.formats.float_grid import FloatGrid
from compress.formats.int_grid import IntGrid
from compress.maths import floats, grid

StaticFormat = IntGrid | FloatGrid
SHARED = ("channel", "head", "tensor")
"""What may share a scale over all tokens."""


def has_static(text: str) -> bool:
    """Whether a format's text says that all tokens share scales: `int8(channel)`, `fp8_e4m3(head)`, `int4(tensor)`."""
    return bool(text) and getattr(parse_format(text), "group", "") in SHARED


def static_format(text: str) -> StaticFormat:
    """The format of a cache whose scales data gave. Raises: UsageError where it has none."""
    form = parse_format(text)
    plain = isinstance(form, IntGrid) and form.scheme == "symmetric" and form.outliers is None
    small = isinstance(form, FloatGrid) and form.scale == "float32"
    if (plain or small) and isinstance(form, StaticFormat) and form.group in SHARED:
        return form
    raise UsageError(
        f"{text}: static scales of a cache are symmetric and shared by channel, head or tensor: int8(channel), "
        "int4(channel), fp8_e4m3(head), fp8_e4m3(tensor) …"
    )


def scale_shape(form: StaticFormat, heads: int, size: int) -> tuple[int, int]:
    """Of a layer's scales."""
    return {"channel": (heads, size), "head": (heads, 1)}.get(str(form.group), (1, 1))


def top(form: StaticFormat) -> float:
    """The largest code: 127, 7, 448 …"""
    return float(2 ** (form.bits - 1) - 1) if isinstance(form, IntGrid) else floats.largest(form.kind)


def encode(form: StaticFormat, states: Tensor, scale: Tensor) -> Tensor:
    """states (batch, kv heads, n, size) float → codes (batch, kv heads, n, bytes) uint8."""
    scaled = states.float() / scale[None, :, None]
    if isinstance(form, FloatGrid):
        codes = floats.encode(scaled, form.kind)
    else:
        half = 2 ** (form.bits - 1)
        codes = (scaled.round().clamp(-half, half - 1) + half).to(torch.uint8)
    packed = grid.pack_bits(codes.reshape(-1, codes.shape[-1]), form.bits)
    return packed.reshape(*codes.shape[:-1], -1)


def decode(form: StaticFormat, packed: Tensor, scale: Tensor, size: int) -> Tensor:
    """What `encode` gave, float32: (batch, kv heads, n, size)."""
    codes = grid.unpack_bits(packed.reshape(-1, packed.shape[-1]), form.bits, size).reshape(*packed.shape[:-1], size)
    steps: Tensor
    steps = floats.decode(codes, form.kind) if isinstance(form, FloatGrid) else codes.float() - 2 ** (form.bits - 1)
    return steps * scale[None, :, None]
