"""Layers that are put in codebooks by hand, and the error that is left of them."""

from __future__ import annotations

import torch

from compress.engine.blockpass import Block
from compress.engine.codebook_pass import CodebookPass
from compress.engine.layer_stats import LayerStats
from compress.layer import Layer, LayerKind, LayerSpec
from compress.maths.hessian import weighted_error
from helpers.gptq_twin import inputs, moments

WIDE = 32
IN = "codebook(vector=4, entries=16, stages=2)"
OUT = "codebook(vector=4, entries=16, stages=2, out)"


def layer(name: str = "block.a", rows: int = 48, seed: int = 1) -> Layer:
    maker = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, WIDE, generator=maker) * torch.rand(1, WIDE, generator=maker).mul(3).exp()
    return Layer(name, LayerKind.LINEAR, weight, users=(name,))


def stats(seed: int = 0) -> LayerStats:
    return LayerStats(hessian=moments(inputs(400, WIDE, seed)), tokens=400)


def solved(item: CodebookPass, layers: list[Layer], known: LayerStats) -> list[Layer]:
    specs = {each.name: LayerSpec(each.name, each.kind, each.shape, each.users, segment=0) for each in layers}
    passes = {**dict.fromkeys(specs, item), **item.settle({name: (item, spec) for name, spec in specs.items()})}
    by_name = {each.name: each for each in layers}
    found = item.block(Block("block", by_name, by_name, passes, {}, dict.fromkeys(specs, known)))
    return list(found.layers.values())


def proxy(source: Layer, result: Layer, known: LayerStats) -> float:
    """The squared error of the output, as a share of the output's square."""
    assert known.hessian is not None
    weight = source.float_weight()
    return weighted_error(weight - result.float_weight(), known.hessian) / weighted_error(weight, known.hessian)
