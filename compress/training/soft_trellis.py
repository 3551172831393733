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
        self._inner: tuple[int, Tensor] | None = None
        self.factors = torch.ones_like(self.scales[0]), torch.ones_like(self.scales[1])

    def _stored(self) -> tuple[Tensor, Tensor]:
        """Scales of inputs and of outputs as float16 will hold them, with the gradients of the factors."""
        suh, svh = (scale * factor for scale, factor in zip(self.scales, self.factors, strict=True))
        return straight_through(suh.half().float(), suh), straight_through(svh.half().float(), svh)

    def weight(self) -> Tensor:
        """(out, in) float32."""
        return self.form.turn_back(self._values(), *self._stored())

    def _values(self) -> Tensor:
        """(in, out) of the codes as they are, decoded once for as long as nobody writes to them."""
        version = self.held._version
        if self._inner is None or self._inner[0] != version:
            parts = torch.split(self.held, 4)
            self._inner = version, torch.cat([self.form.values(part) for part in parts])
        return self._inner[1]

    def reencode(self, wish: Tensor, share: float, beam: int) -> None:
        """Search the tiles that are furthest from `wish` (out, in) again, at most a `share` of them. A tile changes
        once its wish has come as far as the codes' own error. What lies between the same Hadamard matrices, a square
        of `block` by `block` weights, keeps its codes where others would be further from the wish: scales count there,
        and not where tiles are searched. `beam` is not read: all states are searched."""
        with torch.no_grad():
            suh, svh = self._stored()
            wanted = trellis.to_tiles(self.form.turn(wish, {"suh": suh, "svh": svh})).flatten(0, 1)
            held = self.held.view(-1, trellis.SYMBOLS)
            far = (self._tiles(held) - wanted).square().sum(1)
            chosen = far.topk(max(1, int(share * len(far)))).indices
            found = self.form.search_tiles(wanted[chosen])
            better = (self._tiles(found) - wanted[chosen]).square().sum(1) < far[chosen]
            before, kept = self._far(wish), held.clone()
            held[chosen[better]] = found[better]
            side = self.form.block // trellis.SIDE
            worse = (self._far(wish) > before).repeat_interleave(side, 0).repeat_interleave(side, 1).flatten()
            held[worse] = kept[worse]

    def _far(self, wish: Tensor) -> Tensor:
        """(in / block, out / block): the squared distance of the weights from a wish (out, in), square by square."""
        size = self.form.block
        squares = (wish - self.weight()).square().T
        return squares.reshape(squares.shape[0] // size, size, squares.shape[1] // size, size).sum((1, 3))

    def _tiles(self, symbols: Tensor) -> Tensor:
        return trellis.decode(symbols, self.form.bits, self.form.code)

    def rounded(self) -> Layer:
        """The layer with the codes and scales as they now are."""
        with torch.no_grad():
            suh, svh = self._stored()
        codes = self.held.transpose(0, 1).flatten(1)
        return self.layer.with_weight(self.form.pack(codes, {"suh": suh, "svh": svh}, self.layer.shape))
