"""hadamard: rotate what enters a layer at run time, block by block, so that no input stands out."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field, field_validator

from compress.engine.layer_stats import LayerStats
from compress.engine.layerpass import LayerPass
from compress.engine.part import Part
from compress.errors import UsageError
from compress.layer import Layer, LayerKind, LayerSpec
from compress.maths.rotation import power_of_two
from compress.transforms import Hadamard


class HadamardInputs(LayerPass):
    """Block-Hadamard transform of the inputs at run time, its inverse folded into the weight: (W T)(x T)ᵀ = W xᵀ for an
    orthogonal T. It is the online rotation of QuaRot (arXiv 2404.00456 §4.2) for inputs that no norm or layer makes
    (of the last layer of an MLP), and of MR-GPTQ (arXiv 2509.23202) for every layer. Needs no data, and changes nothing
    but what later passes have to round; costs `block` multiplications per input at run time, `rotate` none. Targets
    that have no operator for it refuse.

    Settings: `block` inputs that are mixed, a power of two, or as many of them as divide the layer's inputs; `seed` of
    the signs, null for Hadamard's matrix without any (vLLM has a fast kernel for that).
    """

    name: ClassVar[str] = "hadamard"
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({LayerKind.LINEAR})
    part: ClassVar[Part] = Part.NONE
    rescales: ClassVar[bool] = True
    also: ClassVar[frozenset[Part]] = frozenset({Part.PRE})
    before: ClassVar[frozenset[Part]] = frozenset({Part.WEIGHT, Part.ACT})

    block: int = Field(default=128, ge=2)
    seed: int | None = 0

    @field_validator("block")
    @classmethod
    def _check_block(cls, block: int) -> int:
        if power_of_two(block) != block:
            raise ValueError("must be a power of two, such as 32 or 128")
        return block

    def plan(self, spec: LayerSpec) -> LayerSpec:
        return replace(spec, pre=(self._transform(spec.name, spec.shape[1]),))

    def layer(self, layer: Layer, stats: LayerStats) -> Layer:
        transform = self._transform(layer.name, layer.shape[1])
        weight = transform(layer.float_weight().double()).float()
        note = f"blocks of {transform.block}, the largest power of two that divides {layer.shape[1]} inputs"
        notes = (*layer.notes, note) if transform.block < self.block else layer.notes
        return replace(layer, weight=weight, pre=(transform,), notes=notes)

    def _transform(self, name: str, inputs: int) -> Hadamard:
        block = min(self.block, power_of_two(inputs))
        if block < 2:
            raise UsageError(f"{self.name}: {name} has {inputs} inputs, an odd number. Leave it out with ignore.")
        return Hadamard(block, self.seed)
