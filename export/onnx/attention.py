"""Attention in standard operators: concatenated cache, causal or sliding mask, grouped query heads folded together."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compress.export.onnx.graph import GraphBuilder

# Added to masked scores: far below any score, yet finite, so that a row with nothing to see gives no NaN.
MASKED = -1e9
CACHED = 5
"""Inputs of an attention with a cache; more are for learned scorers (`interfaces`)."""


def mask_bias(graph: GraphBuilder, ids: ir.Value, mask: ir.Value, *, before: int, after: int) -> ir.Value:
    """(batch, 1, s or 1, total) float32, 0 where a query may look; made once per kind of mask.

    ids (batch, s), mask (batch, total) with total = past + s; before, after: positions seen on each side, -1 for all.
    """
    key = ("mask", before, after)
    if key in graph.shared:
        return graph.shared[key]
    seen = graph.node("Cast", [mask], {"to": ir.DataType.BOOL.value}, dtype=ir.DataType.BOOL)
    seen = graph.node("Unsqueeze", [seen, graph.constant([1, 2])], dtype=ir.DataType.BOOL)
    for limit in _limits(graph, ids, mask, before, after):
        seen = graph.node("And", [seen, limit], dtype=ir.DataType.BOOL)
    zero, masked = graph.constant(0.0, np.float32), graph.constant(MASKED, np.float32)
    graph.shared[key] = graph.node("Where", [seen, zero, masked])
    return graph.shared[key]


def _limits(graph: GraphBuilder, ids: ir.Value, mask: ir.Value, before: int, after: int) -> list[ir.Value]:
    """What a query may look at, each (s, total) or (batch, 1, s, total) bool: key ≤ query + after, ≥ query − before."""
    limits = []
    if after == 0:  # causal: an index is enough, wherever the padding is
        rows, columns = _indices(graph, ids, mask)
        limits.append(graph.node("LessOrEqual", [columns, rows], dtype=ir.DataType.BOOL))
    if before < 0 and after <= 0:
        return limits
    rows, columns = _positions(graph, ids, mask)
    for reach, compare in ((after, "LessOrEqual"), (-before, "GreaterOrEqual")):
        if (compare == "LessOrEqual" and after > 0) or (compare == "GreaterOrEqual" and before >= 0):
            edge = graph.node("Add", [rows, graph.constant(reach)], dtype=ir.DataType.INT64)
            limits.append(graph.node(compare, [columns, edge], dtype=ir.DataType.BOOL))
    return limits


def _indices(graph: GraphBuilder, ids: ir.Value, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Places in the cache of the queries (s, 1) and of the keys (total,)."""
    integer, one = ir.DataType.INT64, graph.constant(1)
    length = graph.node("Squeeze", [graph.node("Shape", [ids], {"start": 1, "end": 2}, dtype=integer)], dtype=integer)
    total = graph.node("Squeeze", [graph.node("Shape", [mask], {"start": 1, "end": 2}, dtype=integer)], dtype=integer)
    start = graph.node("Sub", [total, length], dtype=integer)
    rows = graph.node("Range", [start, total, one], dtype=integer)
    columns = graph.node("Range", [graph.constant(0), total, one], dtype=integer)
    return graph.node("Unsqueeze", [rows, graph.constant([1])], dtype=integer), columns


