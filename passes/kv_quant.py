"""kv_quant: keys and values are cached in few bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor

from compress.engine.kv_pass import KvPass, Observed, Settled
from compress.engine.quantizing import FormatField
from compress.errors import UsageError
from compress.formats.int_grid import IntGrid
from compress.kv import calibrating
from compress.kv.calibrating import Lost, Ranges
from compress.kv.spec import Axis, KvSpec, check_size
from compress.kv.static import has_static
from compress.models.model import Model

_LOST = "lost"


class KvQuant(KvPass):
    """Rounded keys and values. A token's are rounded once, when it is stored; tokens of the call at hand are attended
    to as they were computed. Scales come with each vector (`int8(token)`) or run of its channels (`int4(group=32)`), so
    nothing has to be calibrated; with `keys_by=channel` keys are rounded over runs of tokens of one channel, as in KIVI
    (Liu et al. 2024, arXiv 2402.02750), since keys have channels that stand out. With `static` all tokens share the
    scales of a format by `channel`, `head` or `tensor`, which calibration data give.

    Settings: `keys`, `values` formats, null for float; `keys_by` token or channel; `residual` newest tokens that stay
    in float; `float_layers` layers whose cache stays in float, by number from 0, in the model that the pass meets (the
    first one is often worth it); `static`: how the range of static scales is chosen, `minmax` the largest magnitude,
    `percentile` what holds `percentile` percent of them, `mse` what the codes lose least on; `envelope`: whether keys
    count by the length of their rotary pairs, which stays the same at every position; `rotated`: whether vectors are
    turned by a Hadamard matrix before they are rounded, which spreads channels that stand out; `sensitive`: how many
    layers, those whose attention outputs are furthest off on calibration data, are stored as `fallback` says instead, a
    format by token, null for float.
    """

    name: ClassVar[str] = "kv_quant"
    fills_cache: ClassVar[str] = "what is stored"

    keys: FormatField | None = IntGrid(8, "token")
    values: FormatField | None = IntGrid(8, "token")
    keys_by: Axis = "token"
    residual: int = Field(default=0, ge=0)
    float_layers: tuple[int, ...] = ()
    static: calibrating.Method | None = None
    percentile: float = Field(default=99.99, gt=50, le=100)
    envelope: bool = True
    rotated: bool = False
    sensitive: int = Field(default=0, ge=0)
    fallback: FormatField | None = None

    @model_validator(mode="after")
    def _check_store(self) -> Self:
        if self.keys is None and self.values is None:
            raise UsageError(
                f"{self.name}: keys=null and values=null leave all in float. Give a format, or leave it out."
            )
        self._check_static()
        if self.fallback is not None and not self.sensitive:
            raise UsageError(f"{self.name}: fallback does nothing without sensitive. Add sensitive=1, or leave it out.")
        if self.fallback is not None and has_static(str(self.fallback)):
            raise UsageError(
                f"{self.name}: fallback={self.fallback} is not by token. Give int8(token), or null for float."
            )
        self._spared(self._filled(KvSpec()))
        return self

    def _check_static(self) -> None:
        if self.static is None:
            shared = next(
                (form for form in (self.keys, self.values) if form is not None and has_static(str(form))), None
            )
            if shared is not None:
                raise UsageError(
                    f"{self.name}: {shared}: tokens would share a scale, but they come one by one. Let data give it "
                    "(static=percentile, mse or minmax), or take int8(token)."
                )
        idle = next((name for name in ("percentile", "envelope") if self._is_idle(name)), None)
        if idle is not None:
            needs = "static=percentile" if idle == "percentile" else "static scales of keys"
            raise UsageError(f"{self.name}: {idle} does nothing without {needs}. Add that, or leave {idle} out.")

    def _is_idle(self, name: str) -> bool:
        if getattr(self, name) == type(self).model_fields[name].default:
            return False
        by_pairs = self.keys is not None and has_static(str(self.keys)) and self.keys_by == "token"
        needed = self.static == "percentile" if name == "percentile" else self.static is not None and by_pairs
        return not needed

    def check(self, model: Model) -> None:
        super().check(model)
        count = len(model.attentions)
        unknown = next((layer for layer in self.float_layers if not 0 <= layer < count), None)
        if unknown is not None:
            raise UsageError(
                f"{self.name}: float_layers names layer {unknown}; the model that it meets has caches 0 to {count - 1}."
            )
        for attention in set(model.attentions):
            check_size(self._filled(KvSpec()), attention.size)
        left = count - len(set(self.float_layers))
        if self.sensitive and self.sensitive >= left:
            raise UsageError(
                f"{self.name}: sensitive={self.sensitive} spares all of the {left} caches that are rounded. Give less, "
                "or leave the pass out."
            )

    def fill(self, spec: KvSpec, layer: int) -> KvSpec:
        return spec if layer in self.float_layers else self._filled(spec)

    def _filled(self, spec: KvSpec) -> KvSpec:
        keys, values = ("" if form is None else str(form) for form in (self.keys, self.values))
        return replace(
            spec,
            keys=keys,
            values=values,
            keys_by=self.keys_by,
            residual=self.residual,
            static=self.static is not None,
            rotated=self.rotated,
        )

    @property
    def counts_layers(self) -> bool:
        return self.sensitive > 0

    @property
    def measures(self) -> bool:
        return self.static is not None or self.sensitive > 0

    def _spared(self, spec: KvSpec) -> KvSpec:
        """The cache of a layer that is too sensitive for what the others have."""
        text = "" if self.fallback is None else str(self.fallback)
        plain = replace(spec, keys="", values="", keys_by="token", residual=0, static=False, rotated=False)
        if not text:
            return plain
        keys, values = (text if stored else "" for stored in (spec.keys, spec.values))
        return replace(plain, keys=keys, values=values, residual=self.residual, rotated=self.rotated)

    def alternatives(self, spec: KvSpec) -> tuple[KvSpec, ...]:
        return (self._spared(spec),) if self.sensitive else ()

    def observe(self, spec: KvSpec, layer: int, seen: Observed) -> dict[str, Tensor]:
        if not (spec.keys or spec.values):  # one of float_layers, whose number may be another by now
            return {}
        found = {}
        if self.static is not None:
            found = calibrating.scales(spec, seen, Ranges(self.static, self.percentile, self.envelope))
        return {**found, _LOST: calibrating.lost(spec, found, seen).as_tensor()}

    def conclude(self, caches: Sequence[KvSpec], found: Sequence[Mapping[str, Tensor]]) -> Sequence[Settled]:
        lost = {layer: Lost(*taken[_LOST].tolist()) for layer, taken in enumerate(found) if _LOST in taken}
        spared = sorted(lost, key=lambda layer: lost[layer].output, reverse=True)[: self.sensitive]
        settled = []
        for layer, (spec, taken) in enumerate(zip(caches, found, strict=True)):
            notes = (lost[layer].told(self._how),) if layer in lost else ()
            if layer in spared:
                rank = spared.index(layer) + 1
                told = f"so it is stored otherwise: of {len(lost)} layers the error of its outputs is number {rank}"
                settled.append(Settled(self._spared(spec), {}, (*notes, told)))
            else:
                settled.append(Settled(spec, {name: taken[name] for name in spec.scale_tensors}, notes))
        return settled

    @property
    def _how(self) -> str:
        """What the errors are of."""
        return f"{self.keys or 'float'} keys and {self.values or 'float'} values"
