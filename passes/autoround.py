"""autoround: learn which way each weight is rounded, and how wide its grid is, by what the block puts out."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from compress.engine.blockpass import Block, BlockPass, Changed, Runner, output_error
from compress.engine.layer_stats import Stat
from compress.engine.part import Part
from compress.errors import UsageError
from compress.formats.int_grid import IntGrid
from compress.layer import LayerKind, LayerSpec
from compress.training import distill
from compress.training.soft import SoftRounding, lend_soft
from compress.training.trainable import lending

# how far a grid may shrink or grow: AutoRound's clip factors shrink only, but a start by range search has shrunk it
SHRINK, GROW = 0.7, 1.3


class AutoRound(BlockPass):
    """AutoRound (Cheng et al. 2023, arXiv 2309.05516): learned rounding, block by block, by sign descent.

    It refines layers that `rtn`, `gptq` or another pass has put on an integer grid, so it comes after one: `rtn,
    autoround` is the paper's, `gptq, autoround` starts from the better codes. Per weight an offset in [−½, ½] is added
    before rounding, and per group a factor widens or narrows the grid; the loss is the squared error of the block's
    output against the model as the stage received it, with inputs from the compressed prefix. The iterate of least
    loss on held-out batches is kept, the start included.

    Settings: `steps`; `batch` calibration batches per step (of 2048 tokens); `lr` of both, 1/steps where it is not
    given, falling to 0; `grids` also learns the factors; `seed` of the order of batches.
    """

    name: ClassVar[str] = "autoround"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.REFERENCE})
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({LayerKind.LINEAR, LayerKind.EXPERT, LayerKind.CONV})
    part: ClassVar[Part] = Part.ROUNDING
    before: ClassVar[frozenset[Part]] = frozenset({Part.TUNING})
    after: ClassVar[frozenset[Part]] = frozenset({Part.WEIGHT})
    inside: ClassVar[bool] = True
    per_layer: ClassVar[bool] = False

    steps: int = Field(default=200, ge=1)
    batch: int = Field(default=2, ge=1)
    lr: float | None = Field(default=None, gt=0, le=1)
    grids: bool = True
    seed: int = 0

    @property
    def trained_copies(self) -> float:
        return 15.0

    @property
    def trained_batches(self) -> int:
        return self.steps * self.batch

    def plan(self, spec: LayerSpec) -> LayerSpec:
        if not isinstance(spec.format, IntGrid):
            raise UsageError(
                f"autoround: layer {spec.name} is {spec.format or 'not quantized'}, but rounding is learned on integer "
                "grids only. Put rtn or gptq with an int format before it, or leave the layer out with ignore."
            )
        return spec

    def block(self, block: Block) -> Changed:
        runner = block.runner
        assert runner is not None
        soft = {
            name: SoftRounding(layer, block.source[name].float_weight())
            for name, layer in block.layers.items()
            if name in block.chosen
        }
        lr = self.lr or 1 / self.steps
        groups = [distill.Group([each.offset for each in soft.values()], lr, lambda: _keep(soft))]
        if self.grids:
            groups.append(distill.Group([each.factor for each in soft.values()], lr))
        train, held = distill.split(runner.batches)
        budget = distill.Budget(self.steps, self.batch)
        with lending(runner.root, [block.layers[name] for name in soft]):
            outcome = distill.fit(
                groups, lambda place: _loss(runner, soft, place), train, held, budget, optimizer="sign", seed=self.seed
            )
        note = f"rounding learned: {outcome.describe()}"
        return Changed({name: replace(each.rounded(), notes=(note,)) for name, each in soft.items()})


def _keep(soft: dict[str, SoftRounding]) -> None:
    for each in soft.values():
        each.offset.clamp_(-0.5, 0.5)
        each.factor.clamp_(SHRINK, GROW)


def _loss(runner: Runner, soft: dict[str, SoftRounding], place: int) -> Tensor:
    lend_soft(runner.root, soft.values())
    return output_error(runner, place)
