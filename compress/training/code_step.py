"""PV-Tuning's discrete step (Malinovskii et al. 2024, arXiv 2405.14852, §3.2 and Algorithm 1): codes follow a
continuous weight."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from compress.layer import Layer
from compress.training import distill

BETAS = (0.0, 0.95)
# numbers of units tried where a step would be too long
TRIES = 8


class Codes(Protocol):
    """A quantized weight whose codes can be chosen again."""

    layer: Layer

    @property
    def held(self) -> Tensor | None:
        """The codes."""
        ...

    def weight(self) -> Tensor:
        """(out, in) float32, as the codes decode."""
        ...

    def reencode(self, wish: Tensor, share: float, beam: int) -> None:
        """Choose the codes of those units that are furthest from `wish` again, at most a share of them."""
        ...


class CodeStep:
    """A quantized weight that is trained as if it were continuous, and follows in its codes.

    wish (out, in) float32 takes the gradient of the decoded weight (straight through). After each step of the optimizer
    the units, groups of weights that share a code, that have come furthest from what they decode to get new codes: of
    all units only a small `share`, since a step long enough to change a code would be too long for all of them. Then
    the wish goes back to what is decoded by the share `decay` of the way (0: it keeps what it has gathered). trust: the
    norm of the change of all weights, as a share of their own, that a step may not exceed: it then takes fewer units
    (0: as many as `share` says).
    """

    def __init__(self, codes: Codes, share: float, beam: int, decay: float, trust: float = 0.0) -> None:
        self.codes, self.share, self.beam, self.decay, self.trust = codes, share, beam, decay, trust
        self.layer = codes.layer
        self.steps = self.refused = 0
        self.wish = codes.weight().detach().clone()
        self.size = float(self.wish.square().mean().sqrt()) or 1.0

    def weight(self) -> Tensor:
        """(out, in) float32: the decoded values, with the gradients of entries, scales and wish."""
        return self.codes.weight() + (self.wish - self.wish.detach())

    def follow(self) -> None:
        """The step."""
        self.steps += 1
        with torch.no_grad():
            if self.trust:
                self._trusted()
            else:
                self.codes.reencode(self.wish, self.share, self.beam)
            self.wish.lerp_(self.codes.weight(), self.decay)

    def _trusted(self) -> None:
        """With so few units that the change is not too long; where that is not found, codes stay."""
        held, share = self.codes.held, self.share
        assert held is not None
        kept, before = held.clone(), self.codes.weight()
        most = self.trust * float(before.norm())
        for _ in range(TRIES):
            self.codes.reencode(self.wish, share, self.beam)
            moved = float((self.codes.weight() - before).norm())
            if moved <= most:
                return
            held.copy_(kept)
            share *= 0.9 * (most / moved) ** 2  # the square of a change is the sum over its units
        self.refused += 1

    def group(self, lr: float) -> distill.Group:
        """What trains it. lr: of the wish, relative to the size of the weights."""
        assert self.codes.held is not None
        return distill.Group([self.wish], lr * self.size, self.follow, [self.codes.held], BETAS)
