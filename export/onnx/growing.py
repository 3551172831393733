"""The graph of a decoder whose cache keeps every token, in codes: past and present are of their type.

Inputs and outputs are those of the portable graph, of other types; each call's outputs are the next call's inputs:

    past_key_values.i.key, .value              (batch, kv heads, past, size) int8, or (…, size / 2) uint8 of 4 bits each
    past_key_values.i.key_scale, .value_scale  (batch, kv heads, past, scales of a vector) float16, of codes whose
                                               scales come with each vector
    present.i.*                                the same with the tokens of the call

What stays in float is as in the portable graph. As in torch (compress/kv/layer.py), the tokens of a call attend to
what is stored and to each other as they were computed, and are stored thereafter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from torch import Tensor

from compress.errors import UnsupportedError
from compress.export.onnx import cache_codes, half
from compress.export.onnx.attention import attention, dim, float_of, heads_apart, softmax
from compress.export.onnx.cache_codes import END, FLOAT, HALF, INT, Codes
from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.providers import CPU
from compress.export.onnx.runtime import FACTS, PAST, PRESENT
from compress.hwprofiles import Runtime
from compress.kv.spec import KvSpec
from compress.target import Refusal

Tensors = Sequence[Mapping[str, Tensor]]


def refusal(specs: Sequence[KvSpec], runtime: Runtime) -> Refusal | None:
    """Why caches that keep everything cannot be of a graph's own type; None where they can."""
    if runtime.provider != CPU or half.wanted(runtime):
        return Refusal(
            f"graphs whose cache is in codes are for ONNX Runtime's CPU provider, not for {runtime.provider}, whose "
            "kernels for them have not been tried",
            usage=False,
        )
    found = dict.fromkeys(reason for spec in specs if (reason := _reason(spec)))
    return Refusal("; ".join(found)) if found else None


def _reason(spec: KvSpec) -> str:
    if spec.evicts:
        return "a graph drops tokens in all layers or in none"
    if spec.selects:
        return "kv_select searches a cache of all tokens on the host, which a graph does not; take the target native"
    if spec.keys_by == "channel":
        return "keys by channel wait for a whole run of tokens, which a graph does not do"
    if spec.residual:
        return "a residual of float tokens is a second cache, which a graph does not have; give residual=0"
    return cache_codes.reason(spec)


