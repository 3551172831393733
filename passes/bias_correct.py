"""bias_correct: take the mean of the error that rounding makes in a layer's output out of its bias."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.engine.blockpass import Block, BlockPass, Changed, Runner
from compress.engine.layer_stats import Stat
from compress.engine.part import Part
from compress.layer import Layer, LayerKind, LayerSpec
from compress.models import placing

Means = dict[str, Tensor]


class BiasCorrect(BlockPass):
    """Empirical bias correction (Nagel et al. 2019, arXiv 1906.04721, §4.2 and appendix D; Banner et al. 2018).

    Comes after the passes that round weights and inputs. Layer by layer, in the order in which they run and with those
    before already corrected, the mean of each output channel over the calibration data is compared with that of the
    model as the stage received it, and the difference is added to the bias: what rounding weights, rounding and
    clipping inputs, and the layers before have shifted.

    Settings: `add`: a layer that has no bias gets one, in float32; otherwise it is left alone.
    """

    name: ClassVar[str] = "bias_correct"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.REFERENCE})
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({LayerKind.LINEAR, LayerKind.CONV})
    part: ClassVar[Part] = Part.BIAS
    before: ClassVar[frozenset[Part]] = frozenset({Part.TUNING})
    after: ClassVar[frozenset[Part]] = frozenset({Part.WEIGHT})
    inside: ClassVar[bool] = True
    keeps_zeros: ClassVar[bool] = True
    opaque: ClassVar[bool] = True

    add: bool = False

    def plan(self, spec: LayerSpec) -> LayerSpec:
        if spec.has_bias or not self.add:
            return spec
        return replace(spec, has_bias=True, bias_dtype=torch.float32)

    def block(self, block: Block) -> Changed:
        skipped = {name: reason for name, one in block.chosen.items() if (reason := _reason(block, name, one))}
        names = [name for name in block.chosen if name not in skipped]
        done: dict[str, Layer] = {}
        if block.runner is None or not names:
            return Changed(done, skipped=skipped)
        _put(block.runner, block.source.values())
        wanted = _means(block.runner, names, reference=True)
        skipped |= {name: "it does not run on the calibration data" for name in names if name not in wanted}
        current = dict(block.layers)
        _put(block.runner, current.values())
        for name, mean in wanted.items():  # in the order in which they first ran
            found = _means(block.runner, [name], reference=False)[name]
            done[name] = current[name] = _shifted(current[name], mean - found)
            _put(block.runner, [current[name]])
        return Changed(done, skipped=skipped)


def _reason(block: Block, name: str, one: object) -> str:
    """Why a chosen layer is left alone; empty where it is not."""
    assert isinstance(one, BiasCorrect)
    if block.runner is None:
        return f"{block.name} nothing runs layer by layer"
    if block.layers[name].bias is None and not one.add:
        return "it has no bias; add=true gives it one"
    return ""


def _shifted(layer: Layer, shift: Tensor) -> Layer:
    """The layer with (out,) added to its bias, in the bias's own dtype."""
    before = torch.zeros(layer.shape[0]) if layer.bias is None else layer.bias
    bias = (before.float() + shift).to(before.dtype)
    root = float(shift.square().mean().sqrt())
    return replace(layer, bias=bias, notes=(f"mean output was off by {root:.3g} (root of the mean square)",))


def _put(runner: Runner, layers: Iterable[Layer]) -> None:
    for layer in layers:
        placing.put_layer(runner.root, layer)


def _means(runner: Runner, names: list[str], *, reference: bool) -> Means:
    """Mean output (out,) float32 of some layers over all calibration data, with the block as it now is.

    reference: on the inputs of the uncompressed prefix, not of the compressed one. Layers that do not run are absent;
    the others come in the order in which they first ran.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(names, 0)

    def adding(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def add(module: nn.Module, _inputs: Any, output: Tensor) -> None:
            rows = output.movedim(1, -1) if isinstance(module, nn.Conv2d) else output
            rows = rows.reshape(-1, rows.shape[-1]).double()
            counts[name] += rows.shape[0]
            sums[name] = rows.sum(0) if name not in sums else sums[name] + rows.sum(0)

        return add

    hooks = [runner.root.get_submodule(name).register_forward_hook(adding(name)) for name in names]
    with torch.no_grad():
        for place in range(runner.batches):
            runner.forward(place, runner.reference(place) if reference else None)
    for hook in hooks:
        hook.remove()
    return {name: (total / counts[name]).float().cpu() for name, total in sums.items()}
