"""Batch normalisation folded into the convolution before it.

At inference a BatchNorm is an affine map per channel, so γ (conv(x) − μ) / √(σ² + ε) + β is a convolution with weight
W γ / √(σ² + ε) and bias β + (b − μ) γ / √(σ² + ε) (Jacob et al. 2018, arXiv 1712.05877, §3.2). Which pairs may be
folded is seen on a forward pass, never by names, and held against the module's own output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4
"""Largest change of an output, as a share of the largest output, that float32 rounding may make."""

Pair = tuple[str, str]
"""Module paths of a convolution and of the normalisation after it."""


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """One call of a submodule: its first input and what it returned."""

    name: str
    module: nn.Module
    inputs: Any
    output: Any


def record(module: nn.Module, images: Tensor) -> tuple[list[ModuleCall], Any]:
    """Every call of a submodule while the module runs, in order of return, and the module's output."""
    calls: list[ModuleCall] = []

    def watch(name: str) -> Any:
        def hook(child: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls.append(ModuleCall(name, child, inputs[0] if inputs else None, output))

        return hook

    handles = [child.register_forward_hook(watch(name)) for name, child in module.named_modules() if name]
    try:
        with torch.no_grad():
            return calls, module(images)
    finally:
        for handle in handles:
            handle.remove()


def candidates(calls: Sequence[ModuleCall]) -> list[Pair]:
    """Convolutions whose very output a normalisation takes, each called once."""
    often = Counter(call.name for call in calls)
    made = {id(call.output): call.name for call in calls if isinstance(call.module, nn.Conv2d)}
    return [
        (made[id(call.inputs)], call.name)
        for call in calls
        if _is_affine(call.module)
        and id(call.inputs) in made
        and often[call.name] == 1
        and often[made[id(call.inputs)]] == 1
    ]


def _is_affine(module: nn.Module) -> bool:
    return type(module) is nn.BatchNorm2d and module.running_mean is not None and not module.training


def fold_all(module: nn.Module, pairs: Sequence[Pair], images: Tensor, expected: Tensor) -> tuple[list[Pair], float]:
    """Fold in place every pair that leaves the output as it was: at once, else one by one.

    Args: images: a batch that the module takes; expected: its output for them.
    Returns: the folded pairs; the largest change of the output as a share of the largest output.
    """
    undo = [fold(module, *pair) for pair in pairs]
    change = _change(module, images, expected)
    if change <= TOLERANCE:
        return list(pairs), change
    for pair, saved in reversed(list(zip(pairs, undo, strict=True))):
        _restore(module, pair, saved)
    kept, largest = [], 0.0
    for pair in pairs:
        saved = fold(module, *pair)
        change = _change(module, images, expected)
        if change <= TOLERANCE:
            kept.append(pair)
            largest = change
        else:
            _restore(module, pair, saved)
    return kept, largest


Saved = tuple[Tensor | None, Tensor | None, nn.Module]


def fold(module: nn.Module, conv: str, norm: str) -> Saved:
    """Fold one pair in place, in float64; gives what it replaced."""
    layer, after = module.get_submodule(conv), module.get_submodule(norm)
    assert isinstance(layer, nn.Conv2d) and isinstance(after, nn.BatchNorm2d)
    assert after.running_mean is not None and after.running_var is not None
    before: Saved = (layer._parameters["weight"], layer._parameters["bias"], after)
    factor = torch.rsqrt(after.running_var.double() + after.eps)
    factor = factor if after.weight is None else factor * after.weight.double()
    shift = -after.running_mean.double() if layer.bias is None else layer.bias.double() - after.running_mean.double()
    bias = shift * factor if after.bias is None else shift * factor + after.bias.double()
    weight = (layer.weight.double() * factor[:, None, None, None]).float()
    layer.weight, layer.bias = _parameter(weight), _parameter(bias.float())
    module.set_submodule(norm, nn.Identity())
    return before


def fold_shapes(module: nn.Module, pairs: Iterable[Pair]) -> None:
    """Change the module tree as folding does, without values: for one whose weights come later."""
    for conv, norm in pairs:
        layer = module.get_submodule(conv)
        assert isinstance(layer, nn.Conv2d)
        layer._parameters["bias"] = _parameter(torch.zeros(layer.out_channels))
        module.set_submodule(norm, nn.Identity())


def _restore(module: nn.Module, pair: Pair, saved: Saved) -> None:
    layer = module.get_submodule(pair[0])
    layer._parameters["weight"], layer._parameters["bias"] = saved[:2]  # type: ignore[assignment]
    module.set_submodule(pair[1], saved[2])


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _change(module: nn.Module, images: Tensor, expected: Tensor) -> float:
    """Infinite where a module without its normalisation no longer runs: the file reads it in another way too."""
    try:
        with torch.no_grad():
            found = module(images)
    except Exception:  # the user's code, of which anything can come; then this is no pair to fold
        return float("inf")
    change = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    return change if change == change else float("inf")
