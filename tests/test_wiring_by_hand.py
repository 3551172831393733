"""Folding in blocks written by hand: what a scale passes, what refuses it, and the maths against slow twins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from compress.engine.blockpass import Block
from compress.engine.layer_stats import LayerStats
from compress.errors import UsageError
from compress.formats import parse_format
from compress.layer import ActSpec, Layer, LayerKind
from compress.passes.rtn import Rtn
from compress.passes.smoothquant import SmoothQuant
from compress.wiring.foldable import Wiring, wire
from compress.wiring.folding import Folding, agreed, fold, rescaled_stats
from helpers.blocks import block_of


class Norm(nn.Module):
    """RMS over the last axis, times a weight, perhaps through something else."""

    def __init__(self, width: int, after: Callable[[torch.Tensor], torch.Tensor] = lambda values: values) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.after = after

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = self.after(
            values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-6) * self.weight
        )
        return scaled


class Other(nn.Module):
    """Reads its input with a weight of three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values @ self.weight[0]


class Hand(nn.Module):
    """norm → first → act → second, with a residual; `extra` adds what an architecture might."""

    def __init__(
        self,
        act: Callable[[torch.Tensor], torch.Tensor] = torch.relu,
        extra: Callable[[Hand, torch.Tensor], torch.Tensor] | None = None,
        after: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = Norm(8, after)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)
        self.other = Other()
        self.act, self.extra = act, extra

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden)
        result = hidden + self.second(self.act(self.first(normed)))
        return result if self.extra is None else result + self.extra(self, normed)


@dataclass
class HandRunner:
    """A hand-made block as a block pass sees it."""

    module: nn.Module
    root: nn.Module
    batches: int = 1

    def inputs(self, place: int) -> torch.Tensor:
        return torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(place))

    def targets(self, place: int) -> torch.Tensor:
        return self.forward(place)

    def forward(self, place: int, hidden: torch.Tensor | None = None) -> torch.Tensor:
        result: torch.Tensor = self.module(self.inputs(place) if hidden is None else hidden)
        return result


def by_hand(module: Hand, **changes: Layer) -> Block:
    """The block `b` of a tree that holds only it; changes: layers by their last name."""
    root = nn.ModuleDict({"b": module.requires_grad_(False)})
    layers = {
        f"b.{key}": Layer(f"b.{key}", LayerKind.LINEAR, child.weight.clone(), child.bias.clone(), users=(f"b.{key}",))
        for key, child in (("first", module.first), ("second", module.second))
    }
    layers |= {f"b.{key}": layer for key, layer in changes.items()}
    plain = {key: value.clone() for key, value in root.state_dict().items() if key.rpartition(".")[0] not in layers}
    return block_of("b", layers, plain, HandRunner(module, root))


def producers(wiring: Wiring) -> list[str]:
    return [folding.producer for folding in wiring.foldings]


def test_a_scale_passes_relu_but_no_smooth_activation() -> None:
    assert producers(wire(by_hand(Hand()), pairs=True)) == ["b.norm", "b.first"]
    assert producers(wire(by_hand(Hand(nn.functional.gelu)), pairs=True)) == ["b.norm"]


def test_a_channel_that_is_never_on_is_left_alone() -> None:
    module = Hand()
    module.first.bias.data[3] = -1e3  # ReLU keeps it at 0
    folding = wire(by_hand(module), pairs=True).foldings[1]
    assert folding.rows.tolist() == [0, 1, 2, -1, *range(4, 12)]
    scale = torch.full((12,), 4.0)
    assert folding.spread(folding.only_used(scale)).tolist() == [4.0] * 3 + [1.0] + [4.0] * 8


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (lambda _, normed: normed, "b.norm puts out goes elsewhere too"),
        (lambda _, normed: torch.tanh(normed.clone()), "b.norm puts out goes elsewhere too"),
        (lambda self, normed: normed @ self.norm.weight.diag(), "b.norm puts out goes elsewhere too"),
        (lambda self, normed: self.other(normed), "also feeds b.other, which has no weight to scale"),
    ],
)
def test_a_norm_with_another_reader_is_refused(extra: Any, sentence: str) -> None:
    wiring = wire(by_hand(Hand(extra=extra)), pairs=True)
    assert producers(wiring) == ["b.first"]
    assert sentence in wiring.refused["b.first"]


