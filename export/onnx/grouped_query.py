"""Attention as com.microsoft GroupQueryAttention, whose cache may be one buffer that each step writes into.

What onnxruntime 1.31.1 takes on the CPU, by trial: causal attention, a sliding window that counts the query itself, a
soft cap; head sizes that 8 divides; one size for keys and values. Rows of a batch have lengths of their own
(`seqlens_k`), padded on the right; a row's next key goes to its own end. More than one row after a past takes one token
at a time.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compress.export.onnx.attention import dim, float_of, int_of
from compress.export.onnx.graph import MICROSOFT, GraphBuilder
from compress.export.onnx.interfaces import DOMAIN
from compress.hwprofiles import Runtime

STEP = 8
"""What head sizes must be a multiple of."""


def refusal(graph: ir.Graph, runtime: Runtime) -> str:
    """Why the attentions of a captured decoder cannot be lowered so; empty where they can."""
    if runtime.provider != "CPUExecutionProvider":
        return f"GroupQueryAttention of {runtime.provider} does not compute in float32"
    nodes = [node for node in graph if node.domain == DOMAIN and node.op_type == "Attention"]
    found = dict.fromkeys(reason for node in nodes if (reason := _reason(node)))
    return "; ".join(found)


def _reason(node: ir.Node) -> str:
    heads, size = dim(node.inputs[0], 1), dim(node.inputs[0], 3)
    kv_heads, value_size = dim(node.inputs[1], 1), dim(node.inputs[2], 3)
    if len(node.inputs) != 5:
        return "an attention has no cache"
    if int_of(node, "after"):
        return "an attention is not causal"
    if size != value_size:
        return f"keys of {size} and values of {value_size}; GroupQueryAttention takes one size"
    if size % STEP:
        return f"heads of {size}; GroupQueryAttention takes multiples of {STEP}"
    if heads % kv_heads:
        return f"{heads} heads on {kv_heads} key-value heads, which do not divide them"
    return ""


def attention(graph: GraphBuilder, node: ir.Node, ids: ir.Value, mask: ir.Value) -> list[ir.Value]:
    """Replace an Attention placeholder with a cache: values for each of its outputs, in order.

    mask (batch, total) holds ones first, then zeros, in each row; ids are not looked at.
    """
    query, key, value, past_key, past_value = node.inputs
    heads, kv_heads, size = dim(query, 1), dim(key, 1), dim(query, 3)
    lengths, total = _lengths(graph, mask)
    attributes = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "scale": float_of(node, "scale"),
        "softcap": float_of(node, "softcap"),
        "local_window_size": int_of(node, "before") + 1 if int_of(node, "before") >= 0 else -1,
        "do_rotary": 0,
    }
    flat = [_flat(graph, each) for each in (query, key, value)]
    inputs = [*flat, past_key, past_value, lengths, total]
    out = graph.node("GroupQueryAttention", inputs, attributes, domain=MICROSOFT, outputs=3)
    present = graph.nodes[-1].outputs[1:]
    return [graph.node("Reshape", [out, graph.constant([0, 0, heads, size])]), *present]


def _flat(graph: GraphBuilder, values: ir.Value | None) -> ir.Value:
    """(batch, heads, s, d) → (batch, s, heads · d)."""
    turned = graph.node("Transpose", [values], {"perm": [0, 2, 1, 3]})
    return graph.node("Reshape", [turned, graph.constant([0, 0, -1])])


def _lengths(graph: GraphBuilder, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The last place of each row (batch,) int32, and the width of the mask () int32; made once."""
    key = ("lengths",)
    if key not in graph.shared:
        narrow = {"to": ir.DataType.INT32.value}
        count = graph.node("ReduceSum", [mask, graph.constant([1])], {"keepdims": 0}, dtype=ir.DataType.INT64)
        last = graph.node("Sub", [count, graph.constant(1)], dtype=ir.DataType.INT64)
        graph.shared[key] = graph.node("Cast", [last], narrow, dtype=ir.DataType.INT32)
        width = graph.node("Shape", [mask], {"start": 1, "end": 2}, dtype=ir.DataType.INT64)
        scalar = graph.node("Squeeze", [width], dtype=ir.DataType.INT64)
        graph.shared[("width",)] = graph.node("Cast", [scalar], narrow, dtype=ir.DataType.INT32)
    return graph.shared[key], graph.shared[("width",)]


def refer(document: ir.Model, stored: ir.Model, location: str) -> None:
    """Make the initializers of a second graph references to what the first keeps in its file of weights.

    stored: the first graph as it was saved. What it holds inline stays inline here too. Nothing is stored twice, and no
    weight is made again.
    """
    kept = {name: value.const_value for name, value in stored.graph.initializers.items()}
    for name, value in document.graph.initializers.items():
        own, first = value.const_value, kept.get(name)
        if own is None or not isinstance(first, ir.ExternalTensor):
            continue
        same = (own.dtype, tuple(own.shape)) == (first.dtype, tuple(first.shape))
        if not same or not (isinstance(own, ir.LazyTensor) or np.array_equal(own.numpy(), first.numpy())):
            continue
        value.const_value = ir.ExternalTensor(
            location, first.offset, first.length, first.dtype, shape=first.shape, name=name, base_dir=first.base_dir
        )
