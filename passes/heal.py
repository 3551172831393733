"""heal: train what pruning left of a model to put out what the original does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.engine.layer_stats import Stat
from compress.engine.modelpass import ModelPass, Stage
from compress.engine.part import Part
from compress.engine.student import Student
from compress.errors import UsageError
from compress.inputs.batches import Batches
from compress.layer import Layer, LayerSpec
from compress.models.model import Model
from compress.training import distill
from compress.training.checkpoint import STATE, Saved
from compress.training.objective import divergence, hidden_error, outputs, watched
from compress.training.parts import Trained
from compress.training.plain import FullWeight, LowRank

TOKENS, IMAGES = 1_000_000, 50_000
"""Trained on where no number is given."""
RATES = {"full": 0.02, "lora": 0.03}
WARMUP = 0.05
"""Share of the steps in which the learning rate rises."""


class Heal(ModelPass):
    """Distillation of a model that was pruned, or made smaller, from the uncompressed original (as Minitron, arXiv
    2407.14679, and Shortened LLaMA, arXiv 2402.02834, retrain).

    The loss is the divergence of the outputs KL(original || model) per token or image; for an encoder the squared error
    of its hidden states as a share of theirs. It trains on the windows of the calibration data that statistics leave
    over, or on these where nothing is left; the iterate of least loss on eighth parts held out, eight batches at most,
    is kept, the start included. Weights that were pruned stay zero. Both models are in memory at once, with the
    gradients. What comes out is stored in the types that the layers were stored in, and is what the errors of later
    passes are taken against. Comes before passes that give weights a format; it may come several times. Embeddings and
    heads are trained where targets name them.

    Settings: `mode` `full` trains the weights themselves, `lora` updates of `rank` that are folded into them;
    `parts` what is trained: `weights`, `norms` (every stored vector that is no layer's, whatever the targets),
    `biases`; `tokens` that go through (of an image model: images; by default 1,000,000 or 50,000); `batch` calibration
    batches (of 2048 tokens, or 32 images) per step; `lr` (Adam, relative to the size of what is trained; rises in the
    first twentieth of the steps, then to 0 along a cosine); `minutes` at most; `hidden` weight of the squared error of
    what the blocks put out, each against the same block of the original and token by token as a share (by default 1
    where blocks are alike and as wide as there, else 0); `temperature` that both models' logits are divided by; `seed`.
    """

    name: ClassVar[str] = "heal"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.REFERENCE})
    part: ClassVar[Part] = Part.NONE
    before: ClassVar[frozenset[Part]] = frozenset({Part.WEIGHT, Part.ACT})
    keeps_zeros: ClassVar[bool] = True
    renews: ClassVar[bool] = True
    keeps_ties: ClassVar[bool] = True
    training: ClassVar[bool] = True
    trains_rest: ClassVar[bool] = True
    per_layer: ClassVar[bool] = False

    mode: Literal["full", "lora"] = "full"
    rank: int = Field(default=16, ge=1)
    parts: tuple[Literal["weights", "norms", "biases"], ...] = Field(("weights", "norms", "biases"), min_length=1)
    tokens: int | None = Field(default=None, ge=1)
    batch: int = Field(default=1, ge=1)
    lr: float | None = Field(default=None, gt=0, le=1)
    minutes: float | None = Field(default=None, gt=0)
    hidden: float | None = Field(default=None, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    seed: int = 0

    @model_validator(mode="after")
    def _check_mode(self) -> Self:
        if self.mode == "full" and "rank" in self.model_fields_set:
            raise UsageError(f"heal: rank={self.rank} is of mode=lora, and mode=full trains whole weights. Keep one.")
        if "weights" not in self.parts and {"mode", "rank"} & self.model_fields_set:
            raise UsageError("heal: mode and rank are of weights, which parts leaves out. Add weights, or leave them.")
        return self

    @property
    def trained_copies(self) -> float:
        if "weights" not in self.parts:
            return 0.0
        return 6.0 if self.mode == "full" else 3.0

    @property
    def saved_copies(self) -> float:
        """The weights, those of the best iterate and Adam's two moments; updates of low rank are next to nothing."""
        return 4.0 if self.trained_copies and self.mode == "full" else 0.1

    def trained_rows(self, images: bool) -> int:
        return self.tokens or (IMAGES if images else TOKENS)

    def check(self, model: Model) -> None:
        if self.hidden and model.image is not None:
            raise UsageError("heal: hidden compares what blocks put out, and an image model has no like blocks.")
        if self.parts == ("biases",) and not any(spec.has_bias for spec in model.structure.layers.values()):
            raise UsageError("heal: parts=[biases], and no layer of the model has one. Name other parts.")

    def plan(self, spec: LayerSpec) -> LayerSpec:
        return spec

    def apply(self, stage: Stage) -> None:
        assert stage.calibration is not None
        batches = Batches.to_train_on(stage.calibration, self.seed)
        train, held = distill.split(len(batches), most=distill.MOST_HELD)
        each = self.batch * batches.mean_rows(train)
        steps = max(1, round(self.trained_rows(stage.model.task.takes_rows) / each))
        budget = distill.Budget(steps, self.batch, self.minutes, warmup=int(WARMUP * steps))
        patient, saved = _Patient(stage, self), Saved(stage.folder / STATE, str(self))
        with ExitStack() as lent:
            hidden = _hidden_weight(stage, self)
            loss, judged = _losses(stage, self, hidden, patient, batches, lent)
            plain = not hidden and self.temperature == 1  # then the loss is the divergence
            before = 0.0 if plain else judged(held)
            outcome = distill.fit(
                patient.groups(self.lr or RATES[self.mode]),
                loss,
                train,
                held,
                budget,
                schedule="cosine",
                seed=self.seed,
                tell=lambda done, steps: stage.progress.tick("Healing steps", done, steps),
                saved=saved,
            )
            before, exact = (outcome.before, outcome.after) if plain else (before, judged(held))
            patient.round(stage)
            after = judged(held)
        text = f"healed on {batches.told(outcome.steps * each)}: {outcome.on} {_gain(before, after, exact)}"
        patient.write(stage, f"{text}; {outcome.describe(with_loss=not plain)}")
        saved.remove()


class _Patient(Student):
    """With plain weights that are trained."""

    def __init__(self, stage: Stage, item: Heal) -> None:
        beside: frozenset[Trained] = frozenset(part for part in item.parts if part != "weights")
        super().__init__(stage, beside, stage.device)
        generator = torch.Generator().manual_seed(item.seed)
        self.weights: dict[str, FullWeight | LowRank] = {}
        for name, layer in self.parts.layers.items() if "weights" in item.parts else ():
            mask = layer.float_weight() != 0 if name in stage.pruned else None
            full = item.mode == "full"
            self.weights[name] = (
                FullWeight(layer, mask, stage.device)
                if full
                else LowRank(layer, mask, item.rank, generator, stage.device)
            )
        self.parts.weights = tuple(self.weights.values())
        self.stored: dict[str, Tensor] = {}
        if not self.groups(1.0):
            raise UsageError(f"heal: the model has nothing of {', '.join(item.parts)} to train. Name other parts.")

    def groups(self, lr: float) -> list[distill.Group]:
        return [*super().groups(lr), *(weight.group(lr) for weight in self.weights.values())]

    def round(self, stage: Stage) -> None:
        """All that was trained becomes what it will be stored as."""
        shapes = stage.model.plain_shapes
        for name, vector in self.parts.vectors.items():
            vector.copy_(vector.to(shapes[name][1]))
        self.stored = {name: weight.store() for name, weight in self.weights.items()}
        for name, bias in self.parts.biases.items():
            first = self.parts.layers[name].bias
            assert first is not None
            bias.copy_(bias.to(first.dtype))

    def write(self, stage: Stage, note: str) -> None:
        """All segments."""
        model, parts = stage.model, self.parts
        for segment in model.structure.segments:
            plain = model.plain(segment)
            layers = {name: self._layer(layer, note) for name, layer in model.layers(segment).items()}
            vectors = {name: parts.vectors[name].to("cpu", plain[name].dtype) for name in plain.keys() & parts.vectors}
            trained = self.weights.keys() | parts.biases.keys()
            skipped = dict.fromkeys((layers.keys() & stage.chosen) - trained, "nothing of what is trained is in it")
            stage.write(segment, layers, plain | vectors, skipped=skipped)

    def _layer(self, layer: Layer, note: str) -> Layer:
        if layer.name in self.stored:
            layer = replace(layer, weight=self.stored[layer.name], notes=(note,))
        if layer.name in self.parts.biases:
            assert layer.bias is not None
            bias = self.parts.biases[layer.name].to("cpu", layer.bias.dtype)
            layer = replace(layer, bias=bias, notes=(note,))
        return layer


def _losses(
    stage: Stage, item: Heal, weight: float, patient: _Patient, batches: Batches, lent: ExitStack
) -> tuple[distill.Loss, Callable[[Sequence[int]], float]]:
    """What is minimised, of one batch; and the mean divergence over some, which is what is told. Args: weight: of what
    blocks put out; lent: ends when training does."""
    task = stage.model.task
    teacher = stage.whole(stage.original).requires_grad_(False).to(stage.device)
    ours = stage.model.structure.blocks if weight else ()
    theirs = [stage.original.structure.blocks[place] for place in stage.model.origins] if weight else ()
    wanted, found = (
        lent.enter_context(watched(module, paths)) for module, paths in ((teacher, theirs), (patient.module, ours))
    )
    lent.enter_context(patient.parts.lent())

    def loss(at: int, temperature: float = item.temperature, hidden: float = weight) -> Tensor:
        wanted.clear()
        found.clear()
        batch = batches[at].to(stage.device)
        total = divergence(task, outputs(teacher, batch), patient.outputs(batch), temperature)
        return total + hidden * hidden_error(wanted, found) if hidden else total

    def judged(held: Sequence[int]) -> float:
        with torch.no_grad():
            return sum(float(loss(at, 1.0, 0.0)) for at in held) / len(held)

    return loss, judged


def _hidden_weight(stage: Stage, item: Heal) -> float:
    """Of the squared error of what blocks put out. Raises: UsageError where it was asked for and cannot be taken."""
    first, now = stage.original, stage.model
    if first.image is not None:
        return 0.0
    ours, theirs = (int(each.config.get_text_config().hidden_size) for each in (now, first))
    if item.hidden and ours != theirs:
        raise UsageError(
            f"heal: hidden compares what blocks put out, and the model's are {ours} wide and those of the original "
            f"{theirs}. Leave it out."
        )
    return float(ours == theirs) if item.hidden is None else item.hidden


def _gain(before: float, after: float, exact: float) -> str:
    """The divergence at the start, and of what is stored."""
    share = f", {100 * (1 - after / before):.0f} % regained" if before > 0 else ""
    rounded = f" ({exact:.3g} before it was rounded to the types it is stored in)" if after > 1.01 * exact else ""
    return f"divergence from the original {before:.3g} → {after:.3g}{rounded}{share}"
