"""Weights that a pass has pruned stay zero: checked before the work starts, and after every pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from compress.engine.layerpass import Pass
from compress.engine.quantizing import Quantizing
from compress.errors import InputError, UsageError
from compress.layer import Layer


def pruner(before: Iterable[Pass]) -> Pass | None:
    """The pass among those before that prunes a layer."""
    return next((item for item in before if item.prunes), None)


def check_kept(item: Pass, before: Iterable[Pass], name: str) -> None:
    """Args: item: with its overrides for a layer; before: the passes that treat the layer before it. Raises: UsageError
    where it would change what one of them pruned."""
    first = pruner(before)
    if first is None:
        return
    if not item.keeps_zeros:
        raise UsageError(
            f"{item.name} would not keep at zero what {first.name} prunes of layer {name}: the weights that it makes "
            "are other ones. Leave one of the two out for this layer (ignore), or quantize with rtn or gptq."
        )
    if isinstance(item, Quantizing) and not item.resolved_format().holds_zero:
        raise UsageError(
            f"{item.name}: {item.resolved_format()} cannot store zero exactly, and {first.name} prunes layer {name}. "
            "Choose a format with a zero: an integer grid with symmetric or asymmetric scheme, a float format, nf4."
        )


def with_mask(layer: Layer) -> Layer:
    """A pruned layer with the mask of what is left of it."""
    return replace(layer, mask=layer.float_weight() != 0)


def require_kept(item: Pass, mask: Tensor | None, weight: Tensor, name: str) -> None:
    """Args: mask (out, in) of the layer before, None where nothing was pruned; weight (out, in) float32 as it now is.
    Raises: InputError where a pruned weight came back."""
    if mask is None:
        return
    changed = int(weight.masked_fill(mask, 0.0).count_nonzero())
    if changed:
        raise InputError(f"{item.name} gave {changed} weights of {name} a value that were pruned. The run stops here.")
