"""How sparse a finished model is, measured on its final weights, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from compress.engine.layerpass import Pass
from compress.engine.matching import Resolution
from compress.engine.prune_pass import Pruning
from compress.models.model import Model
from compress.records.sparsity import LayerSparsity, Sparsity


def measured(model: Model, resolution: Resolution) -> Sparsity | None:
    """The zeros of the layers that a pass prunes; None where none does. resolution: that the model was made by."""
    pruners = {name: _last(item for _, item in found) for name, found in resolution.passes.items()}
    layers = tuple(
        _layer(model, name, item)
        for name, item in pruners.items()
        if item is not None and name in model.structure.layers
    )
    model.release()
    return (
        Sparsity(layers=layers, weights=sum(prod(s.shape) for s in model.structure.layers.values())) if layers else None
    )


def _last(passes: Iterable[Pass]) -> Pass | None:
    """The last pass that prunes a layer: pruned again after training, it has what was asked last."""
    return next((item for item in reversed(list(passes)) if item.prunes), None)


def _layer(model: Model, name: str, item: Pass) -> LayerSparsity:
    weight = model.layer(model.structure.layers[name]).float_weight()
    found = LayerSparsity(layer=name, weights=weight.numel(), zeros=weight.numel() - int(weight.count_nonzero()))
    if not isinstance(item, Pruning):
        return found
    pattern = item.parsed()
    asked = pattern.fixed or item.sparsity
    least, most = item.bounds
    unit = 1 / pattern.rivals((weight.shape[0], weight.shape[1])) if most > least else 0.0  # what rounding may take
    changes = {"pattern": str(pattern), "asked": asked, "met": pattern.held(weight, max(least - unit, 0.0))}
    return found.model_copy(update=changes)
