"""pv_tuning: train the codes of a compressed model along with what is continuous in it."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from compress.engine.modelpass import Stage
from compress.engine.student import Student
from compress.errors import UsageError
from compress.passes.tune import Tune
from compress.training import distill
from compress.training.code_step import Codes, CodeStep
from compress.training.parts import Trained


class PvTuning(Tune):
    """PV-Tuning (Malinovskii et al. 2024, arXiv 2405.14852): `tune`, with a discrete step for the codes.

    Besides entries, scales and norms a continuous copy of each weight is trained, straight through its codes; after
    each step the codes of the few units that have come furthest from their copy are chosen again
    (compress/training/code_step.py). A unit is what shares a code: a vector of a codebook, a tile of a trellis, or one
    weight of an integer grid.

    Settings: those of `tune`, and `code_lr` of the continuous copies, relative to the size of the weights; `changes`
    the share of a layer's units that may change in a step; `beam` candidates for the codes of a vector; `decay` how far
    a copy goes back to what is decoded after each step (0: not at all); `trust` how long a step of a layer's codes may
    be, as a share of its weights' norm (0: as long as `changes` makes it).
    """

    name: ClassVar[str] = "pv_tuning"
    keeps_zeros: ClassVar[bool] = False  # codes are chosen anew
    done: ClassVar[str] = "codes and the rest tuned"

    parts: tuple[Trained, ...] = Field(("scales", "codebooks", "norms"), min_length=1)
    code_lr: float = Field(default=0.03, gt=0, le=1)
    changes: float = Field(default=0.01, gt=0, le=1)
    beam: int = Field(default=4, ge=1, le=256)
    decay: float = Field(default=0.0, ge=0, le=1)
    trust: float = Field(default=0.0, ge=0, le=1)

    @property
    def trained_copies(self) -> float:
        return 8.5 + 4.0

    def student(self, stage: Stage) -> Student:
        return _Student(self, stage)


class _Student(Student):
    """With codes that follow."""

    def __init__(self, item: PvTuning, stage: Stage) -> None:
        super().__init__(stage, frozenset(item.parts))
        self.item = item
        parts = self.parts
        held: tuple[Codes, ...] = (*parts.grids.values(), *parts.trellises.values(), *parts.books.values())
        if not held:
            raise UsageError(
                "pv_tuning: no layer that it is for has codes to train, of an integer grid or trellis (parts=[scales]) "
                "or of a codebook (parts=[codebooks]). Quantize first, or name these parts."
            )
        self.steps = [CodeStep(each, item.changes, item.beam, item.decay, item.trust) for each in held]
        parts.weights = tuple(self.steps)

    def told(self) -> str:
        refused, steps = sum(step.refused for step in self.steps), sum(step.steps for step in self.steps)
        return f"; {refused} of {steps} steps of codes were too long for trust={self.item.trust:g}" if refused else ""

    def groups(self, lr: float) -> list[distill.Group]:
        return [*super().groups(lr), *(step.group(self.item.code_lr) for step in self.steps)]
