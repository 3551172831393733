"""Products of the same values as one MatMulNBits: queries, keys and values; the gate and the way up.

The kernel rounds the values once instead of three times and starts its threads once (pycoder in INT4, one thread: a
decode step 1.10 times as fast, of the portable graph 1.18; prefill alike). What comes out is the same, bit for bit.
Products with biases stay apart: ONNX Runtime has the kernel add those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from compress.export.onnx.graph import MICROSOFT, GraphBuilder
from compress.export.onnx.pattern import made_by, only_user, put_all_for, vector_sides

MOST = 3
"""Products of the same values that are joined; more are experts."""


class _Kind(NamedTuple):
    """What products that may be joined have in common: values, settings but for the width, types of stored tensors."""

    values: ir.Value
    settings: tuple[tuple[str, int], ...]
    stored: tuple[ir.DataType, ...]


def join(builder: GraphBuilder) -> None:
    """In place: one product, and a Split that hands out what the products were; GroupQueryAttention takes it whole."""
    groups: dict[_Kind, list[ir.Node]] = {}
    for node in builder.graph:
        kind = _kind(node)
        if kind is not None:
            groups.setdefault(kind, []).append(node)
    for nodes in groups.values():
        if 1 < len(nodes) <= MOST:
            _join(builder, nodes)
    for node in builder.graph:
        if node.op_type == "GroupQueryAttention" and node.domain == MICROSOFT:
            _pack(node)


def _kind(node: ir.Node) -> _Kind | None:
    if node.op_type != "MatMulNBits" or node.domain != MICROSOFT or node.inputs[0] is None:
        return None
    user = only_user(node.outputs[0])
    if user is not None and user.op_type == "Add" and vector_sides(user) is not None:
        return None
    stored = [_stored(value) for value in node.inputs[1:]]
    types = tuple(each.dtype for each in stored if each is not None)
    if len(types) < len(stored):
        return None
    settings = sorted((name, each.as_int()) for name, each in node.attributes.items() if name != "N")
    return _Kind(node.inputs[0], tuple(settings), types)


def _source(value: ir.Value | None) -> ir.Value | None:
    """What is stored of a value: itself, or what it is cast from."""
    cast = made_by(value, "Cast")
    return cast.inputs[0] if cast is not None else value


def _stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """A tensor that nothing but one product reads."""
    source = _source(value)
    if value is None or source is None or len(value.uses()) != 1 or len(source.uses()) != 1:
        return None
    return source.const_value


def _join(builder: GraphBuilder, nodes: Sequence[ir.Node]) -> None:
    first, place = nodes[0], builder.at(f"{nodes[0].name}/joined")
    sizes = [node.attributes["N"].as_int() for node in nodes]
    stored = [_concatenated(builder, [node.inputs[slot] for node in nodes]) for slot in range(1, len(first.inputs))]
    settings = {name: each.as_int() for name, each in first.attributes.items()} | {"N": sum(sizes)}
    product = place.node("MatMulNBits", [first.inputs[0], *stored], settings, domain=MICROSOFT)
    place.node("Split", [product, builder.constant(sizes)], {"axis": -1}, outputs=len(nodes))
    builder.graph.insert_before(first, place.nodes)
    for node, new in zip(nodes, place.nodes[-1].outputs, strict=True):
        put_all_for(builder.graph, node, [], [new])


def _concatenated(builder: GraphBuilder, values: Sequence[ir.Value | None]) -> ir.Value:
    """Stored tensors one below the other, made when they are written, and cast as they were."""
    sources = [source for value in values if (source := _source(value)) is not None]
    tensors = [source.const_value for source in sources if source.const_value is not None]
    name, kind = "+".join(str(source.name) for source in sources), tensors[0].dtype
    shape = [sum(int(each.shape[0]) for each in tensors), *list(tensors[0].shape)[1:]]

    def write() -> ir.Tensor:
        return ir.Tensor(np.concatenate([each.numpy() for each in tensors]), dtype=kind, name=name)

    made = GraphBuilder(builder.graph).lazy(name, write, kind, shape)
    if made_by(values[0], "Cast") is None:
        return made
    place = builder.at(name)
    cast = place.node("Cast", [made], {"to": ir.DataType.FLOAT.value})
    builder.graph.insert_before(builder.graph[0], place.nodes)
    return cast


def _pack(node: ir.Node) -> None:
    """Give GroupQueryAttention queries, keys and values as one tensor, where one was split into them."""
    query = node.inputs[0]
    split = made_by(query, "Split")
    if split is not None and list(node.inputs[:3]) == list(split.outputs):
        node.replace_input_with(0, split.inputs[0])
        node.replace_input_with(1, None)
        node.replace_input_with(2, None)
