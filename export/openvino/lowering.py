"""A layer in standard ONNX operators with its weight left open: an input `weight::NAME`, for which `weights` puts the
real one into OpenVINO's graph, (out, in) as its kernels have it, in the type that it is stored in.

Static inputs are QuantizeLinear and DequantizeLinear, which OpenVINO reads as FakeQuantize.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from compress.export.onnx import conv as convolution
from compress.export.onnx.float_matmul import add_bias, float_bias
from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.lowering import TRANSFORMED, Lowering, Source
from compress.export.onnx.qdq_edges import grid_constants
from compress.honours import Honours
from compress.layer import LayerKind

WEIGHT = "weight::"


def linear(graph: GraphBuilder, source: Source, values: ir.Value) -> ir.Value:
    """values (…, in) → (…, out)."""
    weight = graph.node("Transpose", [_weight(graph, source, source.spec.shape)], {"perm": [1, 0]})
    return add_bias(graph, source, graph.node("MatMul", [_input(graph, source, values), weight]))


def gather(graph: GraphBuilder, source: Source, ids: ir.Value) -> ir.Value:
    """ids (…) → (…, features)."""
    return graph.node("Gather", [_weight(graph, source, source.spec.shape), ids], {"axis": 0})


def conv(graph: GraphBuilder, source: Source, values: ir.Value, node: ir.Node) -> ir.Value:
    """values (batch, channels, h, w) → (batch, out, h', w'); node: the placeholder."""
    weight = _weight(graph, source, convolution.weight_shape(source.spec))
    inputs = [_input(graph, source, values), weight, float_bias(graph, source)]
    return graph.node("Conv", inputs, convolution.attributes(node))


def _weight(graph: GraphBuilder, source: Source, shape: Sequence[int]) -> ir.Value:
    """The open weight; one for all users of a tied one."""
    name = f"{WEIGHT}{source.spec.name}"
    key = ("open", name)
    if key not in graph.shared:
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(list(shape)))
        graph.graph.inputs.append(value)
        graph.shared[key] = value
    return graph.shared[key]


def _input(graph: GraphBuilder, source: Source, values: ir.Value) -> ir.Value:
    """values, on the layer's grid if it has one; layers that read one tensor on one grid share the nodes."""
    if source.spec.act is None:
        return values
    act = source.read().act
    assert act is not None and act.params is not None
    zero = act.params.get("zero")
    grid = grid_constants(graph, float(act.params["scale"]), 128 if zero is None else int(zero))
    key = ("rounded", values, *grid)
    if key not in graph.shared:
        codes = graph.node("QuantizeLinear", [values, *grid], dtype=ir.DataType.UINT8)
        graph.shared[key] = graph.node("DequantizeLinear", [codes, *grid])
    return graph.shared[key]


KINDS = frozenset(LayerKind) - {LayerKind.EXPERT}
LOWERS = Lowering(
    Honours(KINDS, act=KINDS - {LayerKind.EMBEDDING}, pre=TRANSFORMED, bias=KINDS),
    linear=linear,
    gather=gather,
    conv=conv,
)
