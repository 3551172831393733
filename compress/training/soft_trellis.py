"""Weights in trellis codes as functions of scales that take gradients, and of codes to be chosen again."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.formats.base import QuantTensor
from compress.formats.trellis import Trellis
from compress.layer import Layer
from compress.maths import trellis
from compress.training.trainable import straight_through


class SoftTrellis:
    """One layer's weight as a function of a factor per scale of inputs and of outputs; codes stay until `reencode`.

    factors: (in,) and (out,) float32, with which 1 `weight` gives the layer's own values; held: symbols (in / 16,
    out / 16, 256) uint8.
    """

    def __init__(self, layer: Layer) -> None:
        assert isinstance(layer.weight, QuantTensor) and isinstance(layer.weight.format, Trellis)
        self.layer, self.form = layer, layer.weight.format
        tensors = layer.weight.tensors
        self.held = trellis.unpack(tensors["trellis"], self.form.bits)
        self.scales = tensors["suh"].float(), tensors["svh"].float()
        self.factors = torch.ones_like(self.scales[0]), torch.ones_like(self.scales[1])

    def _stored(self) -> tuple[Tensor, Tensor]:
        """Scales of inputs and of outputs as float16 will hold them, with the gradients of the factors."""
        suh, svh = (scale * factor for scale, factor in zip(self.scales, self.factors, strict=True))
        return straight_through(suh.half().float(), suh), straight_through(svh.half().float(), svh)

    def weight(self) -> Tensor:
        """(out, in) float32."""
        return self.form.turn_back(self.form.values(self.held), *self._stored())

    def reencode(self, wish: Tensor, share: float, beam: int) -> None:
        """Search the tiles that are furthest from `wish` (out, in) again, at most a `share` of them. `beam` is not
        read: all states are searched."""
        with torch.no_grad():
            suh, svh = self._stored()
            wanted = trellis.to_tiles(self.form.turn(wish, {"suh": suh, "svh": svh})).flatten(0, 1)
            held = self.held.view(-1, trellis.SYMBOLS)
            far = (self._tiles(held) - wanted).square().sum(1)
            chosen = far.topk(max(1, int(share * len(far)))).indices
            found = self.form.search_tiles(wanted[chosen])
            better = (self._tiles(found) - wanted[chosen]).square().sum(1) < far[chosen]
            held[chosen[better]] = found[better]

    def _tiles(self, symbols: Tensor) -> Tensor:
        return trellis.decode(symbols, self.form.bits, self.form.code)

    def rounded(self) -> Layer:
        """The layer with the codes and scales as they now are."""
        with torch.no_grad():
            suh, svh = self._stored()
        codes = self.held.transpose(0, 1).flatten(1)
        return self.layer.with_weight(self.form.pack(codes, {"suh": suh, "svh": svh}, self.layer.shape))
