"""Shared maths of small floating-point numbers (ExMy) and of their scales: pure functions on tensors.

An ExMy code is 1 sign, x exponent and y mantissa bits, highest first; bias 2^(x−1) − 1, subnormals at exponent field 0.
Every code is a number, but two layouts keep what the hardware's own types reserve: E4M3 is the FN variant (its last
code is NaN, largest value 448, no infinity), E5M2 keeps the last exponent for infinity and NaN (largest 57344).
Sources: OCP 8-bit Floating Point Specification (OFP8) and OCP Microscaling Formats (MX) v1.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from compress.maths.grid import CLIP_NORM, SEARCH_ELEMENTS


class ExMy(NamedTuple):
    """Exponent bits (1 or more) and mantissa bits (0 or more) of an element."""

    exponent: int
    mantissa: int


E4M3, E5M2 = ExMy(4, 3), ExMy(5, 2)
# What a search multiplies a float scale with: the peak is clipped, or put on a lower value of a coarse grid.
FACTORS = (0.98, 0.96, 0.94, 0.92, 0.9, 0.88, 0.86, 0.84, 0.82, 0.8, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.4, 1.5)
# The same for an E4M3 scale, in codes of 6 % to 12 % each.
STEPS = (-1, -2, -3, 1, 2, 3, 4, 5)
E4M3_LEAST, E4M3_MOST = 2.0**-9, 448.0


@cache
def magnitudes(kind: ExMy) -> Tensor:
    """Values of the codes without sign, (2^(x+y),) float32; NaN and infinity where they are reserved.

    The tensor is shared by all callers: not to be written to.
    """
    code = torch.arange(2 ** (kind.exponent + kind.mantissa), dtype=torch.float64)
    field, part = torch.floor(code / 2**kind.mantissa), (code % 2**kind.mantissa) / 2**kind.mantissa
    bias = 2 ** (kind.exponent - 1) - 1
    normal = (1 + part) * torch.pow(2.0, field - bias)
    values = torch.where(field == 0, part * 2.0 ** (1 - bias), normal).float()
    if kind == E4M3:
        values[-1] = torch.nan
    if kind == E5M2:
        values[-4:] = torch.tensor([torch.inf, torch.nan, torch.nan, torch.nan])
    return values


@cache
def largest(kind: ExMy) -> float:
    """The largest finite value: E2M1 6, E2M3 7.5, E3M2 28, E4M3 448, E5M2 57344."""
    return float(_finite(kind)[-1])


@cache
def overflow(kind: ExMy) -> float:
    """The middle between the largest value and the next one, had the exponents gone on: E2M1 7, E4M3 464."""
    top = torch.tensor(largest(kind), dtype=torch.float64)
    step = torch.ldexp(torch.ones_like(top), torch.frexp(top).exponent - 1 - kind.mantissa)
    return float(top + step / 2)


def _finite(kind: ExMy) -> Tensor:
    values = magnitudes(kind)
    return values[torch.isfinite(values)]


@cache
def _boundaries(kind: ExMy) -> Tensor:
    """The largest float32 that rounds to each code, for all but the last finite one; a tie goes to the even code."""
    values = _finite(kind)
    middle = (values[1:] + values[:-1]) / 2  # exact: both are short
    odd = torch.arange(len(middle)) % 2 == 1
    return torch.where(odd, torch.nextafter(middle, torch.zeros_like(middle)), middle)


def encode(scaled: Tensor, kind: ExMy) -> Tensor:
    """Nearest codes, ties to even, saturating at the largest value: any shape, float32 → uint8.

    NaN has no code that every layout knows: it must show in the scale.
    """
    place = torch.bucketize(scaled.abs(), _boundaries(kind).to(scaled.device), out_int32=True)
    sign = torch.signbit(scaled).to(torch.int32) << (kind.exponent + kind.mantissa)
    return (place | sign).to(torch.uint8)


def decode(codes: Tensor, kind: ExMy) -> Tensor:
    """Values of codes (whole numbers of any dtype), float32."""
    return _signed(kind).to(codes.device)[codes.to(torch.int32)]


@cache
def _signed(kind: ExMy) -> Tensor:
    return torch.cat([magnitudes(kind), -magnitudes(kind)])


def round_to(scaled: Tensor, kind: ExMy) -> Tensor:
    """`decode(encode(scaled))` without the codes between."""
    place = torch.bucketize(scaled.abs(), _boundaries(kind).to(scaled.device), out_int32=True)
    return torch.copysign(magnitudes(kind).to(scaled.device)[place], scaled)


def power_of_two(peak: Tensor, limit: float) -> Tensor:
    """The smallest power of two s, an E8M0 scale, with peak < limit · s. float32; NaN where peak is not finite.

    The limit is the rule. With e the exponent of the largest element, 2^(e+1) is the MX specification's own ("floor":
    the top of many blocks saturates); the largest element itself is "ceil" (nothing saturates); `overflow` lies
    between: the peak is off by no more than rounding to the elements' precision would make it.
    """
    exponent = torch.frexp(peak.double() / limit).exponent.clamp(-126, 127)
    scale = torch.ldexp(torch.ones_like(peak), exponent.masked_fill(peak == 0, -126))
    return torch.where(torch.isfinite(peak), scale, torch.nan)


def as_stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale ≥ 0 as the dtype will hold it, float32, never 0: at least the smallest normal number (E4M3: 2^−9)."""
    if dtype == torch.float8_e4m3fn:
        return scale.clamp(E4M3_LEAST, E4M3_MOST).to(dtype).float()
    return scale.clamp(min=torch.finfo(dtype).tiny).to(dtype).float()


