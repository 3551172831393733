"""Passes that leave a model of another shape: fewer blocks, narrower layers. They cut a recipe into sections.

What comes after one is laid over the model that it leaves, by that model's own names. Which blocks go may be known only
once data were seen, so the pass says beforehand what any such choice comes to (`shape`), and `plan` lays the rest over
that.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from pydantic import model_validator

from compress.engine.layerpass import Pass
from compress.engine.matching import Resolution, resolve
from compress.engine.modelpass import ModelPass
from compress.engine.part import Part
from compress.errors import UsageError
from compress.layer import LayerSpec
from compress.models.edits import Shape, reshaped
from compress.models.model import Model


class ReshapePass(ModelPass):
    """A pass that changes the shape of a model.

    `apply` decides, tells the stage (`Stage.reshape`), and puts every segment of the new model (`Stage.put`); a
    `LayerResult` for each module that is gone or of another size, by its old name, goes to `stage.results`. It has no
    targets: it treats the model as a whole. Nothing of a layer may be filled yet when it comes, since formats, masks
    and grids belong to a shape.
    """

    part: ClassVar[Part] = Part.NONE
    per_layer: ClassVar[bool] = False
    opaque: ClassVar[bool] = False
    reshapes: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check_patterns(self) -> Self:
        if self.targets or self.ignore or self.overrides:
            raise UsageError(
                f"{self.name} changes the shape of the model, so it takes no targets, ignore or overrides."
            )
        return self

    def plan(self, spec: LayerSpec) -> LayerSpec:
        return spec

    @property
    def undecided(self) -> str:
        """What only data decide, and what the plan takes meanwhile; empty where nothing is open."""
        return ""

    @abstractmethod
    def shape(self, model: Model) -> Shape:
        """What it will leave, as far as is known without data: the sizes are right, which blocks go may be another
        choice. Raises: UsageError, UnsupportedError for what cannot be done with this model."""


@dataclass(frozen=True)
class Section:
    """Passes between two changes of shape, the second included, laid over the model that they meet.

    places: of the passes in the pipeline; model: what they meet, without weights where it is not the source.
    """

    places: range
    model: Model
    resolution: Resolution


def check_order(passes: Sequence[Pass]) -> None:
    """Raises: UsageError for a pass before a change of shape that fills a part of a layer."""
    for place, item in enumerate(passes):
        filling = next((each for each in passes[:place] if each.fills()), None)
        if item.reshapes and filling is not None:
            raise UsageError(
                f"{item.name} changes the shape of the model, so it comes before {filling.name}, which decides about "
                "layers as they are. Put it first."
            )


def places_of(passes: Sequence[Pass]) -> list[range]:
    """The passes of each section, by their places; the last may have none."""
    ends = [place + 1 for place, item in enumerate(passes) if item.reshapes]
    return [range(start, stop) for start, stop in zip([0, *ends], [*ends, len(passes)], strict=True)]


def section(passes: Sequence[Pass], places: range, model: Model) -> Section:
    """One section over the model that it meets. Raises: UsageError, UnsupportedError."""
    for place in places:
        passes[place].check(model)
    return Section(places, model, resolve(passes, model.structure, places))


def lay(passes: Sequence[Pass], model: Model) -> list[Section]:
    """All sections, as far as is known without data. Raises: UsageError, UnsupportedError."""
    check_order(passes)
    found: list[Section] = []
    for places in places_of(passes):
        if found:
            last = passes[places.start - 1]
            assert isinstance(last, ReshapePass)
            model = reshaped(model, last.shape(model))
        found.append(section(passes, places, model))
    return found
