"""Quantized weights and input grids as functions that take gradients: what learned rounding and tuning train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from compress.formats.base import QuantTensor
from compress.formats.int_grid import IntGrid
from compress.layer import ActSpec, Layer, LayerKind
from compress.training.trainable import lend, lend_experts, straight_through

# how far a weight may be from its code before it would have been rounded to the next
HALF = 0.49


class SoftRounding:
    """One layer's weight on an integer grid as a function of a rounding offset per weight and a factor per scale.

    offset (out, in) float32, in steps of the grid; factor, of the stored scales' shape. With offset 0 and factor 1
    `weight` gives the layer's own values. original (out, in): the weight before it was quantized, by which a code is
    near its threshold or far from it; None: every code is held, and only the factors count.
    """

    def __init__(self, layer: Layer, original: Tensor | None) -> None:
        assert isinstance(layer.weight, QuantTensor) and isinstance(layer.weight.format, IntGrid)
        self.layer, self.form = layer, layer.weight.format
        codes, scale, zero = self.form.unpack(layer.weight.tensors, layer.shape)
        self.scale, self.zero = scale.float(), zero.float()
        index = torch.arange(layer.shape[1])
        self.index = index // self.form.group_size(layer.shape[1]) if scale.shape[1] > 1 else torch.zeros_like(index)
        self.held = None if original is not None else codes.float()
        self.base = self._start(codes.float(), original)
        self.offset = torch.zeros_like(self.base)
        self.factor = torch.ones(1, 1) if self.form.group == "tensor" else torch.ones_like(self.scale)

    def _start(self, codes: Tensor, original: Tensor | None) -> Tensor:
        """The layer's own values, moved within their cells as near to the original weight as they go."""
        step, zero = self.scale[:, self.index], self.zero[:, self.index]
        inside = 0.0 if original is None else (original / step + zero - codes).clamp(-HALF, HALF)
        return (codes + inside - zero) * step

    def _stored_scale(self) -> Tensor:
        """(out, groups) as float16 will hold it, with the gradient of the factor."""
        scale = self.scale * self.factor
        return straight_through(scale.half().float(), scale)

    def _codes(self, scale: Tensor) -> Tensor:
        """(out, in) whole codes, with the gradient of what was rounded."""
        if self.held is not None:
            return self.held
        exact = self.base / scale[:, self.index] + self.offset + self.zero[:, self.index]
        return straight_through(exact.round(), exact).clamp(0, 2**self.form.bits - 1)

    def reencode(self, wish: Tensor, share: float, beam: int) -> None:
        """Round the weights that are furthest from `wish` (out, in) again, at most a `share` of them. Codes are held;
        `beam` is not read: there is one nearest code."""
        assert self.held is not None
        with torch.no_grad():
            scale, zero = self._stored_scale()[:, self.index], self.zero[:, self.index]
            far = (wish - self.weight()).abs().flatten()
            chosen = far.topk(max(1, int(share * len(far)))).indices
            wanted = (wish / scale + zero).round().clamp(0, 2**self.form.bits - 1)
            self.held.view(-1)[chosen] = wanted.flatten()[chosen]

    def weight(self) -> Tensor:
        """(out, in) float32 on the grid."""
        scale = self._stored_scale()
        return (self._codes(scale) - self.zero[:, self.index]) * scale[:, self.index]

    def rounded(self) -> Layer:
        """The layer with the codes and scales as they now are."""
        with torch.no_grad():
            scale = self._stored_scale()
            packed = self.form.pack(self._codes(scale), {"scale": scale.half(), "zero": self.zero}, self.layer.shape)
        return self.layer.with_weight(packed)


class SoftWeight(Protocol):
    """A layer's weight as a function of what is trained."""

    layer: Layer

    def weight(self) -> Tensor:
        """(out, in) float32, with gradients."""
        ...


def lend_soft(root: nn.Module, soft: Iterable[SoftWeight]) -> None:
    """Let the modules of layers and experts compute with their weights as they now are; see `lend`."""
    stacked = {}
    for each in soft:
        if each.layer.kind is LayerKind.EXPERT:
            stacked[each.layer.name] = each.weight()
        else:
            lend(root, each.layer, each.weight())
    lend_experts(root, stacked)


class SoftInput:
    """A static input grid as a function of its scale and zero point (learned step size, Esser et al. 2020,
    arXiv 1902.08153).

    log_scale (1, 1) float32: natural logarithm of the scale over its start; zero (1, 1) float32.
    """

    def __init__(self, act: ActSpec) -> None:
        assert isinstance(act.format, IntGrid) and act.params is not None
        self.act, self.form = act, act.format
        self.scale = act.params["scale"].float()
        self.log_scale = torch.zeros_like(self.scale)
        middle = torch.full_like(self.scale, float(2 ** (self.form.bits - 1)))
        self.zero = act.params["zero"].float() if "zero" in act.params else middle

    def round(self, values: Tensor) -> Tensor:
        """values float32 → on the grid; gradients of values that it cuts off go to scale and zero point alone."""
        scale = self.scale * self.log_scale.exp()
        zero = straight_through(self.zero.round(), self.zero)
        exact = values / scale
        codes = (straight_through(exact.round(), exact) + zero).clamp(0, 2**self.form.bits - 1)
        return (codes - zero) * scale

    def rounded(self) -> ActSpec:
        """The grid as it now is."""
        assert self.act.params is not None
        params = {**self.act.params, "scale": self.scale * self.log_scale.exp()}
        if "zero" in self.act.params:
            params["zero"] = self.zero.round().clamp(0, 2**self.form.bits - 1).to(torch.uint8)
        return replace(self.act, params=params)