def nearby(scale: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Other scales worth trying, as the dtype will hold them, float32: the powers of two beside it, the E4M3 codes
    around it, or `FACTORS` of it."""
    if dtype == torch.float8_e8m0fnu:
        yield from ((scale * factor).clamp(2.0**-126, 2.0**127) for factor in (0.5, 2.0))
    elif dtype == torch.float8_e4m3fn:
        codes = scale.to(dtype).view(torch.uint8).to(torch.int32)
        for step in STEPS:
            yield (codes + step).clamp(1, 126).to(torch.uint8).view(dtype).float()
    else:
        yield from (as_stored(scale * factor, dtype) for factor in FACTORS)


def search_scale(
    groups: Tensor, scale: Tensor, multiplier: Tensor | float, kind: ExMy, dtype: torch.dtype, importance: Tensor | None
) -> Tensor:
    """Per group, the one of `scale` and those `nearby` that gives the least |w − ŵ|^2.4 error; ties keep `scale`.

    Args: groups (out, G, group) float32; scale (out, G) float32 as dtype holds it; multiplier: ŵ = value of the code ·
    scale / multiplier; importance (G, group) or None: weight of each column's error.
    """
    rows = max(1, SEARCH_ELEMENTS // groups[0].numel())
    found = []
    for part, start in zip(torch.split(groups, rows), torch.split(scale, rows), strict=True):
        chosen, best = start, scale_error(part, start / multiplier, kind, importance)
        for tried in nearby(start, dtype):
            error = scale_error(part, tried / multiplier, kind, importance)
            chosen, best = torch.where(error < best, tried, chosen), torch.minimum(error, best)
        found.append(chosen)
    return torch.cat(found)


def scale_error(groups: Tensor, scale: Tensor, kind: ExMy, importance: Tensor | None) -> Tensor:
    """(out, G): sum over each group of importance · |w − ŵ|^2.4, for scales (out, G)."""
    wide = scale[..., None]
    error = (groups - round_to(groups / wide, kind) * wide).abs_().pow_(CLIP_NORM)
    return (error if importance is None else error * importance).sum(-1)
