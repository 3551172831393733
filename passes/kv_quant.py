"""kv_quant: keys and values are cached in few bits."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self

from pydantic import Field, model_validator

from compress.engine.kv_pass import KvPass
from compress.engine.quantizing import FormatField
from compress.formats.int_grid import IntGrid
from compress.kv.spec import Axis, KvSpec


class KvQuant(KvPass):
    """Rounded keys and values. A token's are rounded once, when it is stored; tokens of the call at hand are attended
    to as they were computed. Scales come with each vector (`int8(token)`) or run of its channels (`int4(group=32)`), so
    nothing has to be calibrated; with `keys_by=channel` keys are rounded over runs of tokens of one channel, as in KIVI
    (Liu et al. 2024, arXiv 2402.02750), since keys have channels that stand out.

    Settings: `keys`, `values` formats, null for float; `keys_by` token or channel; `residual` newest tokens that stay
    in float; `float_layers` layers whose cache stays in float, by number (the first one is often worth it).
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
        self.fill(KvSpec(), -1)
        return self

    def fill(self, spec: KvSpec, layer: int) -> KvSpec:
        if layer in self.float_layers:
            return spec
        keys, values = ("" if form is None else str(form) for form in (self.keys, self.values))
        return replace(spec, keys=keys, values=values, keys_by=self.keys_by, residual=self.residual)
