"""Passes that give weights a format: its text, shorthands for it, and the check of a layer's shape."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, model_validator

from compress.engine.layer_stats import Stat
from compress.engine.layerpass import LayerPass, Pass
from compress.errors import UsageError
from compress.formats import parse_format
from compress.formats.base import Format
from compress.formats.int_grid import IntGrid
from compress.layer import LayerSpec
from compress.spec import Call

_SHORTHANDS = {"bits": "bits", "group_size": "group"}  # setting → field of the integer grid


def _as_format(value: Any) -> Any:
    return parse_format(value) if isinstance(value, str | Call) else value


FormatField = Annotated[Format, BeforeValidator(_as_format)]


def stored_as(name: str, form: Format, spec: LayerSpec) -> LayerSpec:
    """The layer in a format. Args: name: of the pass. Raises: UsageError where its shape does not allow that."""
    columns = spec.shape[1]
    if columns % form.step:
        raise UsageError(
            f"{name}: {form} decides {form.step} input columns together, and {spec.name} has {columns}, which "
            f"is no multiple of it. Choose another format, or one with smaller blocks, or leave the "
            f"layer out (ignore=[{spec.name}])."
        )
    try:
        form.tensor_specs(spec.shape)
    except UsageError as error:
        raise UsageError(f"{name}: layer {spec.name}: {error} Or leave it out (ignore=[{spec.name}]).") from error
    return replace(spec, format=form)


class Quantizing(Pass, ABC):
    """Settings of passes that quantize weights: `format` in its own text; `bits` and `group_size` are shorthand."""

    shares: ClassVar[bool] = False
    """Whether it learns what several layers then hold in common (`Format.holders`)."""

    format: FormatField = IntGrid(4, group=128)
    bits: int | None = None
    group_size: int | None = None

    @model_validator(mode="after")
    def _check_grid(self) -> Self:
        resolved = self.resolved_format()
        for name in _SHORTHANDS:
            value = getattr(self, name)
            if "format" in self.model_fields_set and self._shortened(self.format, {name: value}) != self.format:
                raise UsageError(
                    f"{self.name}: format={self.format} and {name}={value} contradict each other. Keep one of them, or "
                    f"write format={resolved}."
                )
        return self

    def _inherited(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What is given last counts: an override's format drops our shorthands, its shorthand changes our format."""
        given = super()._inherited(settings)
        short = {name: settings[name] for name in _SHORTHANDS if name in settings}
        if "format" in settings or (short and "format" in given):
            given = {name: value for name, value in given.items() if name not in _SHORTHANDS}
        if short and "format" in given and "format" not in settings:
            typed = self.build(short)  # checks the values before they reach the grid
            given["format"] = self._shortened(self.format, {name: getattr(typed, name) for name in short})
        return given

    @property
    def wants(self) -> frozenset[Stat]:
        found = [self, *(self.with_settings(each) for each in self.overrides.values())]
        shared = any(item.resolved_format().shares_peak for item in found)
        return self.needs | ({Stat.SHARING} if shared else set())

    def plan(self, spec: LayerSpec) -> LayerSpec:
        form = self.resolved_format()
        if not self.shares and any(count > 1 for count in form.holders.values()):
            raise UsageError(
                f"{self.name}: {form} is held by several layers in common, but each layer gets one of its own here. "
                "Leave share out, or use a pass that learns it for several layers (vptq or aqlm)."
            )
        if not self.shares and form.only_learned:
            raise UsageError(
                f"{self.name}: {form}: {' and '.join(form.only_learned)} are chosen by the inputs of a layer, which "
                "this pass does not look at. Leave them out, or use vptq or aqlm."
            )
        return stored_as(self.name, form, spec)

    def resolved_format(self) -> Format:
        """`format` with the shorthands applied."""
        return self._shortened(self.format, {name: getattr(self, name) for name in _SHORTHANDS})

    def _shortened(self, form: Format, short: Mapping[str, int | None]) -> Format:
        changes: dict[str, Any] = {_SHORTHANDS[name]: value for name, value in short.items() if value is not None}
        if changes and not isinstance(form, IntGrid):
            raise UsageError(f"{self.name}: bits and group_size are shorthand for integer formats, not {form}.")
        return replace(form, **changes) if isinstance(form, IntGrid) else form


class QuantPass(Quantizing, LayerPass, ABC):
    """A pass that quantizes each weight by itself."""
