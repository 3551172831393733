"""Products in float16 or bfloat16, all else in float32: casts around the MatMul, Gemm and Conv of a float32 graph.

TensorRT computes in the types that the graph says. Norms, softmax and rotary angles stay in float32, where float16
would overflow or lose positions, and bfloat16 would lose more; the cache goes in and out in the type of products.
"""

from __future__ import annotations

import onnx_ir as ir

from compress.export.onnx.pattern import put_for

PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})
FLOAT = ir.DataType.FLOAT
KINDS = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
"""By the name that profiles have for them."""


def halve(graph: ir.Graph, kind: ir.DataType) -> None:
    """In place. kind: of products. A product of vectors (rotary's angles by positions) becomes a Mul, in float32: it
    needs no unit for products, and chips of SM 75 have none for float32."""
    casts: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.op_type not in PRODUCTS or node.domain or not _reads_floats(node):
            continue
        if node.op_type == "MatMul" and _is_outer(node):
            put_for(graph, node, ir.node("Mul", list(node.inputs), name=f"{node.name}/Mul"))
            continue
        for place, value in enumerate(node.inputs):
            if value is not None and value.dtype is FLOAT:
                if value not in casts:
                    casts[value] = _cast_before(graph, node, value, kind)
                node.replace_input_with(place, casts[value])
        _cast_after(graph, node, kind)


def halve_cache(graph: ir.Graph, kind: ir.DataType) -> None:
    """The cache's inputs and outputs in that type."""
    first = next(iter(graph))
    for value in graph.inputs:
        if value.name is not None and value.name.startswith("past_key_values."):
            uses = [(use.node, use.idx) for use in value.uses()]
            value.type = ir.TensorType(kind)
            wide = _cast_before(graph, first, value, FLOAT)
            for node, place in uses:
                node.replace_input_with(place, wide)
    for place, value in enumerate(graph.outputs):
        if value.name is not None and value.name.startswith("present."):
            producer = value.producer()
            assert producer is not None
            name, value.name = value.name, f"{value.name}/float"
            cast = _cast_node(value, kind, name)
            graph.insert_after(producer, cast)
            cast.outputs[0].shape = value.shape
            graph.outputs[place] = cast.outputs[0]


def _reads_floats(node: ir.Node) -> bool:
    """Whether it is a product of float32 that is none of a quantized layer's, which chose its type."""
    given = [value for value in node.inputs if value is not None]
    made = [value.producer() for value in given]
    quantized = any(producer is not None and producer.op_type == "DequantizeLinear" for producer in made)
    return not quantized and any(value.dtype is FLOAT for value in given)


def _is_outer(node: ir.Node) -> bool:
    """Whether the inner dimension is 1, of operands that both have a batch and two axes."""
    first, second = (None if value is None else value.shape for value in node.inputs)
    if first is None or second is None or min(len(first), len(second)) < 2:
        return False
    return bool(first[-1] == 1 or second[-2] == 1)


def _cast_node(value: ir.Value, kind: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": kind.value}, name=f"{name}/Cast")
    node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(kind)
    return node


def _cast_before(graph: ir.Graph, place: ir.Node, value: ir.Value, kind: ir.DataType) -> ir.Value:
    """A cast right behind the value's producer, or where it is read if it has none."""
    node, producer = _cast_node(value, kind, f"{value.name}/{kind.name.lower()}"), value.producer()
    if producer is None:
        graph.insert_before(next(iter(graph)) if value.is_initializer() else place, node)
    else:
        graph.insert_after(producer, node)
    node.outputs[0].shape = value.shape
    return node.outputs[0]


def _cast_after(graph: ir.Graph, node: ir.Node, kind: ir.DataType) -> None:
    """The node's output takes that type, and a cast behind it takes its place."""
    value = node.outputs[0]
    uses = [(use.node, use.idx) for use in value.uses()]
    places = [place for place, output in enumerate(graph.outputs) if output is value]
    name, value.name, value.type = value.name, f"{value.name}/half", ir.TensorType(kind)
    cast = _cast_node(value, FLOAT, str(name))
    cast.outputs[0].shape = value.shape
    graph.insert_after(node, cast)
    for user, place in uses:
        user.replace_input_with(place, cast.outputs[0])
    for place in places:
        graph.outputs[place] = cast.outputs[0]
