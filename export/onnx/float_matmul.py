"""Layers that no pass quantized: MatMul, Conv and Gather in float32, stored in the source's dtype."""

from __future__ import annotations

import onnx_ir as ir
from torch import Tensor

from compress.export.onnx import conv as convolution
from compress.export.onnx import half
from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.lowering import TRANSFORMED, Choice, Lowering, Source
from compress.honours import Honours
from compress.hwprofiles import Runtime
from compress.layer import LayerKind, LayerSpec
from compress.target import Refusal


def choose(spec: LayerSpec, runtime: Runtime) -> Choice | Refusal | None:
    """Takes every plain weight whose input is not rounded."""
    if spec.format is not None:
        return None
    if spec.act is not None:
        return Refusal(
            f"its input is {spec.act.format}, but its weight is not quantized; quantize it, e.g. to int8(channel)"
        )
    operator = {LayerKind.EMBEDDING: "Gather", LayerKind.CONV: "Conv"}.get(spec.kind, "MatMul")
    return Choice(operator, "fast", __name__, spec.source_bytes + spec.bias_bytes)


def _weight(graph: GraphBuilder, source: Source) -> ir.Value:
    """(out, in) where an embedding shares it, else (in, out), which MatMul takes without a transpose."""
    spec = source.spec

    def read() -> Tensor:
        weight = source.read().weight
        assert isinstance(weight, Tensor)
        return weight if spec.kind is LayerKind.EMBEDDING else weight.T.contiguous()

    shape = spec.shape if spec.kind is LayerKind.EMBEDDING else spec.shape[::-1]
    return graph.float_initializer(f"{spec.name}.weight", read, spec.source_dtype, shape)


def linear(graph: GraphBuilder, source: Source, values: ir.Value) -> ir.Value:
    """values (…, in) → (…, out)."""
    weight = _weight(graph, source)
    if source.spec.kind is LayerKind.EMBEDDING:
        weight = graph.node("Transpose", [weight], {"perm": [1, 0]})
    return add_bias(graph, source, graph.node("MatMul", [values, weight]))


def gather(graph: GraphBuilder, source: Source, ids: ir.Value) -> ir.Value:
    """ids (…) → (…, features)."""
    rows = graph.node("Gather", [_weight(graph, source), ids], {"axis": 0})
    graph.nodes[-1].meta[half.TABLE] = True
    return rows


def conv(graph: GraphBuilder, source: Source, values: ir.Value, node: ir.Node) -> ir.Value:
    """values (batch, channels, h, w) → (batch, out, h', w'); node: the placeholder."""
    spec = source.spec

    def read() -> Tensor:
        weight = source.read().weight
        assert isinstance(weight, Tensor)
        return weight.reshape(convolution.weight_shape(spec))

    weight = graph.float_initializer(f"{spec.name}.weight", read, spec.source_dtype, convolution.weight_shape(spec))
    return graph.node("Conv", [values, weight, float_bias(graph, source)], convolution.attributes(node))


def float_bias(graph: GraphBuilder, source: Source) -> ir.Value | None:
    """The layer's bias (out,) as float32, None where it has none."""
    spec = source.spec
    if not spec.has_bias:
        return None

    def read() -> Tensor:
        bias = source.read().bias
        assert bias is not None
        return bias

    return graph.float_initializer(f"{spec.name}.bias", read, spec.stored_bias_dtype, [spec.shape[0]])


def add_bias(graph: GraphBuilder, source: Source, values: ir.Value) -> ir.Value:
    """Add the layer's bias, if it has one."""
    bias = float_bias(graph, source)
    return values if bias is None else graph.node("Add", [values, bias])


KINDS = frozenset(LayerKind)
LOWERS = Lowering(Honours(KINDS, pre=TRANSFORMED, bias=KINDS), linear=linear, gather=gather, conv=conv)
