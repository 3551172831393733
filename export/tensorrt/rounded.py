"""What the parser's own operator for NVFP4 inputs computes, in standard operators: for ONNX Runtime, which lacks it.

Each block of 16 features has the scale s = FP8(max |x| / 6 / d) · d, d that of the tensor; its entries become the FP4
number nearest to x / s, of two equally near the one with an even code.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compress.export.tensorrt.lowering import DYNAMIC_FP4, FP4_BLOCK, PARSER

LARGEST = 6.0


def spell_out(document: Any) -> None:
    """In place, on an ONNX document: each operator with the two DequantizeLinear behind it."""
    nodes = list(document.graph.node)
    kinds = {each.name: each.data_type for each in document.graph.initializer}
    decoders = {node.input[0]: node for node in nodes if node.op_type == "DequantizeLinear"}
    made: list[Any] = []
    gone: set[str] = set()  # what the replaced nodes put out
    for node in nodes:
        if node.domain == PARSER and node.op_type == DYNAMIC_FP4:
            inner, out = (decoders[each].output[0] for each in reversed(node.output))
            made += _rounding(node.input[0], node.input[1], out, kinds[node.input[1]])
            gone |= {inner, out}
        elif gone.isdisjoint(node.output):
            made.append(node)
    del document.graph.node[:]
    document.graph.node.extend(made)
    others = [each for each in document.opset_import if each.domain != PARSER]
    del document.opset_import[:]
    document.opset_import.extend(others)


def _rounding(values: str, scale: str, out: str, kind: int) -> list[Any]:
    """Nodes from values (…, features) to the same in type `kind`, rounded."""
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []

    def node(operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        name = name or f"{out}/{operator}_{len(nodes)}"
        nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def constant(value: Any) -> str:
        array = np.asarray(value, np.int64 if isinstance(value, list) else np.float32)
        return node("Constant", value=numpy_helper.from_array(array))

    wide, outer = (node("Cast", each, to=TensorProto.FLOAT) for each in (values, scale))
    blocks = node("Reshape", wide, constant([-1, FP4_BLOCK]))
    peak = node("ReduceMax", node("Abs", blocks), constant([1]), keepdims=1)
    raw = node("Div", node("Div", peak, constant(LARGEST)), outer)
    inner = node("Cast", node("Cast", raw, to=TensorProto.FLOAT8E4M3FN), to=TensorProto.FLOAT)
    scales = node("Mul", inner, outer)
    scales = node("Where", node("Greater", scales, constant(0.0)), scales, constant(1.0))
    scaled = node("Div", blocks, scales)
    size = node("Min", node("Abs", scaled), constant(LARGEST))
    above = node("Where", node("Less", size, constant(4.0)), constant(1.0), constant(2.0))
    step = node("Where", node("Less", size, constant(2.0)), constant(0.5), above)
    rounded = node("Mul", node("Round", node("Div", size, step)), step)
    whole = node("Mul", node("Mul", rounded, node("Sign", scaled)), scales)
    node("Cast", node("Reshape", whole, node("Shape", wide)), name=out, to=kind)
    return nodes
