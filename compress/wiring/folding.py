"""Scale folding: a positive factor per channel moves out of what makes a tensor into the layers that the tensor feeds.

Pure functions on layers, tensors and statistics; which foldings a block allows is found by compress/wiring/foldable.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from compress.engine.blockpass import Block
from compress.engine.layer_stats import LayerStats
from compress.engine.layerpass import Pass
from compress.errors import UsageError
from compress.layer import Layer


@dataclass(frozen=True, eq=False)
class Folding:
    """Where a scale per channel may move.

    producer: the norm (module path) or layer that makes the tensor; consumers: the layers that it feeds; plain: 2-D
    tensors, (n, in), of the block that it feeds too (routers); channels: of the producer, a layer's output rows; rows
    (in,) int64: which of them makes each input of the consumers (a row of the values makes an input for each query head
    of its group), −1 for an input that stays as it is; offset: a norm multiplies by offset + weight (1 in Gemma's),
    None where the producer is a layer.
    """

    producer: str
    consumers: tuple[str, ...]
    plain: tuple[str, ...]
    channels: int
    rows: Tensor
    offset: float | None = None

    def spread(self, scale: Tensor) -> Tensor:
        """A scale per channel (channels,) as the factor of each input column (in,)."""
        return torch.where(self.rows < 0, 1.0, scale[self.rows.clamp(min=0)])

    def gather(self, values: Tensor, how: Literal["amax", "mean"]) -> Tensor:
        """What the input columns (in,) of each channel have in common, (channels,); 0 for a channel without any."""
        known = self.rows >= 0
        result = torch.zeros(self.channels)
        return result.scatter_reduce_(0, self.rows[known], values[known], how, include_self=False)

    def only_used(self, scale: Tensor) -> Tensor:
        """The scale (channels,) with 1 for channels that make no input of the consumers."""
        used = torch.zeros(self.channels, dtype=torch.bool)
        used[self.rows[self.rows >= 0]] = True
        return torch.where(used, scale, 1.0)


def fold(
    folding: Folding, scale: Tensor, layers: Mapping[str, Layer], plain: Mapping[str, Tensor]
) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """The layers and plain tensors that change, in float32: the consumers' columns times the scale, the producer's
    channels through it. scale (channels,) float32 > 0."""
    scale = folding.only_used(scale)
    columns = folding.spread(scale)
    changed = {name: _times(layers[name], columns) for name in folding.consumers}
    tensors = {name: plain[name].float() * columns for name in folding.plain}
    if folding.offset is None:
        changed[folding.producer] = _rows_divided(layers[folding.producer], scale)
        return changed, tensors
    gain, bias = f"{folding.producer}.weight", f"{folding.producer}.bias"
    exact = (folding.offset + plain[gain].double()) / scale.double() - folding.offset
    tensors[gain] = exact.float()
    if bias in plain:
        tensors[bias] = plain[bias].float() / scale
    return changed, tensors


def _times(layer: Layer, columns: Tensor) -> Layer:
    return layer.with_weight(layer.float_weight() * columns)


def _rows_divided(layer: Layer, scale: Tensor) -> Layer:
    bias = None if layer.bias is None else layer.bias.float() / scale
    return replace(layer, weight=layer.float_weight() / scale[:, None], bias=bias)


def rescaled_stats(stats: LayerStats, columns: Tensor) -> LayerStats:
    """Statistics of inputs that are divided by `columns` (in,): H → S⁻¹HS⁻¹ and x̄ → S⁻¹x̄. A histogram, which mixes
    the columns, is dropped."""

    def divided(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        return values / columns if values.ndim == 1 else values / columns / columns[:, None]

    return replace(
        stats,
        hessian=divided(stats.hessian),
        cross=divided(stats.cross),
        drift=divided(stats.drift),
        abs_mean=divided(stats.abs_mean),
        abs_max=divided(stats.abs_max),
        histogram=None,
    )


@dataclass
class Bench:
    """A block's layers, plain tensors and statistics while scales are folded in, one after the other.

    changed, changed_plain: what differs from the block so far.
    """

    block: Block
    changed: dict[str, Layer] = field(default_factory=dict)
    changed_plain: dict[str, Tensor] = field(default_factory=dict)
    stats: dict[str, LayerStats] = field(init=False)

    def __post_init__(self) -> None:
        self.stats = dict(self.block.stats)

    def layer(self, name: str) -> Layer:
        """A layer as it now is."""
        return self.changed.get(name) or self.block.layers[name]

    def fold(self, folding: Folding, scale: Tensor) -> None:
        """Fold a scale (channels,) in; statistics follow it."""
        layers = {name: self.layer(name) for name in self.block.layers}
        changed, tensors = fold(folding, scale, layers, {**self.block.plain, **self.changed_plain})
        self.changed |= {name: _noted(layer, folding, self.block) for name, layer in changed.items()}
        self.changed_plain |= tensors
        columns, done = folding.spread(folding.only_used(scale)), dict[int, LayerStats]()
        for name in folding.consumers:
            if name in self.stats:
                before = self.stats[name]  # layers that are fed one tensor share one object, and go on sharing it
                self.stats[name] = done.setdefault(id(before), rescaled_stats(before, columns))

    def outcome(self, reasons: Mapping[str, str]) -> tuple[dict[str, Layer], dict[str, str]]:
        """Changed layers, with a remark where only their rows are; chosen layers that are as they were, with why.

        Args: reasons: why a layer's columns were not rescaled.
        """
        layers = dict(self.changed)
        for name in self.block.chosen:
            if name in layers and name in reasons:
                note = f"only what it puts out was rescaled: {reasons[name]}"
                layers[name] = replace(layers[name], notes=(*layers[name].notes, note))
        return layers, {name: reasons.get(name, "") for name in self.block.chosen if name not in layers}


def _noted(layer: Layer, folding: Folding, block: Block) -> Layer:
    """With a remark where the pass was not asked to touch this layer."""
    if layer.name in block.chosen:
        return layer
    if layer.name in folding.consumers:
        why = f"not chosen by the pass, but {folding.producer} feeds it too, so it is rescaled with the others"
    else:
        why = f"not chosen by the pass, but what it puts out is rescaled for {folding.consumers[0]}"
    return replace(layer, notes=(*layer.notes, why))


NOT_A_NORM = "a layer feeds it, not a norm, and folds=norms"


def agreed(block: Block, folding: Folding, settings: Iterable[str]) -> Pass | None:
    """The pass whose settings count for a folding: that of its chosen consumers; None where there are none.

    Raises: UsageError where overrides give consumers of one scale different settings.
    """
    names = [name for name in folding.consumers if name in block.chosen]
    for key in settings:
        values = {name: getattr(block.chosen[name], key) for name in names}
        first = next(iter(values.items()), None)
        other = next(((name, value) for name, value in values.items() if first and value != first[1]), None)
        if first and other:
            raise UsageError(
                f"{block.chosen[names[0]].name}: overrides give {first[0]} {key}={first[1]} and {other[0]} "
                f"{key}={other[1]}, but {folding.producer} feeds both, so they share one scale. Give them the same."
            )
    return block.chosen[names[0]] if names else None
