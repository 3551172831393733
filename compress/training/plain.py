"""Plain weights as functions of what is trained: the weight itself, or an update of low rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compress.layer import Layer
from compress.training import distill


class FullWeight:
    """One layer's plain weight, trained whole.

    master (out, in) float32; mask (out, in) bool: what is left of a pruned weight, the rest stays zero; None: all.
    """

    def __init__(self, layer: Layer, mask: Tensor | None, device: str = "cpu") -> None:
        self.layer, self.mask = layer, None if mask is None else mask.to(device)
        self.master = layer.float_weight().to(device, copy=True)

    def weight(self) -> Tensor:
        """(out, in) float32."""
        return self.master

    def _project(self) -> None:
        if self.mask is not None:
            self.master.mul_(self.mask)

    def group(self, lr: float) -> distill.Group:
        """What trains it, at a rate that is relative to the size of what is left of the weight."""
        return distill.Group([self.master], lr * _size(self.master), self._project)

    def store(self) -> Tensor:
        """(out, in) in the type that the layer is stored in; from now on `weight` has these values."""
        stored = self.master.to(_stored(self.layer))
        self.master.copy_(stored)
        return stored.cpu()


class LowRank:
    """One layer's plain weight with an update of low rank (LoRA, Hu et al. 2021, arXiv 2106.09685), within its mask.

    The update is a · up @ down with up (out, rank), which begins at zero, and down (rank, in), which begins standard
    normal; a is the size of the weight's entries over the root of the rank, so that a first step of Adam moves each
    weight by about the learning rate times its size, whatever the rank. mask: see FullWeight; the update has no share
    in what is masked, so nothing is lost when it is folded into the weight.
    """

    def __init__(
        self, layer: Layer, mask: Tensor | None, rank: int, generator: torch.Generator, device: str = "cpu"
    ) -> None:
        self.layer, self.mask = layer, None if mask is None else mask.to(device)
        self.base = layer.float_weight().to(device)
        rows, columns = layer.shape
        rank = min(rank, rows, columns)
        self.up = torch.zeros(rows, rank, device=device)
        self.down = torch.randn(rank, columns, generator=generator).to(device)
        self.factor = _size(self.base) / math.sqrt(rank)

    def weight(self) -> Tensor:
        """(out, in) float32."""
        update = (self.up * self.factor) @ self.down
        return self.base + (update if self.mask is None else update * self.mask)

    def group(self, lr: float) -> distill.Group:
        """What trains it."""
        return distill.Group([self.up, self.down], lr)

    def store(self) -> Tensor:
        """As FullWeight: the update is folded into the weight."""
        with torch.no_grad():
            stored = self.weight().to(_stored(self.layer))
        self.base = stored.float()
        self.up.zero_()
        return stored.cpu()


def _stored(layer: Layer) -> torch.dtype:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.dtype


def _size(values: Tensor) -> float:
    """Root mean square of the entries that are not zero; 1 where there are none."""
    return float(values.norm()) / math.sqrt(int(values.count_nonzero()) or 1) or 1.0
