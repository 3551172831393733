"""Shared maths of lookup tables: the fixed ones, nearest entries, learned ones, and scales that are quantized again.

A table is (entries,) float32 with values about −1 … 1; value = table[code] · scale. What is bitsandbytes' here follows
its version 0.50 on the CPU bit for bit (tests/test_lookup.py compares them).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Quantiles of N(0, 1) with an exact zero, scaled to [−1, 1] (Dettmers et al. 2023, arXiv 2305.14314, appendix E).
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# bitsandbytes' own 4-bit float (sign, 2 exponent bits, 1 mantissa bit) in twelfths, in the order of its bit patterns.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
# A block of zeros is divided by this instead.
TINY = 1e-38
# Blocks of scales that share a scale of their own, and the bins that their codes are looked up in.
NESTED_BLOCK = 256
NESTED_BINS = 65536
# The search for a scale looks errors up in so many bins of values between these.
ERROR_BINS, ERROR_EDGE = 16384, 1.3
# Learned tables are the best for values sorted into so many bins; their cost is entries · bins².
BINS = 1024


@cache
def fixed(name: str) -> Tensor:
    """`nf4` or `fp4` as (16,) float32, in the order of the codes. Not to be written into."""
    if name == "nf4":
        return torch.tensor(_NF4)
    half = torch.tensor(_FP4_TWELFTHS)
    return torch.cat([half, -half]) / 12.0


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Codes (same shape, int32) of the nearest entries; a value halfway between two takes the lower one.

    Args: values float32; table (entries,) float32 in any order.
    """
    order = torch.argsort(table, stable=True)
    middles = (table[order[:-1]] + table[order[1:]]) / 2
    found = torch.bucketize(values, middles, out_int32=True)
    return order.int()[found] if bool((order[1:] < order[:-1]).any()) else found


def error_bins(table: Tensor, norm: float) -> Tensor:
    """(ERROR_BINS,) float32: |value − its nearest entry|^norm at the middle of each bin over ±ERROR_EDGE."""
    values = ((torch.arange(ERROR_BINS) + 0.5) * (2 / ERROR_BINS) - 1) * ERROR_EDGE
    return (values - table[nearest(values, table)]).abs_().pow_(norm)


def binned(values: Tensor, errors: Tensor) -> Tensor:
    """`errors` looked up for values of any shape; those beyond the edge count as the outermost."""
    place = (values * (ERROR_BINS / 2 / ERROR_EDGE)).add_(ERROR_BINS / 2).int().clamp_(0, ERROR_BINS - 1)
    return errors[place]


@cache
def dynamic_map() -> Tensor:
    """The signed 8-bit dynamic data type (Dettmers 2015, arXiv 1511.04561) as (256,) float32, ascending.

    Per decade 10⁻⁶ … 1 the fraction has one bit more: 1, 2, 4 … 64 means of equal steps over 0.1 … 1, of both signs;
    beside them 0 and 1. Not to be written into.
    """
    decades = []
    for place in range(7):
        edges = torch.linspace(0.1, 1.0, 2**place + 1)
        decades.append(10.0 ** (place - 6) * ((edges[:-1] + edges[1:]) / 2))
    positive = torch.cat(decades)
    return torch.cat([-positive, torch.tensor([0.0, 1.0]), positive]).sort().values


@cache
def _binned_map() -> Tensor:
    """The code of each bin's value (65536,) int32: bitsandbytes' CPU library looks a value's bin up."""
    table = dynamic_map()
    values = -1.0 + (2.0 * torch.arange(NESTED_BINS, dtype=torch.float32)) / (NESTED_BINS - 1)
    return torch.bucketize(values, 0.5 * (table[:-1] + table[1:]), out_int32=True)


def compress_scales(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: scales less their mean in 8 bits, in blocks of 256 (arXiv 2305.14314 §3).

    Args: scale (blocks,) float32.
    Returns: codes (blocks,) uint8, largest magnitudes (ceil(blocks / 256),) float32, mean (1,) float32.
    """
    offset = scale.mean()
    short = -scale.numel() % NESTED_BLOCK
    groups = torch.nn.functional.pad(scale - offset, (0, short)).reshape(-1, NESTED_BLOCK)
    largest = groups.abs().amax(-1)
    unit = (groups * (1.0 / largest.clamp(min=TINY))[:, None]).clamp(-1.0, 1.0)
    bins = ((unit + 1.0) * 0.5 * (NESTED_BINS - 1) + 0.5).int()
    codes = _binned_map()[bins].masked_fill((largest == 0)[:, None], 0)
    return codes.flatten()[: scale.numel()].to(torch.uint8), largest, offset.reshape(1)


def expand_scales(codes: Tensor, largest: Tensor, offset: Tensor) -> Tensor:
    """Inverse of `compress_scales`: (blocks,) float32."""
    repeated = largest.repeat_interleave(NESTED_BLOCK)[: codes.numel()]
    return dynamic_map()[codes.int()] * repeated + offset


def learn(values: Tensor, weights: Tensor, entries: int) -> Tensor:
    """The table of least Σ weight · (value − nearest entry)²: exact one-dimensional k-means over `BINS` bins.

    Dynamic programme over the sorted bins (Wang and Song 2011, Ckmeans.1d.dp): no start to choose, no local minimum;
    only a bin is never split.
    Args: values, weights (n,) float32, weights ≥ 0; values outside −1 … 1 count to the outermost bins.
    Returns: (entries,) float32, ascending; the last one repeated where there are fewer distinct values.
    """
    place = ((values + 1.0) * (0.5 * BINS)).long().clamp_(0, BINS - 1)
    wide, heavy = values.double(), weights.double()
    mass = torch.bincount(place, heavy, BINS)
    first = torch.bincount(place, heavy * wide, BINS)
    second = torch.bincount(place, heavy * wide.square(), BINS)
    filled = mass > 0
    mass, first, second = mass[filled], first[filled], second[filled]
    if len(mass) > entries:
        parts = _cut(mass, first, second, entries)
        mass, first = torch.bincount(parts, mass), torch.bincount(parts, first)
    means = (first / mass).float() if len(mass) else torch.zeros(1)
    return torch.cat([means, means[-1:].expand(entries - len(means))])


def _cut(mass: Tensor, first: Tensor, second: Tensor, entries: int) -> Tensor:
    """The part 0 … entries − 1 of each bin, in the cut of the bins into runs that leaves the least squared error."""
    count = len(mass)
    cost = _run_costs(mass, first, second)
    least, froms = cost[:, 0], []
    for _ in range(entries - 1):
        # one run more: the last one starts at bin s and the runs before it end at s − 1
        before = torch.cat([torch.tensor([torch.inf], dtype=torch.float64), least[:-1]])
        least, start = (before + cost).min(1)
        froms.append(start)
    parts, stop = torch.zeros(count, dtype=torch.int64), count
    for part in range(entries - 1, 0, -1):
        begin = int(froms[part - 1][stop - 1])
        parts[begin:stop], stop = part, begin
    return parts


def _run_costs(mass: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(n, n) float64: entry (e, s) is the squared error of the bins s … e about their mean, infinite for s > e."""
    zero = torch.zeros(1, dtype=torch.float64)
    sums = [torch.cat([zero, each.cumsum(0)]) for each in (mass, first, second)]
    mass, first, second = (each[1:, None] - each[None, :-1] for each in sums)
    cost = (second - first.square() / mass.clamp(min=1e-300)).clamp_(min=0.0)
    return cost.masked_fill_(torch.ones_like(cost, dtype=torch.bool).triu_(1), torch.inf)
