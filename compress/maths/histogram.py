"""A histogram of activations whose range doubles as needed, so that one pass over the data is enough."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.errors import InputError

BINS = 4096


@dataclass
class Histogram:
    """Counts of values in `BINS` equal bins over [−limit, limit], limit a power of two (0: nothing seen yet).

    counts (BINS,) float64; low, high: the extremes seen.
    """

    limit: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    def add(self, values: Tensor) -> None:
        """Count all entries of a tensor."""
        flat = values.detach().float().reshape(-1).cpu()
        if not flat.numel():
            return
        low, high = (float(bound) for bound in torch.aminmax(flat))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(
                "NaN or infinite values reach a layer whose inputs are counted. The run stops here; check model and "
                "recipe."
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(max(-low, high))
        self.counts += torch.histc(flat, BINS, -self.limit, self.limit).double()

    def _widen(self, reach: float) -> None:
        """Double the range until it holds `reach`: two old bins become one."""
        wanted = 2.0 ** math.ceil(math.log2(max(reach, 2.0**-100)))
        if self.limit == 0.0:
            self.limit = wanted
        while self.limit < wanted:
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.nn.functional.pad(pairs, (BINS // 4, BINS // 4))
            self.limit *= 2

    @property
    def centers(self) -> Tensor:
        """(BINS,) float64 middle of each bin."""
        width = 2 * self.limit / BINS
        return torch.arange(BINS, dtype=torch.float64) * width - self.limit + width / 2
