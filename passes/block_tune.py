"""block_tune: train what is continuous in a block, codebooks, scales and norms, by what the block puts out."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from compress.engine.blockpass import Block, BlockPass, Changed, Runner, output_error
from compress.engine.layer_stats import Stat
from compress.engine.part import Part
from compress.errors import UsageError
from compress.layer import LayerSpec
from compress.training import distill
from compress.training.parts import Continuous, Trained, trainable, vectors_of


class BlockTune(BlockPass):
    """Fine-tuning block by block (AQLM, Egiazarian et al. 2024, arXiv 2401.06118, §3.3, phase 3).

    It refines layers that another pass has quantized, so it comes after one: `aqlm, block_tune` is the paper's, `vptq,
    block_tune` starts from the better codes. The loss is the squared error of the block's output against the model as
    the stage received it, with inputs from the compressed prefix; codes stay as they are. The iterate of least loss on
    held-out batches is kept, the start included. Only one block is in memory with its gradients.

    Settings: `parts` what is trained, as in `tune`: `scales` of layers on integer grids or in trellises, `codebooks`
    entries and scales of layers in them, `norms` the block's own vectors, `biases`, `inputs` static input grids;
    `steps`; `batch` calibration batches per step; `lr` (Adam, relative to the size of what is trained, falling to 0);
    `patience` looks at the held-out loss, one every 25 steps, without a gain before it stops (0: never); `seed`.
    """

    name: ClassVar[str] = "block_tune"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.REFERENCE})
    part: ClassVar[Part] = Part.ROUNDING
    before: ClassVar[frozenset[Part]] = frozenset({Part.TUNING})
    after: ClassVar[frozenset[Part]] = frozenset({Part.WEIGHT})
    keeps_zeros: ClassVar[bool] = True
    inside: ClassVar[bool] = True
    per_layer: ClassVar[bool] = False

    parts: tuple[Trained, ...] = Field(("scales", "codebooks", "norms"), min_length=1)
    steps: int = Field(default=200, ge=1)
    batch: int = Field(default=2, ge=1)
    lr: float = Field(default=3e-3, gt=0, le=1)
    patience: int = Field(default=3, ge=0)
    seed: int = 0

    @property
    def trained_copies(self) -> float:
        return 15.0

    @property
    def trained_batches(self) -> int:
        return self.steps * self.batch

    def plan(self, spec: LayerSpec) -> LayerSpec:
        if "norms" not in self.parts and not trainable(spec, frozenset(self.parts)):
            raise UsageError(
                f"block_tune: layer {spec.name} ({spec.format or 'not quantized'}) has nothing of "
                f"{', '.join(self.parts)} to train. Name other parts, or leave the layer out with ignore."
            )
        return spec

    def block(self, block: Block) -> Changed:
        runner = block.runner
        assert runner is not None
        layers = {name: layer for name, layer in block.layers.items() if name in block.chosen}
        parts = Continuous(runner.root, layers, vectors_of(runner.root, block.plain), frozenset(self.parts))
        groups = parts.groups(self.lr)
        if not groups:
            return Changed({}, skipped=dict.fromkeys(layers, "nothing of what is trained is in it"))
        train, held = distill.split(runner.batches)
        budget = distill.Budget(self.steps, self.batch, patience=self.patience)
        with parts.lent():
            outcome = distill.fit(groups, lambda at: _loss(runner, parts, at), train, held, budget, seed=self.seed)
        note = f"tuned with its block: {outcome.describe()}"
        done = {name: replace(parts.layer(layers[name]), notes=parts.notes(name, note)) for name in parts.trained}
        vectors = f"; the vectors of its block: {note}" if parts.vectors else ""
        skipped = dict.fromkeys(layers.keys() - parts.trained, f"nothing of what is trained is in it{vectors}")
        return Changed(done, parts.vectors, skipped)


def _loss(runner: Runner, parts: Continuous, place: int) -> Tensor:
    parts.lend_weights()
    return output_error(runner, place)
