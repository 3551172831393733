"""How much of what attention would read a choice of tokens finds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Recall:
    """Sums over query heads of steps at which not every token was chosen.

    found: share of the true top keys that were chosen; mass: share of the attention that the true top keys get that
    goes to those found; covered: share of all attention that goes to tokens attended to.
    """

    heads: int = 0
    found_sum: float = 0.0
    mass_sum: float = 0.0
    covered_sum: float = 0.0

    def add(self, product: Tensor, chosen: Tensor, candidates: Tensor, valid: Tensor, count: int) -> None:
        """One step. product (batch, heads, slots) float32, scaled; chosen (batch, heads or 1, slots) bool; candidates
        (batch, slots) bool: of these they were chosen; valid (batch, slots) bool: what full attention sees; count: of
        the true top keys."""
        rows = candidates.sum(1) > count
        if not bool(rows.any()):
            return
        product, candidates, valid = product[rows], candidates[rows, None], valid[rows, None]
        chosen = chosen[rows].expand_as(product)
        lowest = torch.finfo(product.dtype).min
        best = product.masked_fill(~candidates, lowest).topk(count, -1).indices
        shares = product.masked_fill(~valid, lowest).softmax(-1)
        hits, top = chosen.gather(-1, best), shares.gather(-1, best)
        self.heads += hits[..., 0].numel()
        self.found_sum += float(hits.float().mean(-1).sum())
        self.mass_sum += float(((top * hits).sum(-1) / top.sum(-1).clamp(min=1e-30)).sum())
        self.covered_sum += float((shares * (chosen | ~candidates)).sum())

    @property
    def found(self) -> float:
        return self.found_sum / self.heads

    @property
    def mass(self) -> float:
        return self.mass_sum / self.heads

    @property
    def covered(self) -> float:
        return self.covered_sum / self.heads

    def told(self) -> str:
        """For a report."""
        return (
            f"{self.found:.1%} of the true top keys and {self.mass:.1%} of the attention that these get are found; "
            f"{self.covered:.1%} of all attention goes to tokens that are attended to"
        )

    def joined(self, other: Recall) -> Recall:
        """Of both."""
        return Recall(
            self.heads + other.heads,
            self.found_sum + other.found_sum,
            self.mass_sum + other.mass_sum,
            self.covered_sum + other.covered_sum,
        )
