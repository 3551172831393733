"""A model that a pass over the whole of it trains, from its stage and back to it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from compress.engine.modelpass import Stage
from compress.training import distill
from compress.training.objective import outputs
from compress.training.parts import Continuous, Trained, vectors_of


class Student:
    """The compressed model in memory, with what is trained in place of what is stored.

    Args: parts: what is trained of the layers that the pass is for (`Continuous`); device: of the modules, vectors and
    biases.
    """

    def __init__(self, stage: Stage, parts: frozenset[Trained], device: str = "cpu") -> None:
        model = stage.model
        self.module = stage.whole().to(device)
        layers = {name: layer for s in model.structure.segments for name, layer in model.layers(s).items()}
        chosen = {name: layers[name] for name in stage.chosen}
        names = [name for segment in model.structure.segments for name in model.structure.plain[segment]]
        self.parts = Continuous(self.module, chosen, vectors_of(self.module, names), parts)
        self.parts.biases = {name: bias.to(device) for name, bias in self.parts.biases.items()}

    def groups(self, lr: float) -> list[distill.Group]:
        """What is trained; see `Continuous.groups`."""
        return self.parts.groups(lr)

    def outputs(self, batch: Tensor) -> Tensor:
        """The model's output, with gradients."""
        self.parts.lend_weights()
        return outputs(self.module, batch)

    def told(self) -> str:
        """What more the report's notes say of all layers."""
        return ""

    def write(self, stage: Stage, note: str) -> None:
        """All segments of the tuned model."""
        model, parts = stage.model, self.parts
        for segment in model.structure.segments:
            plain = model.plain(segment)
            layers = {
                name: replace(parts.layer(layer), notes=parts.notes(name, note)) if name in stage.chosen else layer
                for name, layer in model.layers(segment).items()
            }
            untrained = (set(layers) & set(stage.chosen)) - parts.trained
            skipped = dict.fromkeys(untrained, "nothing of what is trained is in it")
            norms = {name: parts.vectors.get(name, tensor) for name, tensor in plain.items()}
            stage.write(segment, layers, norms, skipped=skipped)
