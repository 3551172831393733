"""Attention as com.microsoft GroupQueryAttention, whose cache may be one buffer that each step writes into.

What onnxruntime 1.31.1 takes on the CPU, by trial: causal attention, a sliding window that counts the query itself, a
soft cap; head sizes that 8 divides; one size for keys and values. Rows of a batch have lengths of their own
(`seqlens_k`), padded on the right; a row's next key goes to its own end. More than one row after a past takes one token
at a time.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from compress.export.onnx import angles, half, multi_head, slot_heads
from compress.export.onnx.attention import CACHED, dim, float_of, int_of
from compress.export.onnx.graph import MICROSOFT, GraphBuilder
from compress.export.onnx.interfaces import DOMAIN
from compress.export.onnx.pattern import made_by
from compress.export.onnx.providers import CPU
from compress.hwprofiles import Runtime

STEP = 8
"""What head sizes must be a multiple of."""
WIDEST = 256
"""The largest head of the CUDA provider's kernels, by onnxruntime's sources; not tried."""


def refusal(graph: ir.Graph, runtime: Runtime) -> str:
    """Why the attentions of a captured decoder cannot be lowered so; empty where they can."""
    if runtime.provider != CPU and not half.wanted(runtime):
        return f"GroupQueryAttention of {runtime.provider} does not compute in {runtime.float_dtype}"
    nodes = [node for node in graph if node.domain == DOMAIN and node.op_type == "Attention"]
    found = dict.fromkeys(reason for node in nodes if (reason := _reason(node, half.wanted(runtime))))
    return "; ".join(found)


def _reason(node: ir.Node, narrow: bool) -> str:
    heads, size = dim(node.inputs[0], 1), dim(node.inputs[0], 3)
    kv_heads, value_size = dim(node.inputs[1], 1), dim(node.inputs[2], 3)
    if len(node.inputs) < CACHED:
        return "an attention has no cache"
    if int_of(node, "after"):
        return "an attention is not causal"
    if size != value_size:
        return f"keys of {size} and values of {value_size}; GroupQueryAttention takes one size"
    if size % STEP:
        return f"heads of {size}; GroupQueryAttention takes multiples of {STEP}"
    if narrow and size > WIDEST:
        return f"heads of {size}; GroupQueryAttention in float16 takes up to {WIDEST}"
    if heads % kv_heads:
        return f"{heads} heads on {kv_heads} key-value heads, which do not divide them"
    return ""


def attention(graph: GraphBuilder, node: ir.Node, ids: ir.Value, mask: ir.Value, *, positions: int) -> list[ir.Value]:
    """Replace an Attention placeholder with a cache: values for each of its outputs, in order.

    mask (batch, total) holds ones first, then zeros, in each row; ids are not looked at. positions: tokens of the
    longest sequence; the operator rotates queries and keys itself where it can look their angles up.
    """
    query, key, value, past_key, past_value = node.inputs[:CACHED]
    assert query is not None and key is not None
    heads, kv_heads, size = dim(query, 1), dim(key, 1), dim(query, 3)
    baked = angles.bake(graph, query, key, positions)
    if baked is not None:
        query, key = baked.query, baked.key
    lengths, total = _lengths(graph, mask)
    attributes = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "scale": float_of(node, "scale"),
        "softcap": float_of(node, "softcap"),
        "local_window_size": int_of(node, "before") + 1 if int_of(node, "before") >= 0 else -1,
        "do_rotary": int(baked is not None),
    }
    flat = [_flat(graph, each) for each in (query, key, value)]
    inputs = [*flat, past_key, past_value, lengths, total, *([baked.cos, baked.sin] if baked is not None else [])]
    out = graph.node("GroupQueryAttention", inputs, attributes, domain=MICROSOFT, outputs=3)
    present = graph.nodes[-1].outputs[1:]
    return [graph.node("Reshape", [out, graph.constant([0, 0, heads, size])]), *present]


def _flat(graph: GraphBuilder, values: ir.Value | None) -> ir.Value:
    """(batch, heads, s, d) → (batch, s, heads · d), which it may have been split from."""
    found = multi_head.flat(values)
    if found is not None:
        return found
    turn = made_by(values, "Transpose")
    if turn is not None and list(turn.attributes["perm"].as_ints()) == multi_head.HEADS_FIRST:
        turned = turn.inputs[0]
    else:
        turned = graph.node("Transpose", [values], {"perm": multi_head.HEADS_FIRST})
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
    weight is made again. What the first has not, angles of rotary embeddings and heads of caches, is appended to the
    file.
    """
    kept = {name: value.const_value for name, value in stored.graph.initializers.items()}
    folder = next(each.base_dir for each in kept.values() if isinstance(each, ir.ExternalTensor))
    for name, value in document.graph.initializers.items():
        own, first = value.const_value, kept.get(name)
        if name.startswith((angles.NAME, slot_heads.NAME)) and own is not None:
            value.const_value = _append(own, Path(folder), location)
        if own is None or not isinstance(first, ir.ExternalTensor):
            continue
        same = (own.dtype, tuple(own.shape)) == (first.dtype, tuple(first.shape))
        if not same or not (isinstance(own, ir.LazyTensor) or np.array_equal(own.numpy(), first.numpy())):
            continue
        value.const_value = _reference(first, location, first.offset, Path(first.base_dir))


def _append(tensor: ir.TensorProtocol, folder: Path, location: str) -> ir.ExternalTensor:
    with (folder / location).open("ab") as file:
        offset = file.tell()
        file.write(tensor.tobytes())
    return _reference(tensor, location, offset, folder)


def _reference(tensor: ir.TensorProtocol, location: str, offset: int | None, folder: Path) -> ir.ExternalTensor:
    """A tensor as a part of a file of the folder."""
    assert isinstance(tensor.shape, ir.Shape) and tensor.name is not None
    return ir.ExternalTensor(
        location, offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=tensor.name, base_dir=folder
    )
