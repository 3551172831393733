"""Where float values are left between convolutions with static 8-bit inputs, in the form that ONNX Runtime fuses.

It makes one QLinearConv of DequantizeLinear → Conv → QuantizeLinear, one QLinearAdd of two DequantizeLinear → Add →
QuantizeLinear, and drops a Relu before a QuantizeLinear whose zero point is 0. So a convolution needs a QuantizeLinear
behind it, and a residual addition needs all three; without them it computes in float32 on weights that it decodes at
each call, slower than no quantization (1.31.1, ResNet-20 of 32x32 images, one thread: 0.8 times float32's speed; with
rounded outputs 1.7 times, with rounded additions 2 times).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compress.export.onnx.graph import GraphBuilder


@dataclass(frozen=True)
class Output:
    """What a convolution puts out, and the grid that it may be rounded to."""

    value: ir.Value
    scale: float
    zero: int


def close(builder: GraphBuilder) -> None:
    """Round what convolutions put out, unless what follows rounds it anyway, and the other side of residual
    additions."""
    outputs = [made for made in builder.shared.values() if isinstance(made, Output)]
    known = {output.value for output in outputs}
    for node in list(builder.graph):
        if node.op_type == "Add" and not known.isdisjoint(node.inputs):
            _round_residual(builder.graph, node, known)
    for output in outputs:
        if _quantizer(output.value) is None:
            _round(builder, output)


def grid_constants(builder: GraphBuilder, scale: float, zero: int) -> tuple[ir.Value, ir.Value]:
    """A uint8 grid as the inputs of QuantizeLinear and DequantizeLinear."""
    return builder.constant(scale, np.float32), builder.constant(zero, np.uint8)


def _quantizer(value: ir.Value) -> ir.Node | None:
    """The one QuantizeLinear that reads a value, directly or behind a Relu that rounding makes superfluous, if nothing
    else reads it. Additions do not count: their turn comes (see `_round_residual`)."""
    readers = [use.node for use in value.uses() if use.node.op_type != "Add"]
    if len(readers) != 1 or value.is_graph_output():
        return None
    if readers[0].op_type == "QuantizeLinear":
        return readers[0]
    if readers[0].op_type != "Relu" or len(list(value.uses())) > 1:
        return None
    behind = _quantizer(readers[0].outputs[0])
    return behind if behind is not None and _zero_point(behind) == 0 else None


def _zero_point(quantizer: ir.Node) -> int:
    zero = quantizer.inputs[2]
    assert zero is not None and zero.const_value is not None
    return int(zero.const_value.numpy())


def _round_residual(graph: ir.Graph, addition: ir.Node, convolutions: set[ir.Value]) -> None:
    """Let an addition read the rounded values, where its other side is a convolution's output or rounded too."""
    sides = [side for side in addition.inputs if side is not None]
    rounded = [_quantizer(side) for side in sides]
    if any(quantizer is None and side not in convolutions for side, quantizer in zip(sides, rounded, strict=True)):
        return
    for place, quantizer in enumerate(rounded):
        if quantizer is not None:
            back = _node(graph, addition, "DequantizeLinear", [quantizer.outputs[0], *quantizer.inputs[1:]], place)
            addition.replace_input_with(place, back.outputs[0])


def _round(builder: GraphBuilder, output: Output) -> None:
    made = output.value.producer()
    assert made is not None
    uses = [(use.node, use.idx) for use in output.value.uses()]
    grid = grid_constants(builder, output.scale, output.zero)
    to = _node(builder.graph, made, "QuantizeLinear", [output.value, *grid], 0, after=True)
    back = _node(builder.graph, to, "DequantizeLinear", [to.outputs[0], *grid], 0, after=True)
    for node, place in uses:
        node.replace_input_with(place, back.outputs[0])


def _node(
    graph: ir.Graph, at: ir.Node, operator: str, inputs: list[ir.Value | None], place: int, *, after: bool = False
) -> ir.Node:
    node = ir.node(operator, inputs, name=f"{at.name}/{operator}_{place}")
    kind = ir.DataType.UINT8 if operator == "QuantizeLinear" else ir.DataType.FLOAT
    node.outputs[0].name, node.outputs[0].type = f"{node.name}:0", ir.TensorType(kind)
    if after:
        graph.insert_after(at, node)
    else:
        graph.insert_before(at, node)
    return node
