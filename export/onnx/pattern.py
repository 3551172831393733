"""What the rewrites of a graph ask about the surroundings of a value, never by names; and the one edit they make."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir


def made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    """The node of a standard operator that makes a value; None where something else does."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator and not node.domain else None


def only_user(value: ir.Value) -> ir.Node | None:
    """The node that alone reads a value, once, and that no output of the graph is."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def number(value: ir.Value | None) -> float | None:
    """A constant of one element."""
    tensor = value.const_value if value is not None else None
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None


def last_size(value: ir.Value | None) -> int | None:
    """The last axis of a value, where it is known and fixed."""
    shape = value.shape if value is not None else None
    size = shape[-1] if shape is not None and len(shape) else None
    return size if isinstance(size, int) else None


def sides(node: ir.Node | None) -> tuple[tuple[ir.Value, ir.Value], ...]:
    """The inputs of an operator with two, in both orders; nothing where there is no such operator."""
    if node is None or len(node.inputs) != 2:
        return ()
    first, second = node.inputs
    return ((first, second), (second, first)) if first is not None and second is not None else ()


def other_side(node: ir.Node, value: ir.Value | None) -> ir.Value | None:
    """Of an operator with two inputs, the one that is not `value`."""
    first, second = node.inputs
    return second if first is value else first if second is value else None


def side_with(node: ir.Node, constant: float, *, near: float = 0.0) -> ir.Value | None:
    """Of an operator with two inputs, one of which is this number up to a relative `near`, the other one."""
    for side, rest in (tuple(node.inputs), tuple(reversed(node.inputs))):
        found = number(side)
        if found is not None and abs(found - constant) <= near * abs(constant):
            return rest
    return None


def vector_length(value: ir.Value | None) -> int | None:
    """The length of a stored vector, or of one that is made of stored ones alone: cast, or shifted by a number."""
    if value is None:
        return None
    if value.const_value is not None:
        shape = value.const_value.shape
        return int(shape[0]) if len(shape) == 1 else None
    node = value.producer()
    if node is None or node.domain or node.op_type not in ("Cast", "Add"):
        return None
    rest = [each for each in node.inputs if node.op_type == "Cast" or number(each) is None]
    return vector_length(rest[0]) if len(rest) == 1 else None


def vector_sides(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Of an operator with two inputs, the tensor and the stored vector that is as long as the tensor's last axis."""
    for values, vector in (tuple(node.inputs), tuple(reversed(node.inputs))):
        length = vector_length(vector)
        if length is not None and values is not None and vector is not None and width(values) == length:
            return values, vector
    return None


def width(value: ir.Value) -> int | None:
    """The last axis of a value, or where it is a product that was given no shape, what its weight says."""
    product = value.producer()
    if value.shape is not None or product is None:
        return last_size(value)
    if "N" in product.attributes:  # MatMulNBits, MatMulBnb4
        return int(product.attributes["N"].as_int())
    return last_size(product.inputs[1]) if made_by(value, "MatMul") is not None else None


def put_for(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put a node for another that computes the same; the outputs keep their names, shapes and types."""
    put_all_for(graph, old, [new], new.outputs)


def put_all_for(graph: ir.Graph, old: ir.Node, nodes: Sequence[ir.Node], values: Sequence[ir.Value]) -> None:
    """The same of several nodes, which make `values`, one for each of the old node's outputs."""
    graph.insert_before(old, nodes)
    for before, after in zip(old.outputs, values, strict=True):
        name, after.shape, after.type = before.name, before.shape, before.type
        before.replace_all_uses_with(after, replace_graph_outputs=True)
        before.name, after.name = None, name
    graph.remove(old, safe=True)
