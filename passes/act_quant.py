"""act_quant: round what enters a layer, at run time, to a grid fitted to those very values or beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator

from compress.engine.layer_stats import LayerStats, Stat
from compress.engine.layerpass import LayerPass
from compress.engine.part import Part
from compress.engine.quantizing import FormatField
from compress.errors import UsageError
from compress.formats.base import ActivationFormat, Params
from compress.formats.int_grid import IntGrid
from compress.layer import ActSpec, Layer, LayerKind, LayerSpec
from compress.maths import observers
from compress.maths.histogram import Histogram

_STATIC_ONLY = ("observer", "percentile")


class ActQuant(LayerPass):
    """Activation quantization. W8A8 is `rtn` or `gptq` with `int8(channel)` and this.

    Settings: `format`; `static`: fit one grid per layer to the calibration data instead of fitting it anew at each
    call; `observer` of a static grid: `minmax` the extremes, `percentile` the range that holds `percentile` percent of
    the entries, `mse` that of least expected squared error, `entropy` that of least information lost (TensorRT's
    calibration). Ranges are those of the layer's inputs with the block as it is when this pass comes. A format with
    two levels of scales (nvfp4) takes the extremes for the tensor's; those of its blocks follow at run time.

    A convolution's static integer parameters hold a grid for its outputs too (`output_…`, asymmetric), by the same
    observer: integer convolutions put out codes, so an export target may have to round them. The model in memory does
    not. It is fitted when all passes are done, to what the finished model puts out.
    """

    name: ClassVar[str] = "act_quant"
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({LayerKind.LINEAR, LayerKind.CONV})
    part: ClassVar[Part] = Part.ACT
    before: ClassVar[frozenset[Part]] = frozenset({Part.BIAS})  # which then makes up for what rounding inputs shifts
    keeps_zeros: ClassVar[bool] = True

    format: FormatField = IntGrid(8, group="tensor", scheme="asymmetric")
    static: bool = False
    observer: observers.Observer = "mse"
    percentile: float = Field(default=99.99, gt=50, le=100)

    @model_validator(mode="after")
    def _check_format(self) -> Self:
        if not isinstance(self.format, ActivationFormat) or not self.format.rounds_activations:
            raise UsageError(
                f"act_quant: format={self.format} cannot round activations. Allowed: int8(tensor, asymmetric), "
                "int8(tensor), int8(token), int8(token, asymmetric), the same with other bits, and float formats such "
                "as fp8_e4m3(token)."
            )
        if self.static:
            self.format.fit_activation(torch.tensor(-1.0), torch.tensor(1.0))  # raises where there is no static grid
        return self

    @model_validator(mode="after")
    def _check_observer(self) -> Self:
        fields = type(self).model_fields
        given = {name for name in self.model_fields_set if getattr(self, name) != fields[name].default}
        idle = [name for name in _STATIC_ONLY if name in given] if not self.static else []
        if self.static and "percentile" in given and self.observer != "percentile":
            idle = ["percentile"]
        if idle:
            needs = "observer=percentile" if self.static else "static=true"
            raise UsageError(f"act_quant: {idle[0]} does nothing without {needs}. Add that, or leave {idle[0]} out.")
        allowed = ("minmax",) if self.format.shares_peak else ("minmax", "percentile", "mse")
        if "observer" in given and self.observer not in allowed and not isinstance(self.format, IntGrid):
            raise UsageError(
                f"act_quant: observer={self.observer} does not fit {self.format}. Allowed: {', '.join(allowed)}."
            )
        return self

    def _inherited(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """An override that makes a layer dynamic drops what only a static grid has."""
        given = super()._inherited(settings)
        dropped = _STATIC_ONLY if settings.get("static") is False else ()
        if settings.get("observer", "percentile") != "percentile":
            dropped = (*dropped, "percentile")
        return {name: value for name, value in given.items() if name not in dropped}

    @property
    def wants(self) -> frozenset[Stat]:
        static = self.static or any(settings.get("static") for settings in self.overrides.values())
        return frozenset({Stat.HISTOGRAM}) if static else frozenset()

    @property
    def fits_outputs(self) -> bool:
        return self.static and isinstance(self.format, IntGrid)

    def layer(self, layer: Layer, stats: LayerStats) -> Layer:
        if not self.static:
            return replace(layer, act=ActSpec(self.format))
        if stats.histogram is None or not bool(stats.histogram.counts.any()):
            raise UsageError(
                f"act_quant: no calibration data reached {layer.name}, so its inputs have no range. Leave it out "
                "(ignore), or round its inputs at run time (static=false)."
            )
        low, high = self._range(stats.histogram)
        act = ActSpec(self.format, True, self._fit(low, high))
        return replace(layer, act=act, notes=_notes(stats.histogram, low, high))

    def with_outputs(self, layer: Layer, outputs: Histogram) -> Layer:
        assert isinstance(self.format, IntGrid) and layer.act is not None and layer.act.params is not None
        wide = self.model_copy(update={"format": replace(self.format, scheme="asymmetric")})
        found = wide._fit(*wide._range(outputs))
        params = {**layer.act.params, **{f"output_{part}": tensor for part, tensor in found.items()}}
        return replace(layer, act=replace(layer.act, params=params))

    def plan(self, spec: LayerSpec) -> LayerSpec:
        return replace(spec, act=ActSpec(self.format, self.static))

    def _fit(self, low: float, high: float) -> Params:
        assert isinstance(self.format, ActivationFormat)
        return self.format.fit_activation(torch.tensor(low), torch.tensor(high))

    def _range(self, histogram: Histogram) -> tuple[float, float]:
        if isinstance(self.format, IntGrid):
            form = self.format
            return observers.integer_range(histogram, self.observer, form.bits, form.scheme, self.percentile)
        if self.observer == "minmax" or self.format.shares_peak:
            return observers.extremes(histogram)
        if self.observer == "percentile":
            return observers.percentile(histogram, self.percentile, symmetric=True)
        return observers.least_error(histogram, partial(self._float_error, histogram), symmetric=True)

    def _float_error(self, histogram: Histogram, low: float, high: float) -> float:
        assert isinstance(self.format, ActivationFormat)
        rounded = partial(self.format.round_static, params=self._fit(low, high))
        return observers.rounding_error(histogram, rounded)


def _notes(histogram: Histogram, low: float, high: float) -> tuple[str, ...]:
    """What the range leaves out, for the report."""
    share = observers.clipped(histogram, low, high)
    if not share:
        return ()
    least, most = observers.extremes(histogram)
    return (f"inputs from {least:.4g} to {most:.4g} clipped to {low:.4g} … {high:.4g}: {share:.2%} of them",)
