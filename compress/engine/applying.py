"""Apply one pass, to a layer or to a block, and check what it returns."""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from dataclasses import replace

import torch
from torch import Tensor

from compress.engine.blockpass import Block, BlockPass
from compress.engine.layer_stats import LayerStats
from compress.engine.layerpass import LayerPass, Pass
from compress.engine.zeros import require_kept
from compress.errors import InputError
from compress.layer import Layer, LayerSpec
from compress.maths import products
from compress.maths.hessian import stream_error, weighted_error
from compress.records import LayerResult, OutputReference


def apply_layer(
    item: LayerPass, layer: Layer, source: Layer, stats: LayerStats, text: str
) -> tuple[Layer, LayerResult]:
    """Apply one pass to one layer.

    Args: source: the layer as the walk found it, against which errors are taken; text: the pass as it was written.
    Raises: InputError when the result is not finite.
    """
    started = time.perf_counter()
    changed = item.layer(layer, stats)
    return checked(item, layer, changed, source, stats, text, time.perf_counter() - started)


def apply_block(
    item: BlockPass, block: Block, sources: MutableMapping[str, Layer], text: str
) -> tuple[dict[str, Layer], dict[str, Tensor], list[LayerResult]]:
    """Apply a block pass. sources: its layers as the walk found them; what the pass rescaled takes their place.

    Returns: changed layers, changed plain tensors, a result per chosen or changed layer. Raises: InputError for values
    that are not finite.
    """
    started = time.perf_counter()
    found = item.block(block)
    seconds = (time.perf_counter() - started) / max(1, len(block.chosen))
    strangers = (set(found.layers) - set(block.layers)) | (set(found.plain) - set(block.plain))
    assert not strangers, f"{item.name} gave back {sorted(strangers)[0]}, which is not in {block.name}"
    layers, results = {}, []
    sources.update(found.rescaled)
    for name, layer in found.layers.items():
        stats = found.stats.get(name, block.stats.get(name, LayerStats()))
        before = found.rescaled.get(name, block.layers[name])
        layers[name], result = checked(item, before, layer, sources[name], stats, text, seconds)
        results.append(result)
    for name, tensor in found.plain.items():
        require_finite(item, tensor, name)
    for name in block.chosen:
        if name not in found.layers:
            reason = found.skipped.get(name)
            assert reason, f"{item.name} neither changed {name} nor said why"
            results.append(left(block.layers[name], text, reason))
    return layers, dict(found.plain), results


def left(layer: Layer | LayerSpec, text: str, reason: str) -> LayerResult:
    """The row in the report of a layer that a pass left as it was. Args: text: the pass as it was written."""
    return LayerResult(layer=layer.name, users=layer.users, pass_text=text, changed=False, reason=reason)


def checked(
    item: Pass, before: Layer, changed: Layer, source: Layer, stats: LayerStats, text: str, seconds: float
) -> tuple[Layer, LayerResult]:
    """A changed layer without its notes, and its row in the report. Raises: InputError where it is not finite, or
    where a pruned weight came back."""
    assert (changed.name, changed.users, changed.shape) == (before.name, before.users, before.shape), item.name
    weight = changed.float_weight()
    require_finite(item, weight, changed.name)
    require_kept(item, before.mask, weight, changed.name)
    if changed.bias is not None:
        require_finite(item, changed.bias, f"{changed.name}.bias")
    # a pass that fills no part rescales the model: what it makes is the new original
    reference = source.float_weight() if item.part else weight
    output_error, against = _output_error(weight, reference, stats)
    form = changed.format
    is_first = not item.part or before.weight is source.weight
    return replace(changed, notes=(), mask=None), LayerResult(
        layer=before.name,
        users=before.users,
        pass_text=text,
        changed=True,
        format=describe(changed),
        bits_per_weight=changed.bits_per_weight,
        error_before=0.0 if is_first else _weight_error(before.float_weight(), reference),
        error_after=_weight_error(weight, reference),
        output_error=output_error,
        output_reference=against,
        seconds=seconds,
        notes=changed.notes + (form.notes if form is not None and changed.weight is not before.weight else ()),
    )


def require_finite(item: Pass, values: Tensor, name: str) -> None:
    """Raises: InputError for NaN or infinite values."""
    if not products.all_finite(values):
        raise InputError(f"{item.name} made NaN or infinite values in {name}. The run stops here.")


def _weight_error(weight: Tensor, reference: Tensor) -> float:
    """Relative squared error of the weight."""
    return _power(weight - reference) / (_power(reference) or 1.0)


def _output_error(weight: Tensor, reference: Tensor, stats: LayerStats) -> tuple[float | None, OutputReference]:
    """Relative squared error of the layer's output where its inputs are known, and what it is taken against: what the
    reference weight puts out in the reference stream where there is one, else on the same inputs."""
    if stats.hessian is None or stats.hessian.shape[-1] != weight.shape[1]:
        return None, ""
    with products.fast():
        if stats.cross is not None and stats.drift is not None:
            error, whole = stream_error(weight, reference, stats.hessian, stats.cross, stats.drift)
            return error / (whole or 1.0), "reference stream"
        whole = weighted_error(reference, stats.hessian) or 1.0
        return weighted_error(weight - reference, stats.hessian) / whole, "same inputs"


def _power(tensor: Tensor) -> float:
    """Sum of squares, added up in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def describe(layer: Layer | LayerSpec) -> str:
    """`int4(group=32)`, `float16`, `int8(channel) with int8(tensor, asymmetric) inputs`; transforms come first."""
    if layer.format is not None:
        text = str(layer.format)
    elif isinstance(layer, Layer):
        assert isinstance(layer.weight, Tensor)
        text = str(layer.weight.dtype).removeprefix("torch.")
    else:
        text = str(layer.source_dtype).removeprefix("torch.")
    inputs = [*map(str, layer.pre), *([str(layer.act)] if layer.act else [])]
    return f"{text} with {' then '.join(inputs)} inputs" if inputs else text
