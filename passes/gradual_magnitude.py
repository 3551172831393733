"""gradual_magnitude: prune the smallest weights little by little while the whole model is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import cross_entropy

from compress.engine.layer_stats import Stat
from compress.engine.modelpass import ModelPass, Stage
from compress.engine.prune_pass import Pruning
from compress.engine.student import Student
from compress.errors import UsageError
from compress.inputs.batches import Batches
from compress.layer import Layer
from compress.models.model import Model, Task
from compress.training import distill
from compress.training.checkpoint import STATE, Saved
from compress.training.gradual import Masks
from compress.training.masked import GradualSchedule, Masked
from compress.training.objective import divergence, outputs
from compress.training.parts import Trained

_OF_LAYERS = frozenset({"sparsity", "pattern"})
"""Settings that may be a layer's own."""


class GradualMagnitude(Pruning, ModelPass):
    """Gradual magnitude pruning (Zhu and Gupta 2017, "To prune, or not to prune", arXiv 1710.01878).

    The model is trained while its masks are raised: from step `begin` to `end`, every `every` steps, the smallest
    weights of each layer become zero, s = s_f - (s_f - `start`) (1 - (t - t0) / (n Δt))³ of them. A pruned weight keeps
    its value aside, takes no gradient, and comes back where others have become smaller at a later raise; after the last
    one the masks stay as they are and training goes on. It trains on what statistics leave of the calibration data, or
    on these where nothing is left; the iterate of least loss on eighth parts held out, eight batches at most, is kept,
    of those at the final sparsity. What is trained: the weights and biases of the layers that the pass is for, and
    the norms of the whole model. It is in memory with gradients and two moments, and with the original besides by
    `loss=distill`.

    Settings: `sparsity` and `pattern` as in `magnitude` (in overrides too; `N:M` goes from M weights kept of every M
    down to N); `loss` `distill`, the divergence of the outputs from the original's (an encoder's squared error), or
    `labels`, cross-entropy with the labels of a classifier's data or the next tokens of a text; `steps`; `begin`; `end`
    (by default 60 % of the steps); `every`; `start` the sparsity at `begin`; `batch` calibration batches per step; `lr`
    (Adam, relative to the size of each output row, to 0 along a cosine); `minutes` at most: where they are over before
    the last raise, the rest is pruned at once, and the report says so; `temperature` that logits are divided by before
    they are compared (Hinton et al. 2015, arXiv 1503.02531): a classifier's on images that it was trained with say more
    at 3 than at 1; `seed`.
    """

    name: ClassVar[str] = "gradual_magnitude"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.REFERENCE})
    training: ClassVar[bool] = True
    renews: ClassVar[bool] = True
    trains_rest: ClassVar[bool] = True
    opaque: ClassVar[bool] = False

    loss: Literal["distill", "labels"] = "distill"
    steps: int = Field(default=400, ge=2)
    begin: int = Field(default=0, ge=0)
    end: int | None = Field(default=None, ge=1)
    every: int = Field(default=10, ge=1)
    start: float = Field(default=0.0, ge=0, lt=1)
    batch: int = Field(default=1, ge=1)
    lr: float = Field(default=0.01, gt=0, le=1)
    minutes: float | None = Field(default=None, gt=0)
    temperature: float = Field(default=1.0, gt=0, le=100)
    seed: int = 0

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        for pattern, values in self.overrides.items():
            other = sorted(set(values) - _OF_LAYERS)
            if other:
                raise UsageError(
                    f"{self.name}: overrides of '{pattern}' set {other[0]}, which is the same for all layers, since "
                    "they are trained together. Only sparsity and pattern may be a layer's own."
                )
        if self.loss == "labels" and self.temperature != 1:
            raise UsageError(
                f"{self.name}: temperature={self.temperature:g} is of loss=distill: labels have none. Leave it out."
            )
        last = self.schedule().last
        if last >= self.steps:
            raise UsageError(
                f"{self.name}: the last raise is at step {last} of {self.steps}, so that nothing would be trained "
                "after it. Give more steps, or an earlier end."
            )
        return self

    @property
    def trained_copies(self) -> float:
        return 9.5

    @property
    def saved_copies(self) -> float:
        """The weights, their values aside and their masks in bytes, all these of the best iterate, and two moments."""
        return 6.5

    @property
    def trained_batches(self) -> int:
        return self.steps * self.batch

    def check(self, model: Model) -> None:
        if self.loss == "labels" and model.task is Task.ENCODER:
            raise UsageError(f"{self.name}: loss=labels: an encoder's data have no labels. Choose loss=distill.")
        if self.temperature != 1 and model.task is Task.ENCODER:
            raise UsageError(
                f"{self.name}: temperature={self.temperature:g} divides logits, and an encoder has none. Leave it out."
            )

    def schedule(self) -> GradualSchedule:
        """By the settings; of N:M the share that it implies. Raises: UsageError."""
        end = max(self.begin + self.every, int(0.6 * self.steps)) if self.end is None else self.end
        fixed = self.parsed().fixed
        try:
            return GradualSchedule(fixed or self.sparsity, end, self.begin, self.every, self.start)
        except UsageError as error:
            raise UsageError(f"{self.name}: {error}") from error

    def apply(self, stage: Stage) -> None:
        assert stage.calibration is not None
        batches = Batches.to_train_on(stage.calibration, self.seed)
        student = _Student(stage)
        loss = self._loss(stage, student, batches)
        train, held = distill.split(len(batches), most=distill.MOST_HELD)
        last, saved = self.schedule().last, Saved(stage.folder / STATE, str(self))

        def before(done: int, steps: int) -> None:
            student.masks.step(done)
            stage.progress.tick("Pruning steps", done, steps)

        with student.parts.lent():
            outcome = distill.fit(
                student.groups(self.lr),
                loss,
                train,
                held,
                distill.Budget(self.steps, self.batch, self.minutes, first=last),
                schedule="cosine",
                seed=self.seed,
                tell=before,
                saved=saved,
                ready=student.masks.finish,
            )
        count = outcome.steps * self.batch * batches.mean_rows(train)
        student.write(stage, f"{self._told(outcome, last)}; trained on {batches.told(count)}")
        saved.remove()

    def _loss(self, stage: Stage, student: _Student, batches: Batches) -> distill.Loss:
        task = stage.model.task
        if self.loss == "labels":

            def by_labels(at: int) -> Tensor:
                batch, labels = batches[at], batches.labels(at)
                found = student.outputs(batch)
                if labels is not None:
                    return cross_entropy(found, labels)
                return cross_entropy(found[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

            return by_labels
        teacher = stage.whole(stage.original).requires_grad_(False)

        def against(at: int) -> Tensor:
            with torch.no_grad():
                wanted = outputs(teacher, batches[at])
            return divergence(task, wanted, student.outputs(batches[at]), self.temperature)

        return against

    def _told(self, outcome: distill.Outcome, last: int) -> str:
        if outcome.steps <= last:
            return (
                f"time was up at step {outcome.steps}, before the last raise at {last}: the rest was pruned at once, "
                f"and not trained; {outcome.on} loss {outcome.after:.3g}"
            )
        return f"pruned in {self.schedule().raises} raises up to step {last}: {outcome.describe()}"


class _Plain:
    """A weight that is trained as it is, (out, in) float32: each output row over its size as it was, so that steps are
    relative to that. Rows that normalisations were folded into differ by orders of magnitude."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        weight = layer.float_weight()
        sizes = weight.square().mean(1, keepdim=True).sqrt()
        self.scale = sizes.clamp(min=0.01 * float(sizes.max()) or 1.0)
        self.values = (weight / self.scale).requires_grad_(True)

    def weight(self) -> Tensor:
        """With gradients."""
        return self.values * self.scale


class _Student(Student):
    """The model with its weights as they are trained, and their masks."""

    def __init__(self, stage: Stage) -> None:
        trained: frozenset[Trained] = frozenset({"norms", "biases"})
        super().__init__(stage, trained)
        self.plain = {name: _Plain(layer) for name, layer in self.parts.layers.items()}
        self.parts.weights = tuple(self.plain.values())
        self.items = {name: item for name, item in stage.chosen.items() if isinstance(item, GradualMagnitude)}
        self.masks = Masks([self._masked(name, item) for name, item in self.items.items()])

    def _masked(self, name: str, item: GradualMagnitude) -> Masked:
        plain = self.plain[name]
        return Masked(name, plain.values, item.schedule(), item.parsed(), plain.scale)

    def groups(self, lr: float) -> list[distill.Group]:
        own = [distill.Group([each.tensor], lr, each.apply, each.state) for each in self.masks.weights]
        return [*own, *super().groups(lr)]

    def write(self, stage: Stage, note: str) -> None:
        model = stage.model
        for segment in model.structure.segments:
            layers = {
                name: self._pruned(name, layer, note) if name in self.items else layer
                for name, layer in model.layers(segment).items()
            }
            plain = model.plain(segment)
            vectors = {
                name: self.parts.vectors[name].to(plain[name].dtype) for name in plain.keys() & self.parts.vectors
            }
            stage.write(segment, layers, plain | vectors)

    def _pruned(self, name: str, layer: Layer, note: str) -> Layer:
        bias = self.parts.biases.get(name)
        if bias is not None and layer.bias is not None:
            layer = replace(layer, bias=bias.to(layer.bias.dtype))
        return self.items[name].pruned(layer, self.plain[name].weight().detach(), (note,))
