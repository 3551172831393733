"""adaquant: per layer, learn weight, bias and grids by what the layer puts out, one layer after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.engine.blockpass import Block, BlockPass, Changed, Runner
from compress.engine.layer_stats import Stat
from compress.engine.part import Part
from compress.errors import UsageError
from compress.formats.int_grid import IntGrid
from compress.layer import Layer, LayerKind, LayerSpec
from compress.models import placing
from compress.training import distill
from compress.training.soft import SoftInput, SoftRounding
from compress.training.trainable import lend, lending
from compress.transforms import transformed


class AdaQuant(BlockPass):
    """AdaQuant (Hubara et al. 2020, arXiv 2006.10518): layer-wise optimisation on calibration data, sequentially.

    It refines layers that another pass has put on an integer grid, in the order in which they run: `rtn,
    act_quant(static=true), adaquant`. Per layer, with inputs from the quantized layers before it, the squared error of
    its output against the float model's is minimised over the weights (through the rounding), the bias, the scales,
    and a static input grid. Where the paper tunes batch norms afterwards, every channel's scale and bias are learned
    here already: norms are folded into convolutions when an image model is loaded. A layer without a bias gets one
    where `bias` is set.

    Settings: `steps`; `batch` images or windows per step; `lr` of the weights in steps of their grid, `lr_scale` of all
    scales (relative), `lr_bias` relative to the output's spread; `bias` also learns biases; `seed`.
    """

    name: ClassVar[str] = "adaquant"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.REFERENCE})
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({LayerKind.LINEAR, LayerKind.CONV})
    part: ClassVar[Part] = Part.ROUNDING
    before: ClassVar[frozenset[Part]] = frozenset({Part.TUNING})
    after: ClassVar[frozenset[Part]] = frozenset({Part.WEIGHT})
    inside: ClassVar[bool] = True

    steps: int = Field(default=400, ge=1)
    batch: int = Field(default=32, ge=1)
    lr: float = Field(default=0.01, gt=0, le=1)
    lr_scale: float = Field(default=1e-3, gt=0, le=1)
    lr_bias: float = Field(default=1e-3, gt=0, le=1)
    bias: bool = True
    seed: int = 0

    @property
    def trained_copies(self) -> float:
        return 15.0

    @property
    def trained_batches(self) -> int:
        return self.steps  # each of a part of one

    def plan(self, spec: LayerSpec) -> LayerSpec:
        if not isinstance(spec.format, IntGrid):
            raise UsageError(
                f"adaquant: layer {spec.name} is {spec.format or 'not quantized'}, but it learns on integer grids "
                "only. Put rtn or gptq with an int format before it, or leave the layer out with ignore."
            )
        return replace(spec, has_bias=True, bias_dtype=torch.float32) if self.bias else spec

    def block(self, block: Block) -> Changed:
        runner, current = block.runner, dict(block.layers)
        assert runner is not None
        done: dict[str, Layer] = {}
        skipped: dict[str, str] = {}
        for name in _in_order(runner, [name for name in block.layers if name in block.chosen]):
            wanted = [output for _, output in _observe(runner, block.source.values(), name, reference=True)]
            given = [values for values, _ in _observe(runner, current.values(), name, reference=False)]
            if not wanted:
                skipped[name] = "it does not run on the calibration data"
                continue
            item = block.chosen[name]
            assert isinstance(item, AdaQuant)
            done[name] = current[name] = item._learn(runner, current[name], block.source[name], given, wanted)
        return Changed(done, skipped=skipped)

    def _learn(
        self, runner: Runner, layer: Layer, source: Layer, given: Sequence[Tensor], wanted: Sequence[Tensor]
    ) -> Layer:
        """One layer, by its inputs (before they are rounded) and the outputs wanted of it, batch by batch."""
        one = _Trained(runner, layer, source, self.bias, wanted)
        groups = [distill.Group([one.soft.offset], self.lr), distill.Group(one.grids, self.lr_scale)]
        if one.bias is not None:
            groups.append(distill.Group([one.bias], self.lr_bias * one.spread))
        pairs = [pair for x, y in zip(given, wanted, strict=True) for pair in _pieces(x, y, self.batch)]
        train, held = distill.split(len(pairs))
        with lending(runner.root, [layer]):
            outcome = distill.fit(
                groups, lambda at: one.loss(*pairs[at]), train, held, distill.Budget(self.steps), seed=self.seed
            )
        return replace(one.rounded(), notes=(f"layer learned: {outcome.describe()}",))


class _Trained:
    """A layer while it learns."""

    def __init__(self, runner: Runner, layer: Layer, source: Layer, bias: bool, wanted: Sequence[Tensor]) -> None:
        self.layer, self.root = layer, runner.root
        self.module = runner.root.get_submodule(layer.name)
        self.soft = SoftRounding(layer, source.float_weight())
        static = layer.act is not None and layer.act.static and isinstance(layer.act.format, IntGrid)
        self.input = SoftInput(layer.act) if static and layer.act is not None else None
        # a layer whose output never varies has nothing to share: then the error counts as it is
        self.spread = float(torch.cat([part.reshape(-1) for part in wanted]).std()) or 1.0
        self.bias = None
        if bias:
            self.bias = torch.zeros(layer.shape[0]) if layer.bias is None else layer.bias.float().clone()

    @property
    def grids(self) -> list[Tensor]:
        """Logarithms and factors of scales."""
        return [self.soft.factor] + ([self.input.log_scale] if self.input is not None else [])

    def loss(self, values: Tensor, wanted: Tensor) -> Tensor:
        """Mean squared error of the output, as a share of its spread."""
        values = transformed(self.layer.pre, values)
        if self.input is not None:
            values = self.input.round(values)
        elif self.layer.act is not None:
            values = self.layer.act.round(values)
        lend(self.root, self.layer, self.soft.weight(), self.bias)
        output: Tensor = self.module.forward(values)
        return (output - wanted).square().mean() / self.spread**2

    def rounded(self) -> Layer:
        """The layer as it now is."""
        layer = self.soft.rounded()
        act = self.input.rounded() if self.input is not None else layer.act
        return replace(layer, act=act, bias=layer.bias if self.bias is None else self.bias)


def _pieces(values: Tensor, wanted: Tensor, batch: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(torch.split(values, batch), torch.split(wanted, batch), strict=True))


def _in_order(runner: Runner, names: Sequence[str]) -> list[str]:
    """Layers in the order in which they run; those that do not run come last."""
    order: list[str] = []

    def noting(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _module, _inputs: order.append(name)

    hooks = [runner.root.get_submodule(name).register_forward_pre_hook(noting(name)) for name in names]
    with torch.no_grad():
        runner.forward(0)
    for hook in hooks:
        hook.remove()
    return [*dict.fromkeys(order), *(name for name in names if name not in order)]


Pairs = list[tuple[Tensor, Tensor]]


def _observe(runner: Runner, layers: Iterable[Layer], name: str, *, reference: bool) -> Pairs:
    """What enters a layer (before it is rounded) and leaves it, batch by batch, with the block's layers as given.

    reference: on the inputs of the uncompressed prefix, not of the compressed one.
    """
    for layer in layers:
        placing.put_layer(runner.root, layer)
    seen: list[Tensor] = []
    pairs: Pairs = []
    child = runner.root.get_submodule(name)
    before = child.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]), prepend=True)
    after = child.register_forward_hook(lambda _module, _inputs, output: pairs.append((seen.pop(), output)))
    with torch.no_grad():
        for place in range(runner.batches):
            runner.forward(place, runner.reference(place) if reference else None)
    before.remove()
    after.remove()
    return pairs
