"""kv_quant: keys and values are cached in few bits."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self

from pydantic import Field, model_validator

from compress.engine.kv_pass import KvPass
from compress.engine.quantizing import FormatField
from compress.errors import UsageError
from compress.formats.int_grid import IntGrid
from compress.kv.spec import Axis, KvSpec
from compress.models.model import Model


class KvQuant(KvPass):
    """Rounded keys and values. A token's are rounded once, when it is stored; tokens of the call at hand are attended
    to as they were computed. Scales come with each vector (`int8(token)`) or run of its channels (`int4(group=32)`), so
    nothing has to be calibrated; with `keys_by=channel` keys are rounded over runs of tokens of one channel, as in KIVI
    (Liu et al. 2024, arXiv 2402.02750), since keys have channels that stand out.

    Settings: `keys`, `values` formats, null for float; `keys_by` token or channel; `residual` newest tokens that stay
    in float; `float_layers` layers whose cache stays in float, by number from 0, in the model that the pass meets (the
    first one is often worth it).
    """

    name: ClassVar[str] = "kv_quant"
    fills_cache: ClassVar[str] = "what is stored"

    keys: FormatField | None = IntGrid(8, "token")
    values: FormatField | None = IntGrid(8, "token")
    keys_by: Axis = "token"
    residual: int = Field(default=0, ge=0)
    float_layers: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _check_store(self) -> Self:
        if self.keys is None and self.values is None:
            raise UsageError(
                f"{self.name}: keys=null and values=null leave all in float. Give a format, or leave it out."
            )
        self._filled(KvSpec())
        return self

    def check(self, model: Model) -> None:
        super().check(model)
        count = len(model.attentions)
        unknown = next((layer for layer in self.float_layers if not 0 <= layer < count), None)
        if unknown is not None:
            raise UsageError(
                f"{self.name}: float_layers names layer {unknown}; the model that it meets has caches 0 to {count - 1}."
            )

    def fill(self, spec: KvSpec, layer: int) -> KvSpec:
        return spec if layer in self.float_layers else self._filled(spec)

    def _filled(self, spec: KvSpec) -> KvSpec:
        keys, values = ("" if form is None else str(form) for form in (self.keys, self.values))
        return replace(spec, keys=keys, values=values, keys_by=self.keys_by, residual=self.residual)
