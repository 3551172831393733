"""One attention over slots and new tokens, and the state after it.

What is computed is what compress/kv/layer.py does in torch: the new tokens attend to what is stored and to each other
as they were computed, and are stored thereafter.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from compress.export.onnx.attention import dim, float_of
from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.slot_tokens import BOOL, FLOAT, INT, Tokens, bias, is_there
from compress.export.onnx.slot_update import Update, cut
from compress.kv.spec import KvSpec

State = Mapping[str, ir.Value]


def attend(
    graph: GraphBuilder,
    node: ir.Node,
    spec: KvSpec,
    state: State,
    positions: ir.Value,
    judged: ir.Value | None = None,
) -> tuple[ir.Value, dict[str, ir.Value]]:
    """An attention's output (batch, n, heads, size), and the state after it.

    Args: node: the placeholder, of queries, keys and values (batch, heads, n, size) with their rotation; state: see
    `slots`; positions (batch, n) int64, −1 for padding; judged (batch, kv heads, n): scores of the new tokens by a
    learned head.
    """
    query, key, value = node.inputs[:3]
    assert query is not None and key is not None and value is not None
    tokens = Tokens(graph, positions, dim(query, 1) // dim(key, 1))
    weights = _weights(graph, node, state, tokens)
    held, fresh = cut(graph, weights, spec.budget + 1)
    scale = state.get("value_scale")
    if scale is not None:
        held = graph.node("Mul", [held, _row(graph, scale)])
    out = graph.node("MatMul", [held, _floats(graph, state["value"])])
    out = graph.node("Add", [out, graph.node("MatMul", [fresh, value])])
    after = Update(graph, spec, state, tokens, judged).after(key, value, weights, out)
    parts = [graph.constant([0, dim(query, 1)]), tokens.length, graph.constant([dim(value, 3)])]
    apart = graph.node("Reshape", [out, graph.node("Concat", parts, {"axis": 0}, dtype=INT)])
    return graph.node("Transpose", [apart], {"perm": [0, 2, 1, 3]}), after


def _weights(graph: GraphBuilder, node: ir.Node, state: State, tokens: Tokens) -> ir.Value:
    """Probabilities (batch, kv heads, groups · n, slots + n): the queries of a group are rows of one product."""
    query, key = node.inputs[0], node.inputs[1]
    assert key is not None
    scaled = graph.node("Mul", [query, graph.constant(float_of(node, "scale"), np.float32)])
    queries = graph.node("Reshape", [scaled, graph.constant([0, dim(key, 1), -1, dim(query, 3)])])
    scale = state.get("key_scale")
    held = graph.node("MatMul", [queries, _turned(graph, _floats(graph, state["key"]))])
    if scale is not None:
        held = graph.node("Mul", [held, _row(graph, scale)])
    there = is_there(graph, state["position"], np.int32)
    there = graph.node("Unsqueeze", [there, graph.constant([2])], dtype=BOOL)
    held = graph.node("Add", [held, bias(graph, there)])
    fresh = graph.node("Add", [graph.node("MatMul", [queries, _turned(graph, key)]), tokens.bias])
    return graph.node("Softmax", [graph.node("Concat", [held, fresh], {"axis": 3})], {"axis": -1})


def _turned(graph: GraphBuilder, states: ir.Value) -> ir.Value:
    return graph.node("Transpose", [states], {"perm": [0, 1, 3, 2]})


def _floats(graph: GraphBuilder, held: ir.Value) -> ir.Value:
    """What is held as float32, codes as numbers: scales are one per slot, so they go to the product, which is
    smaller."""
    return held if held.dtype is FLOAT else graph.node("Cast", [held], {"to": FLOAT.value})


def _row(graph: GraphBuilder, scale: ir.Value) -> ir.Value:
    """(batch, kv heads, slots) float16 → (batch, kv heads, 1, slots) float32."""
    wide = graph.node("Cast", [scale], {"to": FLOAT.value})
    return graph.node("Unsqueeze", [wide, graph.constant([2])])
