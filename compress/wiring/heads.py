"""Values and their output layer: which rows of one layer become which inputs of another, head by head (rotation R2).

Attention mixes values of a head with one weight per token, so an orthogonal matrix per head passes through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.engine.blockpass import Block
from compress.layer import Layer, LayerKind
from compress.maths.rotation import Rotation
from compress.wiring.foldable import TOLERANCE, wire
from compress.wiring.folding import Folding
from compress.wiring.tracing import replaced


@dataclass(frozen=True, eq=False)
class Heads:
    """values: the layer whose rows start … are heads of `size`; outputs: the layers that they reach; places (q heads,):
    which head of the values each head of inputs comes from."""

    values: str
    outputs: tuple[str, ...]
    size: int
    start: int
    places: Tensor

    @property
    def count(self) -> int:
        """Heads of the values."""
        return int(self.places.max()) + 1


def find_heads(block: Block, size: int, turn: Rotation) -> Heads | None:
    """The heads of a loaded block, or None where no rotation of heads of this size leaves its output as it is.

    Args: size: of a head; turn: of that order, tried on all heads.
    """
    if block.runner is None:
        return None
    with torch.no_grad():
        wanted = block.runner.forward(0)
        added = torch.linalg.vector_norm((wanted - block.runner.inputs(0).to(wanted)).double())
        for folding in wire(block, pairs=True).foldings:
            heads = _heads(folding, size) if _is_pair(folding, block) else None
            if heads is None:
                continue
            with replaced(block.runner, block, turned_heads(heads, [turn] * heads.count, block.layers), {}):
                found = block.runner.forward(0)
            if torch.linalg.vector_norm((found - wanted).double()) <= TOLERANCE * added:
                return heads
    return None


def _is_pair(folding: Folding, block: Block) -> bool:
    """Linear layers on both sides. Experts hold no values, and one that no token reached would pass any check."""
    names = (folding.producer, *folding.consumers)
    if folding.offset is not None or folding.plain:
        return False
    return all(block.layers[name].kind is LayerKind.LINEAR for name in names)


def _heads(folding: Folding, size: int) -> Heads | None:
    """Rows as whole heads, each in its own order; None where they are not laid out so."""
    rows = folding.rows
    if len(rows) % size or bool((rows < 0).any()):
        return None
    grouped = rows.reshape(-1, size)
    first = grouped[:, :1]
    start = int(first.min())
    if not torch.equal(grouped, first + torch.arange(size)) or bool(((first - start) % size).any()):
        return None
    return Heads(folding.producer, folding.consumers, size, start, (first[:, 0] - start) // size)


def turned_heads(heads: Heads, turns: Sequence[Rotation], layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The layers with heads rotated, in float64: v' = v Q per head of the values, and its inverse at the inputs.

    Args: turns: one per head of the values.
    """
    source = layers[heads.values]
    weight = _double(source).clone()
    bias = None if source.bias is None else source.bias.double().clone()
    for place, turn in enumerate(turns):
        rows = slice(heads.start + place * heads.size, heads.start + (place + 1) * heads.size)
        weight[rows] = turn(weight[rows].T).T
        if bias is not None:
            bias[rows] = turn(bias[rows])
    changed = {heads.values: replace(source, weight=weight, bias=bias)}
    for name in heads.outputs:
        weight = _double(layers[name]).clone()
        for head, place in enumerate(heads.places.tolist()):
            columns = slice(head * heads.size, (head + 1) * heads.size)
            weight[:, columns] = turns[place](weight[:, columns])
        changed[name] = layers[name].with_weight(weight)
    return changed


def _double(layer: Layer) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.double()
