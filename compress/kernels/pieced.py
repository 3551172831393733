"""A product whose columns are in several codebooks, as outlier columns and all others are, with a bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compress.kernels.checks import check_input
from compress.kernels.codebook import CodebookProduct
from compress.kernels.gpu import GpuProduct


class Part(NamedTuple):
    """columns (n,) int64 of the weight, in the order that `product` has them in; bias (out, 1) or (1, n) float32, added
    to their weights, or None."""

    product: CodebookProduct | GpuProduct
    columns: Tensor
    bias: Tensor | None


class PiecedProduct:
    """x → x Wᵀ, W[:, columns] = the weight of each part's product + its bias. As `CodebookProduct` otherwise; each part
    is computed by its own kernel, and rounds as that does; they are added in float32."""

    def __init__(self, parts: Sequence[Part], shape: tuple[int, int]) -> None:
        self.shape = shape
        self.device = torch.device("cpu")
        self.parts: list[Part] = []
        for product, columns, bias in parts:
            self.device = product.device if isinstance(product, GpuProduct) else self.device
            self.parts.append(
                Part(product, columns.to(self.device), None if bias is None else bias.float().to(self.device))
            )

    @property
    def kernel(self) -> str:
        """What computes a single token in the last part, that of most columns."""
        return self.parts[-1].product.kernel

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        beside = sum(part.columns.nbytes + (0 if part.bias is None else part.bias.nbytes) for part in self.parts)
        return beside + sum(part.product.nbytes for part in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) floating → (..., out), of x's dtype. Raises: UsageError as the parts."""
        check_input(x, self.shape[1], self.device)
        wide = x.detach().float()
        found = wide.new_zeros(*x.shape[:-1], self.shape[0])
        for product, columns, bias in self.parts:
            own = wide[..., columns]
            found += product(own)
            if bias is not None and bias.shape[0] == 1:
                found += own @ bias.T
            elif bias is not None:
                found += own.sum(-1, keepdim=True) * bias[:, 0]
        return found.to(x.dtype)

    def dequantize(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start to stop (all) of the weight: (stop - start, in) float32."""
        stop = self.shape[0] if stop is None else stop
        found = torch.empty(max(stop - start, 0), self.shape[1], device=self.device)
        for product, columns, bias in self.parts:
            rows = product.dequantize(start, stop)
            if bias is not None:
                rows = rows + (bias if bias.shape[0] == 1 else bias[start:stop])
            found[:, columns] = rows
        return found
