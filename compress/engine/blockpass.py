"""Passes that tie the layers of a block together: scale folding, learned rounding, tuning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from compress.engine.layer_stats import LayerStats
from compress.engine.layerpass import Pass
from compress.engine.quantizing import Quantizing
from compress.layer import Layer


class Runner(Protocol):
    """The loaded block, and the calibration batches at its door.

    `module` is the block; `root` the whole tree (only this block's parameters are loaded; names are relative to it).
    """

    root: nn.Module
    module: nn.Module

    @property
    def batches(self) -> int:
        """How many batches there are."""
        ...

    def inputs(self, place: int) -> Tensor:
        """Hidden states (batch, length, features) float32 of a batch, as the compressed prefix puts them out."""
        ...

    def reference(self, place: int) -> Tensor:
        """The same as the uncompressed prefix puts them out (`Stat.REFERENCE`)."""
        ...

    def targets(self, place: int) -> Tensor:
        """What the block puts out in the model as the stage received it (`Stat.REFERENCE`)."""
        ...

    def forward(self, place: int, hidden: Tensor | None = None) -> Tensor:
        """The block's output for a batch, with its own inputs or others of the same shape. Keeps gradients."""
        ...


def output_error(runner: Runner, place: int) -> Tensor:
    """Mean squared error of the block's output for a batch, as a share of the mean square that it should have. Needs
    `Stat.REFERENCE`; keeps gradients."""
    target = runner.targets(place)
    power = target.square().mean()
    return (runner.forward(place) - target).square().mean() / torch.where(power > 0, power, 1.0)


@dataclass(frozen=True)
class Block:
    """One block as a pass sees it.

    name: module path; layers: all of its layers as they now are; source: the same before any pass lost something of
    them (rescaled as they are now); chosen: those that the pass is for, each with the
    pass's settings for it (overrides applied); plain: its other stored tensors by name (norm weights and the like);
    stats: of the chosen layers; runner: None where the pass needs no data; ahead: layers that the pass is for too,
    whose turn comes later, with settings as in chosen (`Pass.in_turn`).
    """

    name: str
    layers: Mapping[str, Layer]
    source: Mapping[str, Layer]
    chosen: Mapping[str, Pass]
    plain: Mapping[str, Tensor]
    stats: Mapping[str, LayerStats]
    runner: Runner | None = None
    ahead: Mapping[str, Pass] = field(default_factory=dict)


@dataclass(frozen=True)
class Changed:
    """What a block pass changed: layers (chosen or not) and plain tensors by name; skipped: chosen layers left alone,
    with why.

    rescaled: layers that were rescaled before they were rounded, as they were then: what errors are taken against
    from here on; stats: of inputs that are scaled otherwise than the block's statistics, for the same errors.
    """

    layers: Mapping[str, Layer]
    plain: Mapping[str, Tensor] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    rescaled: Mapping[str, Layer] = field(default_factory=dict)
    stats: Mapping[str, LayerStats] = field(default_factory=dict)


class BlockPass(Pass, ABC):
    """A pass that treats the layers of a block together."""

    any_dtype: ClassVar[bool] = False  # what it runs through the block, and compares, is float32
    opaque: ClassVar[bool] = False

    @abstractmethod
    def block(self, block: Block) -> Changed:
        """The changed layers and tensors. Keeps names, users and shapes. The runner's module may be changed at will:
        the engine puts the block's layers and tensors back afterwards."""


class BlockQuantPass(Quantizing, BlockPass, ABC):
    """A block pass that quantizes weights."""
