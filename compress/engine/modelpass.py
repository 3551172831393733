"""Passes that need the whole model: rotations, tuning by the model's own loss. Each is a stage of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from compress.engine import segment_files
from compress.engine.applying import checked, left, require_finite
from compress.engine.layer_stats import LayerStats
from compress.engine.layerpass import Pass
from compress.engine.originals import Sources
from compress.engine.zeros import with_mask
from compress.inputs.datasets import Calibration
from compress.layer import Layer
from compress.models import placing
from compress.models.edits import Shape, former_names, reshaped
from compress.models.model import Model
from compress.progress import Progress
from compress.records import LayerResult


@dataclass
class Stage:
    """What a whole-model pass works on and writes to.

    model: as the stage received it; original: the uncompressed source; chosen: the layers that the pass is for, each
    with its settings; calibration: None where the pass needs no data; folder: where `write` puts the segments;
    sources: the layers before any stage lost something of them, against which errors are taken; pruned: layers whose
    zeros must stay; config: changes of config.json that go with the new weights; made: the model of another shape that
    the pass leaves, without weights.
    """

    item: Pass
    model: Model
    original: Model
    chosen: Mapping[str, Pass]
    calibration: Calibration | None
    folder: Path
    device: str
    progress: Progress
    sources: Sources
    pruned: frozenset[str] = frozenset()
    config: dict[str, Any] = field(default_factory=dict)
    results: list[LayerResult] = field(default_factory=list)
    written: set[int] = field(default_factory=set)
    made: Model | None = None

    def whole(self, model: Model | None = None) -> nn.Module:
        """All weights of a model (by default the stage's) in memory, decoded to float32; for passes that declare it."""
        return placing.whole_module(model or self.model)

    def write(
        self,
        segment: int,
        layers: Mapping[str, Layer],
        plain: Mapping[str, Tensor],
        seconds: float = 0.0,
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        """Write one segment, all of its layers and plain tensors.

        Args: skipped: chosen layers that are as they were, with why.
        Raises: InputError for values that are not finite.
        """
        skipped, done, sources = skipped or {}, dict(layers), dict[str, Layer]()
        for name, layer in layers.items():
            if name in skipped:
                self.results.append(left(layer, str(self.item), skipped[name]))
                sources[name] = self.sources.of(layer)
            elif name in self.chosen:
                before = self.model.layer(self.model.structure.layers[name])
                source = sources[name] = self.sources.of(before)
                before = with_mask(before) if name in self.pruned else before
                done[name], result = checked(self.item, before, layer, source, LayerStats(), str(self.item), seconds)
                self.results.append(result)
        self.sources.keep(segment, sources)
        segment_files.write_segment(self.folder, segment, done, plain)
        self.written.add(segment)

    def reshape(self, shape: Shape) -> Model:
        """The pass has decided: what the model will be. Returns: it, without weights; its segments are then `put`."""
        self.made = reshaped(self.model, shape)
        self.config |= shape.config
        return self.made

    def taken(self, segment: int) -> tuple[dict[str, Layer], dict[str, Tensor]]:
        """What a segment of the model of another shape is made of: the layers and plain tensors that are still there,
        by their new names, as they were."""
        assert self.made is not None, f"{self.item.name} did not say what it makes (Stage.reshape)"
        made, before = self.made.structure, self.model.structure
        former = former_names(made.blocks_path, self.model.origins, self.made.origins)
        layers = {
            spec.name: replace(self.model.layer(before.layers[former(spec.name)]), name=spec.name, users=spec.users)
            for spec in made.segment_layers(segment)
        }
        names = {former(name): name for name in made.plain[segment]}
        return layers, {names[name]: tensor for name, tensor in self.model.reader.plain(names).items()}

    def put(self, segment: int, layers: Mapping[str, Layer], plain: Mapping[str, Tensor]) -> None:
        """Write one segment of the model of another shape, by its own names.

        Raises: InputError for values that are not finite.
        """
        assert self.made is not None, f"{self.item.name} did not say what it makes (Stage.reshape)"
        wanted = {spec.name: spec.shape for spec in self.made.structure.segment_layers(segment)}
        assert {name: layer.shape for name, layer in layers.items()} == wanted, f"{self.item.name}: segment {segment}"
        assert set(plain) == set(self.made.structure.plain[segment]), f"{self.item.name}: segment {segment}"
        for layer in layers.values():
            require_finite(self.item, layer.float_weight(), layer.name)
        segment_files.write_segment(self.folder, segment, layers, plain)
        self.written.add(segment)


class ModelPass(Pass, ABC):
    """A pass that works on the whole model at once."""

    opaque: ClassVar[bool] = False

    @abstractmethod
    def apply(self, stage: Stage) -> None:
        """Write every segment of the changed model through `stage.write`."""
