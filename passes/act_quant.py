"""act_quant: round what enters a layer, at run time, to a grid fitted to those very values."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self

from pydantic import model_validator

from compress.collect import LayerStats
from compress.errors import UsageError
from compress.formats.base import ActivationFormat
from compress.formats.int_grid import IntGrid
from compress.layer import ActSpec, Layer, LayerKind, LayerSpec
from compress.layerpass import FormatField, LayerPass


class ActQuant(LayerPass):
    """Dynamic activation quantization. W8A8 is `rtn` or `gptq` with `int8(channel)` and this.

    Settings: `format` with granularity `tensor` (one grid per call) or `token` (one per vector).
    """

    name: ClassVar[str] = "act_quant"
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({LayerKind.LINEAR})
    part: ClassVar[str] = "act"

    format: FormatField = IntGrid(8, group="tensor", scheme="asymmetric")

    @model_validator(mode="after")
    def _check_format(self) -> Self:
        fits = isinstance(self.format, ActivationFormat) and getattr(self.format, "group", "") in ("tensor", "token")
        if not fits:
            raise UsageError(
                f"act_quant: format={self.format} cannot round activations. Allowed: int8(tensor, asymmetric), "
                "int8(tensor), int8(token), int8(token, asymmetric), and the same with other bits."
            )
        return self

    def layer(self, layer: Layer, stats: LayerStats) -> Layer:
        return replace(layer, act=ActSpec(self.format))

    def plan(self, spec: LayerSpec) -> LayerSpec:
        return replace(spec, act=ActSpec(self.format))
