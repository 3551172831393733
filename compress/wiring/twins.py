"""A model and a narrower one made of it, side by side on a few tokens: what is cut away must be what was zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.engine.stream import BlockStream
from compress.layer import Layer, LayerSpec
from compress.models.model import Model
from compress.wiring.residual import few_tokens

TOLERANCE = 1e-4
"""Largest difference, as a share of what a block adds to the stream, that counts as rounding; plus `NOISE` of the
stream itself."""
NOISE = 1e-6
LOOSE = 1e-2
"""The same where norms have fewer channels: the small number that they add to a mean square weighs otherwise."""


class Held:
    """A reader of what is in memory: `layers` and `tensors`, which may be exchanged at any time."""

    nbytes = 0

    def __init__(self, layers: Mapping[str, Layer], tensors: Mapping[str, Tensor]) -> None:
        self.layers, self.tensors = dict(layers), dict(tensors)

    def layer(self, spec: LayerSpec) -> Layer:
        """One layer."""
        return self.layers[spec.name]

    def plain(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors that are no layer's."""
        return {name: self.tensors[name] for name in names}

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return self.tensors[name].dtype

    def release(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class Part:
    """A block, or what is outside the blocks: all layers and plain tensors."""

    layers: Mapping[str, Layer]
    plain: Mapping[str, Tensor]


class Twins:
    """Both models, block by block in float32, on random tokens.

    Args: wide: the model as it is; narrow: as planned, without weights; outer, first: pairs of what is outside the
    blocks and of the first block, the narrow one's second; kept (n,): channels of the stream that the narrow one has,
    all by default; allowed: see TOLERANCE.
    """

    def __init__(
        self,
        wide: Model,
        narrow: Model,
        outer: tuple[Part, Part],
        first: tuple[Part, Part],
        device: str,
        kept: Tensor | None = None,
        allowed: float = TOLERANCE,
    ) -> None:
        self.streams: list[BlockStream] = []
        self.kept, self.allowed = kept, allowed
        for model, rest, block in zip((wide, narrow), outer, first, strict=True):
            reader = Held({**rest.layers, **block.layers}, {**rest.plain, **block.plain})
            stream = BlockStream(replace(model, weights=reader), [few_tokens(wide)], device=device)
            with torch.no_grad():
                stream.start(rest.layers)
            reader.layers, reader.tensors = dict(rest.layers), dict(rest.plain)
            self.streams.append(stream)

    @torch.no_grad()
    def agree(self, index: int, wide: Part, narrow: Part) -> bool:
        """Whether a block puts out the same in both, each with the weights given, on what is carried along."""
        outputs = []
        for stream, part in zip(self.streams, (wide, narrow), strict=True):
            stream.load(index, part.layers, part.plain)
            outputs.append(stream.call(index, stream.hidden[0]).clone())
            stream.release(index)
        return self._agree(outputs[1], self._own(outputs[0]), self.streams[1].hidden[0])

    def agree_before(self) -> bool:
        """Whether the same enters the first block."""
        wanted = self._own(self.streams[0].hidden[0])
        return self._agree(self.streams[1].hidden[0], wanted, torch.zeros_like(wanted))

    def agree_after(self) -> bool:
        """Whether the same comes out in the end."""
        [wanted], [found] = self.streams[0].logits(), self.streams[1].logits()
        return self._agree(found, wanted, torch.zeros_like(wanted))

    @torch.no_grad()
    def advance(self, index: int, wide: Part) -> None:
        """What the wide block puts out is what both are given next."""
        first, second = self.streams
        first.load(index, wide.layers, wide.plain)
        first.advance(index)
        first.release(index)
        second.hidden[0].copy_(self._own(first.hidden[0]))

    def _own(self, hidden: Tensor) -> Tensor:
        return hidden if self.kept is None else hidden[..., self.kept]

    def _agree(self, found: Tensor, wanted: Tensor, given: Tensor) -> bool:
        found, wanted, given = (each.double().cpu() for each in (found, wanted, given))
        allowed = self.allowed * torch.linalg.vector_norm(wanted - given) + NOISE * torch.linalg.vector_norm(given)
        return bool(torch.linalg.vector_norm(found - wanted) <= allowed)
