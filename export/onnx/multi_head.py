"""An encoder's attention as com.microsoft MultiHeadAttention.

Its CPU kernel has a tiled path for calls without any mask, which never holds all scores and takes three quarters of the
masked one's time (1.31.1, 16 rows of 128 tokens, 12 heads of 32, one thread: 5.4 ms against 7.0). Both are in the
graph, and an If picks by the mask it is given: batches without padding take the tiled one.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from compress.export.onnx import attention as portable
from compress.export.onnx.attention import MASKED, dim, float_of, int_of
from compress.export.onnx.graph import MICROSOFT, GraphBuilder
from compress.export.onnx.pattern import made_by, only_user, vector_sides

HEADS_FIRST = [0, 2, 1, 3]


def attention(graph: GraphBuilder, node: ir.Node, ids: ir.Value, mask: ir.Value) -> list[ir.Value]:
    """Replace an Attention placeholder: values for each of its outputs, in order.

    Taken are attentions without a cache, a soft cap or grouped heads, whose queries, keys and values come straight
    from (batch, s, heads · d); others are lowered as `attention.attention` does. ids (batch, s); mask (batch, s).
    """
    split = [flat(value) for value in node.inputs[:3]]
    query, key, value = split
    grouped = dim(node.inputs[0], 1) != dim(node.inputs[1], 1)
    if len(node.inputs) != 3 or grouped or float_of(node, "softcap") or query is None or key is None or value is None:
        return portable.attention(graph, node, ids, mask)
    heads, size = dim(node.inputs[0], 1), dim(node.inputs[2], 3)
    inputs = _with_bias(graph, query, key, value)
    before, after = int_of(node, "before"), int_of(node, "after")
    attributes: dict[str, Any] = {"num_heads": heads, "scale": float_of(node, "scale"), "mask_filter_value": MASKED}
    if before < 0 and after < 0:
        out = _by_padding(graph, inputs, attributes, mask)
    else:
        limits = portable.mask_bias(graph, ids, mask, before=before, after=after)
        out = graph.node("MultiHeadAttention", [*inputs, None, limits], attributes, domain=MICROSOFT)
    return [graph.node("Reshape", [out, graph.constant([0, 0, heads, size])])]


def flat(value: ir.Value | None) -> ir.Value | None:
    """(batch, heads, s, d) → the (batch, s, heads · d) it was split from, None where it was made in another way."""
    turn = made_by(value, "Transpose")
    if turn is None or list(turn.attributes["perm"].as_ints()) != HEADS_FIRST:
        return None
    split = made_by(turn.inputs[0], "Reshape")
    found = split.inputs[0] if split is not None else None
    apart = turn.inputs[0].shape if turn.inputs[0] is not None else None
    if found is None or found.shape is None or apart is None or len(found.shape) != 3 or len(apart) != 4:
        return None
    same = all(str(one) == str(other) for one, other in zip(list(found.shape)[:2], list(apart)[:2], strict=True))
    return found if same and found.shape[2] == dim(value, 1) * dim(value, 3) else None


def _with_bias(graph: GraphBuilder, *values: ir.Value) -> list[ir.Value | None]:
    """The three tensors and their biases in one, which the operator adds while it copies; None where one has none."""
    sides = [_bias(value) for value in values]
    found = [side for side in sides if side is not None]
    if len(found) < len(values):
        return [*values, None]
    joined = graph.node("Concat", [bias for _, bias in found], {"axis": 0})
    return [*(plain for plain, _ in found), joined]


def _bias(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """An addition's tensor and its bias (features,), where nothing else reads the sum."""
    addition = made_by(value, "Add")
    return None if addition is None or only_user(value) is None else vector_sides(addition)


def _by_padding(
    graph: GraphBuilder, inputs: list[ir.Value | None], attributes: dict[str, Any], mask: ir.Value
) -> ir.Value:
    """One operator for batches with padding and one for those without."""
    seen, whole = _padding(graph, mask)
    branches = {}
    for name, more in (("then_branch", []), ("else_branch", [seen])):
        inner = ir.node("MultiHeadAttention", [*inputs, *more], attributes, domain=MICROSOFT)
        inner.name = f"{graph.prefix}/{name}"
        out = inner.outputs[0]
        out.name, out.type = f"{inner.name}:0", ir.TensorType(ir.DataType.FLOAT)
        branches[name] = ir.Graph([], [out], nodes=[inner], name=inner.name)
    return graph.node("If", [whole], branches)


def _padding(graph: GraphBuilder, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The mask (batch, s) in int32, and whether it lets every token be seen () bool; made once."""
    key = ("padding", mask.name)
    if key not in graph.shared:
        integer = ir.DataType.INT32
        seen = graph.node("Cast", [mask], {"to": integer.value}, dtype=integer)
        least = graph.node("ReduceMin", [seen], {"keepdims": 0}, dtype=integer)
        graph.shared[key, "seen"] = seen
        graph.shared[key] = graph.node("Greater", [least, graph.constant(0, "int32")], dtype=ir.DataType.BOOL)
    return graph.shared[key, "seen"], graph.shared[key]