def test_a_norm_that_is_no_gain_is_refused() -> None:
    wiring = wire(by_hand(Hand(after=torch.tanh)), pairs=False)
    assert not wiring.foldings and "b.norm, which feeds it, is no gain per channel" in wiring.refused["b.first"]


def test_layers_that_are_quantized_rounded_or_shared_are_not_rescaled() -> None:
    block = by_hand(Hand())
    first = block.layers["b.first"]
    form = parse_format("int8(channel)")
    quantized = Rtn(format=form).layer(first, LayerStats())
    rounded = replace(first, act=ActSpec(parse_format("int8(token)")))
    shared = replace(first, users=("b.first", "b.elsewhere"))
    sentences = ("b.first, which would have to be rescaled too, is quantized", "input of b.first", "with b.elsewhere")
    for layer, sentence in zip((quantized, rounded, shared), sentences, strict=True):
        wiring = wire(by_hand(Hand(), first=layer), pairs=False)
        assert not wiring.foldings and sentence in wiring.refused["b.first"]
    assert producers(wire(by_hand(Hand(), first=quantized), pairs=True)) == []  # its rows cannot take a scale either


def test_outside_the_blocks_nothing_is_folded() -> None:
    block = replace(by_hand(Hand()), name="outside the blocks", runner=None)
    assert wire(block, pairs=True) == Wiring((), dict.fromkeys(block.layers, "outside the blocks nothing is folded"))


def test_folding_equals_its_slow_twin() -> None:
    block = by_hand(Hand())
    maker = torch.Generator().manual_seed(2)
    scale = torch.rand(12, generator=maker) + 0.5
    rows = torch.tensor([0, 1, 1, -1, *range(4, 12)])
    layers, plain = fold(Folding("b.first", ("b.second",), (), 12, rows), scale, block.layers, block.plain)
    used = {int(row) for row in rows if row >= 0}
    for row in range(12):
        by = float(scale[row]) if row in used else 1.0
        torch.testing.assert_close(
            layers["b.first"].float_weight()[row], block.layers["b.first"].float_weight()[row] / by
        )
        bias = block.layers["b.first"].bias
        assert bias is not None and layers["b.first"].bias is not None
        torch.testing.assert_close(layers["b.first"].bias[row], bias[row] / by)
    for column in range(12):
        by = float(scale[rows[column]]) if rows[column] >= 0 else 1.0
        expected = block.layers["b.second"].float_weight()[:, column] * by
        torch.testing.assert_close(layers["b.second"].float_weight()[:, column], expected)
    assert not plain


def test_gathering_takes_what_the_inputs_of_a_channel_have_in_common() -> None:
    folding = Folding("p", ("c",), (), 3, torch.tensor([0, 0, 2, -1]))
    values = torch.tensor([1.0, 3.0, 5.0, 9.0])
    assert folding.gather(values, "amax").tolist() == [3.0, 0.0, 5.0]
    assert folding.gather(values, "mean").tolist() == [2.0, 0.0, 5.0]


def test_rescaled_statistics_are_those_of_rescaled_inputs() -> None:
    maker = torch.Generator().manual_seed(3)
    inputs, columns = torch.randn(50, 6, generator=maker), torch.rand(6, generator=maker) + 0.5

    def stats(values: torch.Tensor) -> LayerStats:
        return LayerStats(
            hessian=values.T @ values / 50,
            abs_mean=values.abs().mean(0),
            abs_max=values.abs().amax(0),
            tokens=len(values),
        )

    found, expected = rescaled_stats(stats(inputs), columns), stats(inputs / columns)
    for key in ("hessian", "abs_mean", "abs_max"):
        torch.testing.assert_close(getattr(found, key), getattr(expected, key))
    assert found.tokens == 50 and found.cross is None


def test_layers_that_share_a_scale_must_agree_on_its_settings() -> None:
    folding = Folding("norm", ("q", "k", "v"), (), 2, torch.arange(2))
    chosen = {"q": SmoothQuant(alpha=0.5), "k": SmoothQuant(alpha=0.8)}
    block = block_of("b", {}, {}, None, chosen)
    with pytest.raises(UsageError, match=r"q alpha=0\.5 and k alpha=0\.8, but norm feeds both"):
        agreed(block, folding, ("alpha",))
    assert agreed(block, folding, ("folds",)) is chosen["q"]
    assert agreed(block, Folding("norm", ("v",), (), 2, torch.arange(2)), ("alpha",)) is None
