"""tune: train what is continuous in a compressed model, scales, norms and biases, to put out what the original does."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from compress.engine.layer_stats import Stat
from compress.engine.modelpass import ModelPass, Stage
from compress.engine.part import Part
from compress.engine.student import Student
from compress.errors import UsageError
from compress.layer import LayerSpec
from compress.training import distill
from compress.training.objective import divergence, outputs
from compress.training.parts import Trained


class Tune(ModelPass):
    """Distillation of the whole model (as AQLM's and PV-Tuning's continuous step, arXiv 2405.14852 §3.2).

    The teacher is the uncompressed model, the loss the divergence of the outputs KL(original || compressed) per token
    or image; for an encoder the squared error of its hidden states as a share of theirs. Both models are in memory at
    once, with the gradients. Codes stay as they are. The iterate of least loss on held-out calibration batches is kept,
    the start included.

    Settings: `parts` what is trained: `scales` of layers on integer grids or in trellises, `codebooks` entries and
    scales of layers in them, `norms` (every stored vector that is no layer's, whatever the targets), `biases`, `inputs`
    static input grids; `steps`; `batch` calibration batches per step; `lr` (Adam, relative to the size of what is
    trained, to 0 along a cosine); `minutes` at most; `seed`.
    """

    name: ClassVar[str] = "tune"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.REFERENCE})
    part: ClassVar[Part] = Part.TUNING
    after: ClassVar[frozenset[Part]] = frozenset({Part.WEIGHT})
    keeps_zeros: ClassVar[bool] = True
    training: ClassVar[bool] = True
    per_layer: ClassVar[bool] = False
    done: ClassVar[str] = "tuned"
    """For the report's notes."""

    parts: tuple[Trained, ...] = Field(("scales", "codebooks", "norms", "biases"), min_length=1)
    steps: int = Field(default=100, ge=1)
    batch: int = Field(default=1, ge=1)
    lr: float = Field(default=1e-3, gt=0, le=1)
    minutes: float | None = Field(default=None, gt=0)
    seed: int = 0

    @property
    def trained_copies(self) -> float:
        return 8.5 if {"scales", "codebooks"} & set(self.parts) else 0.0

    @property
    def trained_batches(self) -> int:
        return self.steps * self.batch

    def plan(self, spec: LayerSpec) -> LayerSpec:
        return spec

    def student(self, stage: Stage) -> Student:
        """What is trained."""
        return Student(stage, frozenset(self.parts))

    def apply(self, stage: Stage) -> None:
        assert stage.calibration is not None
        batches = stage.calibration.batches()
        one = self.student(stage)
        teacher = stage.whole(stage.original).requires_grad_(False)
        groups = one.groups(self.lr)
        if not groups:
            raise UsageError(
                f"{self.name}: the model has nothing of {', '.join(self.parts)} to train. Name other parts."
            )
        train, held = distill.split(len(batches))
        with one.parts.lent():
            outcome = distill.fit(
                groups,
                lambda at: divergence(stage.model.task, outputs(teacher, batches[at]), one.outputs(batches[at])),
                train,
                held,
                distill.Budget(self.steps, self.batch, self.minutes),
                schedule="cosine",
                seed=self.seed,
                tell=lambda done, steps: stage.progress.tick("Tuning steps", done, steps),
            )
        one.write(stage, f"{self.done} with the whole model: {outcome.describe()}{one.told()}")
