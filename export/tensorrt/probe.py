"""A graph of one layer, for asking the builder what it takes on a chip."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch

from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.lowering import Source
from compress.export.tensorrt.half import KINDS, halve
from compress.export.tensorrt.rules import EngineChoice, choose
from compress.export.tensorrt.target import seal
from compress.formats.base import ActivationFormat
from compress.hwprofiles import Profile, Runtime
from compress.layer import ActSpec, Layer, LayerKind, LayerSpec

INPUT, IMAGE, BATCH = "values", 8, 16


def random_layer(spec: LayerSpec, seed: int = 0) -> Layer:
    """Random weights in the spec's format, and a static grid of ±3 where it rounds its inputs."""
    weight = torch.randn(spec.shape, generator=torch.Generator().manual_seed(seed)) * spec.shape[1] ** -0.5
    layer = Layer(spec.name, spec.kind, weight, users=spec.users, groups=spec.groups)
    if spec.format is None:
        return layer
    params, act = spec.format.fit(weight), spec.act
    codes, _ = spec.format.quantize(weight, params, torch.arange(spec.shape[1]))
    if act is not None:
        assert isinstance(act.format, ActivationFormat)
        act = ActSpec(act.format, act.static, act.format.fit_activation(torch.tensor(-3.0), torch.tensor(3.0)))
    packed = spec.format.pack(codes, params, spec.shape)
    return Layer(spec.name, spec.kind, packed, act=act, users=spec.users, groups=spec.groups)


def choice_of(spec: LayerSpec, profile: Profile) -> EngineChoice:
    """How a layer is lowered, whatever the rules say of its inputs: to ask the builder itself."""
    found = choose(spec, profile)
    if not isinstance(found, EngineChoice):
        found = choose(replace(spec, act=None), profile)
    assert isinstance(found, EngineChoice), found
    return found


def one_layer(spec: LayerSpec, choice: EngineChoice, runtime: Runtime) -> tuple[ir.Model, dict[str, Any]]:
    """The graph of a random layer, (batch, in) → (batch, out), images of 8x8 or ids (batch,); its input's ranges."""
    table = spec.kind is LayerKind.EMBEDDING
    inner = [spec.shape[1]] if spec.kernel is None else [spec.kernel[0] * spec.groups, IMAGE, IMAGE]
    inner = [] if table else inner
    kind = ir.TensorType(ir.DataType.INT64 if table else ir.DataType.FLOAT)
    value = ir.Value(name=INPUT, type=kind, shape=ir.Shape(["batch", *inner]))
    graph = ir.Graph([value], [], nodes=[], name="one_layer")
    builder = GraphBuilder(graph, spec.name)
    source = Source(spec, choice, lambda: random_layer(spec))
    if spec.kind is LayerKind.CONV:
        assert spec.kernel is not None
        sides = [size // 2 for size in spec.kernel[1:]]
        attributes = {"kernel": list(spec.kernel[1:]), "strides": [1, 1], "pads": [*sides, *sides]}
        node = ir.node("Conv", [value], {**attributes, "dilations": [1, 1], "group": spec.groups})
        out = choice.lowers.write(builder, source, value, node)
        node.replace_input_with(0, None)  # it was only there to be read
    else:
        node = ir.node("Embedding" if table else "Linear", [value])
        out = choice.lowers.write(builder, source, value, node)
        node.replace_input_with(0, None)
    graph.extend(builder.nodes)
    out.shape = ir.Shape(["batch", spec.shape[1 if table else 0], *inner[1:]])
    graph.outputs.append(out)
    document = ir.Model(graph, ir_version=runtime.ir_version)
    if runtime.float_dtype in KINDS:
        halve(graph, KINDS[runtime.float_dtype])
    seal(document, runtime)
    shapes = {"whole": {INPUT: [[rows, *inner] for rows in (1, 1, BATCH)]}}
    return document, shapes
