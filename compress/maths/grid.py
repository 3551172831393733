"""Shared maths of uniform grids and of packed codes: pure functions on tensors.

A weight is (out, in). Its groups are runs of `group` input columns of one row: (out, groups). Codes are unsigned,
0 … 2^bits − 1; value = (code − zero) · scale with zero = 2^(bits−1) where the grid is symmetric.
"""

from __future__ import annotations

import torch
from torch import Tensor

# GPTQ's and llm-compressor's range search: shrink to 80 % in 1 % steps under a norm of 2.4.
CLIP_STEPS = 20
CLIP_NORM = 2.4
# The search makes several copies of what it looks at: rows at a time, they stay small and in the cache.
SEARCH_ELEMENTS = 1 << 17


def to_groups(weight: Tensor, group: int) -> Tensor:
    """(out, in) → (out, groups, group), a short last group filled with zeros (which every grid holds exactly)."""
    out, columns = weight.shape
    short = -columns % group
    padded = torch.nn.functional.pad(weight, (0, short)) if short else weight
    return padded.reshape(out, -1, group)


def fit_range(groups: Tensor, bits: int, scheme: str) -> tuple[Tensor, Tensor]:
    """Scale and zero point per group, from the groups' extremes.

    Args: groups (…, group) float32; scheme `symmetric` (scale = max|w| / (2^bits − 1) · 2, zero in the middle),
    `signed` (the largest magnitude lands on code 0, so the scale may be negative; Intel auto-round's full range),
    `asymmetric` (extremes widened to hold zero, integer zero point), `float_zero` (the same, zero point not rounded).
    Returns: scale (…) float32, never 0; zero (…) float32, with whole values but for `float_zero`.
    """
    return _range(groups.amin(-1), groups.amax(-1), bits, scheme)


def _range(low: Tensor, high: Tensor, bits: int, scheme: str) -> tuple[Tensor, Tensor]:
    top, middle = float(2**bits - 1), float(2 ** (bits - 1))
    if scheme in ("asymmetric", "float_zero"):
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = _nonzero((high - low) / top)
        zero = -low / scale
        return scale, (torch.round(zero) if scheme == "asymmetric" else zero).clamp(0, top)
    if scheme == "signed":
        largest = torch.where(high > -low, high, low)
        scale = _nonzero(-largest / middle)
    else:
        scale = _nonzero(torch.maximum(high, -low) * 2 / top)
    return scale, torch.full_like(scale, middle)


def _nonzero(scale: Tensor) -> Tensor:
    """Scales that float16 storage would turn into 0 become its smallest normal number (a group of zeros)."""
    tiny = torch.finfo(torch.float16).tiny
    return torch.where(scale.abs() < tiny, torch.full_like(scale, tiny), scale)


