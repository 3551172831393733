"""Which weights a pruning pass keeps: patterns of sparsity, and masks from scores. Pure functions on tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compress.errors import UsageError

ALLOWED = (
    "layer (the lowest scores of the whole weight), row (of each output row), N:M such as 2:4 (N kept of every M input "
    "columns), RxC such as 16x16 (whole blocks of R rows and C columns)"
)


@dataclass(frozen=True)
class Pattern:
    """Among which weights scores are compared, and what is pruned together.

    `layer`: single weights, among all of the layer; `row`: among those of an output row; `n:m`: `size[0]` are kept of
    every run of `size[1]` input columns; `block`: blocks of `size` (rows, columns), among all of the layer.
    """

    kind: Literal["layer", "row", "n:m", "block"]
    size: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        if self.kind in ("layer", "row"):
            return self.kind
        return f"{self.size[0]}{':' if self.kind == 'n:m' else 'x'}{self.size[1]}"

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """From its text. Raises: UsageError."""
        if text == "layer":
            return cls("layer")
        if text == "row":
            return cls("row")
        found = re.fullmatch(r"(\d{1,6})([:x])(\d{1,6})", text, re.ASCII)
        if not found:
            raise UsageError(f"pattern={text} is not a pattern of sparsity. Allowed: {ALLOWED}.")
        first, second = int(found[1]), int(found[3])
        if found[2] == ":":
            if not 0 < first < second:
                raise UsageError(f"pattern={text}: N:M keeps N of every M weights, with 0 < N < M, such as 2:4 or 4:8.")
            return cls("n:m", (first, second))
        if not first or not second:
            raise UsageError(f"pattern={text}: a block has at least one row and one column, such as 16x16.")
        return cls("block", (first, second))

    @property
    def fixed(self) -> float | None:
        """The sparsity that it implies; None where it is free."""
        return 1 - self.size[0] / self.size[1] if self.kind == "n:m" else None

    @property
    def span(self) -> int:
        """Input columns that are decided together."""
        return self.size[1]

    def check(self, shape: tuple[int, int]) -> None:
        """Raises: UsageError where it does not divide a weight (out, in)."""
        rows, columns = shape
        if columns % self.size[1]:
            raise UsageError(f"pattern={self} takes runs of {self.size[1]} input columns, and there are {columns}.")
        if self.kind == "block" and rows % self.size[0]:
            raise UsageError(f"pattern={self} takes runs of {self.size[0]} output rows, and there are {rows}.")

    def rivals(self, shape: tuple[int, int]) -> int:
        """How many weights (of `block`: blocks) of a weight (out, in) are compared with each other."""
        rows, columns = shape
        each = {"layer": rows * columns, "row": columns, "n:m": self.size[1]}
        return each.get(self.kind, rows * columns // (self.size[0] * self.size[1]))

    def kept(self, shape: tuple[int, int], sparsity: float) -> int:
        """How many of the `rivals` stay: all but the share to be pruned, as the nearest whole number."""
        count = self.rivals(shape)
        return self.size[0] if self.kind == "n:m" else count - round(sparsity * count)

    def left(self, shape: tuple[int, int], sparsity: float) -> int:
        """How many weights of (out, in) stay."""
        rows, columns = shape
        return self.kept(shape, sparsity) * (rows * columns // self.rivals(shape))

    @property
    def is_two_of_four(self) -> bool:
        """Whether no run of four input columns keeps more than two: what sparse tensor cores take."""
        return self.kind == "n:m" and ((self.size[0] <= 2 and self.size[1] % 4 == 0) or self.size == (1, 2))

    def held(self, weight: Tensor, sparsity: float) -> bool:
        """Whether a weight (out, in) has the pattern: at most N values in every run, at least as many zeros as asked in
        every row, in whole blocks or altogether. What else is zero does no harm."""
        rows, columns = weight.shape
        high, wide = self.size
        if columns % wide or rows % (high if self.kind == "block" else 1):
            return False
        if self.kind == "n:m":
            return int((weight != 0).reshape(-1, wide).sum(1).max()) <= high
        pruned = self.rivals((rows, columns)) - self.kept((rows, columns), sparsity)
        if self.kind == "block":
            filled = (weight != 0).reshape(rows // high, high, columns // wide, wide).any(3).any(1)
            return filled.numel() - int(filled.sum()) >= pruned
        zeros = (weight == 0).sum(1)
        return int(zeros.min() if self.kind == "row" else zeros.sum()) >= pruned

    def keep(self, scores: Tensor, kept: int | Tensor) -> Tensor:
        """scores (out, in) ≥ 0 → (out, in) bool, true where a weight stays: the highest scores; of equal ones those
        that come first by rows. A block's score is the root of the sum of its squares.

        Args: kept: see `kept`; of `row` it may be (out, 1) int64.
        """
        rows, columns = scores.shape
        if self.kind == "layer":
            return keep_largest(scores.reshape(1, -1), kept).reshape(rows, columns)
        if self.kind == "row":
            return keep_largest(scores, kept)
        high, wide = self.size
        if self.kind == "n:m":
            return keep_largest(scores.reshape(-1, wide), kept).reshape(rows, columns)
        blocks = scores.square().reshape(rows // high, high, columns // wide, wide).sum((1, 3))
        chosen = keep_largest(blocks.reshape(1, -1), kept).reshape(blocks.shape)
        return chosen.repeat_interleave(high, 0).repeat_interleave(wide, 1)


def keep_largest(scores: Tensor, kept: int | Tensor) -> Tensor:
    """The `kept` largest of each row (for a Tensor (rows, 1) int64: of this row), exactly as many: (rows, n) float32,
    ≥ 0 → bool. Of equal ones the first."""
    count = scores.shape[1]
    if isinstance(kept, int):
        if not 0 < kept < count:
            return torch.full_like(scores, kept > 0, dtype=torch.bool)
        least = scores.kthvalue(count - kept + 1, dim=-1, keepdim=True).values
    else:
        least = _least(scores, kept)
    above = scores > least
    level = scores == least
    room = kept - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1) <= room))


def _least(scores: Tensor, kept: Tensor) -> Tensor:
    """The `kept`-th largest of each row, (rows, 1), of scores ≥ 0 float32: by halving, over the numbers' bit patterns,
    which stand in the same order. Several times faster than sorting."""
    bits = scores.contiguous().view(torch.int32)
    low, high = torch.zeros_like(bits[:, :1]), bits.amax(1, keepdim=True)
    while bool((low < high).any()):
        middle = high - (high - low) // 2
        enough = (bits >= middle).sum(1, keepdim=True) >= kept
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    return low.view(torch.float32)


def relative_importance(weight: Tensor) -> Tensor:
    """|w| as a share of its row's sum, plus that of its column's, (out, in): RIA (Zhang et al. 2024, "Plug-and-Play").
    A row or column of zeros counts 0."""
    size = weight.abs()
    smallest = torch.finfo(size.dtype).tiny
    return size / size.sum(0, keepdim=True).clamp(min=smallest) + size / size.sum(1, keepdim=True).clamp(min=smallest)
