"""How a layer will be stored, before there are values: its shape held against a format."""

from __future__ import annotations

from dataclasses import replace

from compress.errors import UsageError
from compress.formats.base import Format
from compress.layer import LayerSpec


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