def search_range(groups: Tensor, bits: int, scheme: str, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`fit_range` with the shrink factor, per group, that gives the least |w − ŵ|^2.4 error.

    Args: groups (out, G, group) float32; importance (G, group) or None: weight of each column's error.
    """
    rows = max(1, SEARCH_ELEMENTS // groups[0].numel())
    found = [_search_rows(part, bits, scheme, importance) for part in torch.split(groups, rows)]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


def _search_rows(groups: Tensor, bits: int, scheme: str, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    low, high = groups.amin(-1), groups.amax(-1)
    scale, zero = _stored(*_range(low, high, bits, scheme))
    best = range_error(groups, scale, zero, bits, importance)
    for step in range(CLIP_STEPS + 1):
        wide, tried_zero = _stored(*_range(low * (1 - step / 100), high * (1 - step / 100), bits, scheme))
        # with a scale that carries a sign, the extra code may serve the other side of zero better
        for tried_scale in (wide, -wide) if scheme == "signed" else (wide,):
            error = range_error(groups, tried_scale, tried_zero, bits, importance)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, tried_scale, scale), torch.where(better, tried_zero, zero)
    return scale, zero


def _stored(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """As float16 will hold them (whole zero points exactly), so that the search judges what is stored."""
    return scale.half().float(), zero.half().float()


def range_error(groups: Tensor, scale: Tensor, zero: Tensor, bits: int, importance: Tensor | None) -> Tensor:
    """(out, G) sum over each group of importance · |w − ŵ|^2.4."""
    values = decode(encode(groups, scale[..., None], zero[..., None], bits), scale[..., None], zero[..., None])
    error = (groups - values).abs_().pow_(CLIP_NORM)
    return (error if importance is None else error * importance).sum(-1)


def encode(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Nearest codes, float32 with whole values in 0 … 2^bits − 1; shapes broadcast."""
    return torch.round(weight / scale + zero).clamp_(0, 2**bits - 1)


def decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(codes − zero) · scale in float32; shapes broadcast."""
    return (codes.float() - zero) * scale


def code_dtype(bits: int) -> torch.dtype:
    """What codes of so many bits are held in while they are whole numbers."""
    return torch.uint8 if bits <= 8 else torch.int32


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """(rows, n) codes of 1 to 16 bits → (rows, ceil(n · bits / 8)) uint8, lowest bits first, each row padded to a whole
    byte."""
    rows, count = codes.shape
    codes = codes.to(code_dtype(bits))
    if bits == 8:
        return codes.contiguous()
    if 8 % bits == 0:  # whole codes to a byte
        each = 8 // bits
        codes = torch.nn.functional.pad(codes, (0, -count % each))
        packed = codes[:, ::each].clone(memory_format=torch.contiguous_format)
        for place in range(1, each):
            packed |= codes[:, place::each] << (place * bits)
        return packed
    shifts = torch.arange(bits, dtype=codes.dtype)
    stream = ((codes[..., None] >> shifts) & 1).to(torch.uint8).reshape(rows, count * bits)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8)).reshape(rows, -1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_bits`: (rows, bytes) uint8 → (rows, count) uint8, int32 above 8 bits."""
    if bits == 8:
        return packed[:, :count]
    rows = packed.shape[0]
    if 8 % bits == 0:  # whole codes to a byte
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        codes: Tensor = (packed[..., None] >> shifts) & (2**bits - 1)
        return codes.reshape(rows, -1)[:, :count]
    stream = ((packed[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(rows, -1)[:, : count * bits]
    dtype = code_dtype(bits)
    return (stream.reshape(rows, count, bits) << torch.arange(bits, dtype=dtype)).sum(-1, dtype=dtype)


def packed_bytes(rows: int, count: int, bits: int) -> int:
    """Bytes of `pack_bits`' result."""
    return rows * ((count * bits + 7) // 8)


def fake_quantize(values: Tensor, bits: int, scheme: str, granularity: str) -> Tensor:
    """Dynamic activation quantization: values (…, features) float32 → the same shape, rounded to its grid.

    granularity `tensor`: one grid for all; `token`: one per last-axis vector. Symmetric grids use
    max|x| / (2^(bits−1) − 1); asymmetric ones are ONNX DynamicQuantizeLinear's.
    """
    flat = values.reshape(1, -1) if granularity == "tensor" else values
    if scheme == "asymmetric":
        low, high = flat.amin(-1, keepdim=True).clamp(max=0), flat.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
        zero = torch.round(-low / scale).clamp(0, 2**bits - 1)
        codes = (torch.round(flat / scale) + zero).clamp(0, 2**bits - 1)
        rounded: Tensor = (codes - zero) * scale
        return rounded.reshape(values.shape)
    limit = 2 ** (bits - 1) - 1
    scale = (flat.abs().amax(-1, keepdim=True) / limit).clamp(min=torch.finfo(torch.float32).tiny)
    rounded = torch.round(flat / scale).clamp(-limit, limit) * scale
    return rounded.reshape(values.shape)


def fake_quantize_rest(values: Tensor, bits: int, outliers: float) -> Tensor:
    """`fake_quantize` per token, symmetric, but for input columns that hold an outlier: those stay as they are.

    LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339 §3.2) as bitsandbytes computes it: a column is kept where any
    magnitude of the call reaches `outliers`; a vector's range leaves out its outliers, not the other values of those
    columns. Its kernel casts to float16 first, which is not done here.
    """
    limit = 2 ** (bits - 1) - 1
    large = values.abs() >= outliers
    kept = large.reshape(-1, values.shape[-1]).any(0)
    largest = values.masked_fill(large, 0.0).abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    rounded = torch.round(values * (limit / largest)).clamp(-limit, limit) * (largest / limit)
    return torch.where(kept, values, rounded)


def activation_grid(low: Tensor, high: Tensor, bits: int, scheme: str) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a static activation grid that holds a range; codes 0 … 2^bits − 1.

    low, high of one shape, float32. `asymmetric` widens the range to hold zero, with a whole zero point; `symmetric`
    has max|x| at the last code and the middle one for zero, so that a signed integer has one code more below, as
    ONNX QuantizeLinear and most integer kernels have it.
    Returns: scale, never 0, and zero, both float32 in that shape.
    """
    tiny, middle = torch.finfo(torch.float32).tiny, 2 ** (bits - 1)
    if scheme == "asymmetric":
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = ((high - low) / (2**bits - 1)).clamp(min=tiny)
        return scale, torch.round(-low / scale).clamp(0, 2**bits - 1)
    scale = (torch.maximum(high, -low) / (middle - 1)).clamp(min=tiny)
    return scale, torch.full_like(scale, middle)


def quantize_activation(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """values float32 → the nearest points of a static grid, same shape; the zero point is added after rounding, as
    ONNX QuantizeLinear does."""
    codes = (torch.round(values / scale) + zero).clamp(0, 2**bits - 1)
    return (codes - zero) * scale