def _positions(graph: GraphBuilder, ids: ir.Value, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Positions of the queries (batch, 1, s, 1) and of the keys (batch, 1, 1, total), padding not counted: a window is
    so many tokens, not so many places in the cache."""
    integer, last = ir.DataType.INT64, graph.constant([2**63 - 1])
    counted = graph.node("CumSum", [mask, graph.constant(1)], dtype=integer)
    length = graph.node("Shape", [ids], {"start": 1, "end": 2}, dtype=integer)
    total = graph.node("Shape", [mask], {"start": 1, "end": 2}, dtype=integer)
    start = graph.node("Sub", [total, length], dtype=integer)
    queries = graph.node("Slice", [counted, start, last, graph.constant([1])], dtype=integer)
    rows = graph.node("Unsqueeze", [queries, graph.constant([1, 3])], dtype=integer)
    return rows, graph.node("Unsqueeze", [counted, graph.constant([1, 2])], dtype=integer)


def attention(graph: GraphBuilder, node: ir.Node, ids: ir.Value, mask: ir.Value) -> list[ir.Value]:
    """Replace an Attention placeholder: values for each of its outputs, in order."""
    query, key, value = node.inputs[:3]
    assert query is not None and key is not None and value is not None
    results: list[ir.Value] = []
    if len(node.inputs) >= CACHED:
        key = graph.node("Concat", [node.inputs[3], key], {"axis": 2})
        value = graph.node("Concat", [node.inputs[4], value], {"axis": 2})
        results = [key, value]
    heads, size = dim(query, 1), dim(query, 3)
    kv_heads, value_size = dim(node.inputs[1], 1), dim(node.inputs[2], 3)
    groups = heads // kv_heads
    scaled = graph.node("Mul", [query, graph.constant(float_of(node, "scale"), np.float32)])
    if groups > 1:  # (b, heads, s, d) → (b, kv heads, groups · s, d): keys are read once per group
        scaled = graph.node("Reshape", [scaled, graph.constant([0, kv_heads, -1, size])])
    scores = graph.node("MatMul", [scaled, graph.node("Transpose", [key], {"perm": [0, 1, 3, 2]})])
    weights = softmax(graph, node, scores, ids, mask, kv_heads, groups)
    out = graph.node("MatMul", [weights, value])
    return [heads_apart(graph, out, ids, heads, kv_heads, value_size), *results]


def heads_apart(
    graph: GraphBuilder, out: ir.Value, ids: ir.Value, heads: int, kv_heads: int, value_size: int
) -> ir.Value:
    """(b, kv heads, groups · s, d) → (b, s, heads, d)."""
    if heads > kv_heads:
        length = graph.node("Shape", [ids], {"start": 1, "end": 2}, dtype=ir.DataType.INT64)
        parts = [graph.constant([0, heads]), length, graph.constant([value_size])]
        out = graph.node("Reshape", [out, graph.node("Concat", parts, {"axis": 0}, dtype=ir.DataType.INT64)])
    return graph.node("Transpose", [out], {"perm": [0, 2, 1, 3]})


def softmax(
    graph: GraphBuilder, node: ir.Node, scores: ir.Value, ids: ir.Value, mask: ir.Value, kv_heads: int, groups: int
) -> ir.Value:
    """scores (b, kv heads, groups · s, total) of a placeholder → attention weights of the same shape."""
    softcap = float_of(node, "softcap")
    if softcap:
        cap = graph.constant(softcap, np.float32)
        scores = graph.node("Mul", [graph.node("Tanh", [graph.node("Div", [scores, cap])]), cap])
    bias = mask_bias(graph, ids, mask, before=int_of(node, "before"), after=int_of(node, "after"))
    if groups == 1:
        return graph.node("Softmax", [graph.node("Add", [scores, bias])], {"axis": -1})
    integer = ir.DataType.INT64
    length = graph.node("Shape", [ids], {"start": 1, "end": 2}, dtype=integer)
    total = graph.node("Shape", [mask], {"start": 1, "end": 2}, dtype=integer)
    split = graph.node("Concat", [graph.constant([0, kv_heads * groups]), length, total], {"axis": 0}, dtype=integer)
    joined = graph.node("Concat", [graph.constant([0, kv_heads, -1]), total], {"axis": 0}, dtype=integer)
    scores = graph.node("Reshape", [scores, split])
    weights = graph.node("Softmax", [graph.node("Add", [scores, bias])], {"axis": -1})
    return graph.node("Reshape", [weights, joined])


def dim(value: ir.Value | None, axis: int) -> int:
    """The fixed size of an axis."""
    assert value is not None and value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int), f"{value.name} has no fixed size on axis {axis}"
    return size


def float_of(node: ir.Node, name: str) -> float:
    """An attribute of a node."""
    return float(node.attributes[name].as_float())


def int_of(node: ir.Node, name: str) -> int:
    """An attribute of a node."""
    return int(node.attributes[name].as_int())
