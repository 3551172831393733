"""Matrix products by the faster of the CPU libraries that torch comes with, where that costs no accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

# Far below what bfloat16 inputs would give (4e-3), above what float32 sums in another order do (1e-6).
AS_GOOD_AS_FLOAT32 = 3e-5


@contextmanager
def fast() -> Iterator[None]:
    """Meanwhile float32 products go through oneDNN where it computes them in float32, as with the AVX-512 of AMD's
    processors, on which it is twice as fast as MKL.

    torch calls it for float32 only where bfloat16 is allowed, which processors with bfloat16 units then use: on those
    nothing changes. Small products are slower this way: it is for forward passes, statistics and blocks of columns.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if _stays_float32() else before
    try:
        yield
    finally:
        matmul.fp32_precision = before


@cache
def _stays_float32() -> bool:
    """Whether products that may be taken in bfloat16 are not, from some."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        return all(_error(rows) < AS_GOOD_AS_FLOAT32 for rows in (16, 512))
    finally:
        matmul.fp32_precision = before


def _error(rows: int) -> float:
    """Largest error of products with 256 × 256, as a share of the largest entry."""
    maker = torch.Generator().manual_seed(0)
    first, second = torch.randn(rows, 256, generator=maker), torch.randn(256, 256, generator=maker)
    exact = first.double() @ second.double()
    found = (torch.nn.functional.linear(first, second.T.contiguous()), first @ second)
    return max(float((each - exact).abs().max() / exact.abs().max()) for each in found)


def all_finite(values: Tensor) -> bool:
    """Whether no entry is NaN or infinite. A finite sum shows it at a fraction of the cost of looking at each."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