class Growing:
    """The lowering of a decoder's attentions, as `lower` takes it. Args: tensors: by layer, what the specs want."""

    def __init__(self, specs: Sequence[KvSpec], tensors: Tensors) -> None:
        self.specs, self.tensors = specs, tensors

    def __call__(self, graph: GraphBuilder, node: ir.Node, ids: ir.Value, mask: ir.Value) -> list[ir.Value]:
        """Replace an Attention placeholder: values for each of its outputs, in order."""
        layer = layer_of(node)
        codes = cache_codes.of_layer(self.specs[layer], self.tensors[layer], dim(node.inputs[1], 3), layer)
        if not codes:
            return attention(graph, node, ids, mask)
        pasts = retype(graph.graph, node, codes)
        scales = {part: _scale_input(graph.graph, layer, part, each) for part, each in codes.items()}
        query, key = node.inputs[0], node.inputs[1]
        kv_heads, heads = dim(key, 1), dim(query, 1)
        scaled = graph.node("Mul", [query, graph.constant(float_of(node, "scale"), np.float32)])
        queries = graph.node("Reshape", [scaled, graph.constant([0, kv_heads, -1, dim(query, 3)])])
        present = {part: self._grow(graph, node, codes, part, scales.get(part), layer) for part in pasts}
        scores = _scores(graph, queries, (pasts["key"], key), codes.get("key"), scales.get("key"), present["key"])
        weights = softmax(graph, node, scores, ids, mask, kv_heads, heads // kv_heads)
        value = pasts["value"], node.inputs[2]
        out = _sums(graph, weights, value, codes.get("value"), scales.get("value"), present["value"])
        return [heads_apart(graph, out, ids, heads, kv_heads, dim(node.inputs[2], 3)), *present.values()]

    @staticmethod
    def _grow(
        graph: GraphBuilder, node: ir.Node, codes: Mapping[str, Codes], part: str, scale: ir.Value | None, layer: int
    ) -> ir.Value:
        """What is held of keys or values, and the new tokens behind it."""
        place = 1 if part == "key" else 2
        states, past = node.inputs[place], node.inputs[place + 2]
        assert states is not None and past is not None
        if part not in codes:
            return graph.node("Concat", [past, states], {"axis": 2})
        made, scales = codes[part].encode(graph, states)
        if scale is not None and scales is not None:
            grown = graph.node("Concat", [scale, scales], {"axis": 2}, dtype=HALF)
            grown.name, grown.shape = f"{PRESENT}{layer}.{part}_scale", scale.shape
            graph.graph.outputs.append(grown)
        return graph.node("Concat", [past, made], {"axis": 2}, dtype=codes[part].dtype)


def facts(specs: Sequence[KvSpec]) -> dict[str, str]:
    """A graph's metadata about its caches, if any of them is in codes."""
    return {FACTS: json.dumps([spec.as_data() for spec in specs], sort_keys=True)} if specs else {}


def layer_of(node: ir.Node) -> int:
    """The cache that an attention has, by number."""
    past = node.inputs[3]
    assert past is not None and past.name is not None
    return int(past.name.removeprefix(PAST).split(".")[0])


def retype(graph: ir.Graph, node: ir.Node, codes: Mapping[str, Codes]) -> dict[str, ir.Value]:
    """Make past and present of an attention what its codes are held in. Returns the pasts, by `key` and `value`.

    Raises: UnsupportedError for a model that looks at its cache elsewhere.
    """
    pasts = {}
    for place, part in enumerate(("key", "value"), 3):
        past = node.inputs[place]
        assert past is not None
        pasts[part] = past
        if part not in codes:
            continue
        if any(use.node is not node and use.node.op_type != "Shape" for use in past.uses()):
            raise UnsupportedError(
                f"The model reads {past.name} outside its attention, so its cache cannot be in codes. Leave kv_quant "
                "out, or add --target native."
            )
        for value in (past, node.outputs[place - 2]):
            assert value.shape is not None
            value.type = ir.TensorType(codes[part].dtype)
            value.shape = ir.Shape([*value.shape[:3], codes[part].width])
    return pasts


def _scale_input(graph: ir.Graph, layer: int, part: str, codes: Codes) -> ir.Value | None:
    """An input for the scales that come with each vector."""
    if codes.fixed is not None:
        return None
    past = next(value for value in graph.inputs if value.name == f"{PAST}{layer}.{part}")
    assert past.shape is not None
    shape = ir.Shape([*past.shape[:3], codes.runs])
    value = ir.Value(name=f"{PAST}{layer}.{part}_scale", type=ir.TensorType(HALF), shape=shape)
    graph.inputs.append(value)
    return value


def _scores(
    graph: GraphBuilder,
    queries: ir.Value,
    keys: tuple[ir.Value, ir.Value | None],
    codes: Codes | None,
    scale: ir.Value | None,
    present: ir.Value,
) -> ir.Value:
    """(batch, kv heads, rows, past + n). keys: those held and the new ones; present: both, where they are floats."""
    turned = {"perm": [0, 1, 3, 2]}
    if codes is None:
        return graph.node("MatMul", [queries, graph.node("Transpose", [present], turned)])
    held = codes.products(graph, queries, keys[0], scale)
    fresh = graph.node("MatMul", [queries, graph.node("Transpose", [keys[1]], turned)])
    return graph.node("Concat", [held, fresh], {"axis": 3})


def _sums(
    graph: GraphBuilder,
    weights: ir.Value,
    values: tuple[ir.Value, ir.Value | None],
    codes: Codes | None,
    scale: ir.Value | None,
    present: ir.Value,
) -> ir.Value:
    """(batch, kv heads, rows, size); as `_scores`."""
    if codes is None:
        return graph.node("MatMul", [weights, present])
    begin, last, axis = graph.constant([0]), graph.constant([END]), graph.constant([3])
    past = graph.node("Shape", [values[0]], {"start": 2, "end": 3}, dtype=INT)
    of_held = graph.node("Slice", [weights, begin, past, axis], dtype=FLOAT)
    of_fresh = graph.node("Slice", [weights, past, last, axis], dtype=FLOAT)
    held = codes.sums(graph, of_held, values[0], scale)
    return graph.node("Add", [held, graph.node("MatMul", [of_fresh, values[1]])])
