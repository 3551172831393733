"""What rotates queries and keys in one operator, by the angles that the captured graph computes for positions.

However a model scales its angles (linear, llama3, yarn), the tables hold the same: the part of the graph that makes
them is run. Angles that depend on more than a token's position stay as they were captured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from compress.export.onnx import rotary
from compress.export.onnx.attention import dim
from compress.export.onnx.graph import MICROSOFT, GraphBuilder
from compress.export.onnx.pattern import put_for
from compress.models.attention import attentions

LIMIT = 32 * 2**20
"""Bytes of all tables of a graph at most; where a context is longer, angles are computed for the tokens at hand."""
STEP = 16
"""What head sizes and rotated features must be a multiple of in GroupQueryAttention (1.31.1, by trial)."""
NAME = "rotary_"
INPUTS = ("input_ids", "attention_mask")
# ids at the end of a row, the mask, and the positions that must follow: of padded rows, and of tokens after a past
PROBES: tuple[tuple[int, list[list[int]], list[list[int]]], ...] = (
    (5, [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]),
    (2, [[1] * 6] * 2, [[4, 5]] * 2),
)
NEAR = 1e-6
Floats = NDArray[np.float32]


class Baked(NamedTuple):
    """What an operator rotates by itself: queries and keys before, cos and sin (positions, width / 2)."""

    query: ir.Value
    key: ir.Value
    cos: ir.Value
    sin: ir.Value


def table_bytes(positions: int, width: int) -> int:
    """Of cos and sin, for half of the rotated features each, in float32."""
    return positions * width * 4


def predict_bytes(config: Any, positions: int) -> int:
    """Of the tables that a model's config promises: one for each kind of layer that has its own angles."""
    text = config.get_text_config()
    given = getattr(text, "rope_parameters", None) or {}
    kinds = [kind for kind in given.values() if isinstance(kind, dict)] or ([given] if given else [])
    size, total = attentions(text)[0].size, 0
    for kind in kinds:
        width = int(size * (kind.get("partial_rotary_factor") or 1.0))
        more = table_bytes(positions, width)
        total += more if fits(width, size) and total + more <= LIMIT else 0
    return total


def fits(width: int, size: int) -> bool:
    """Whether GroupQueryAttention rotates the first `width` features of heads of `size`."""
    return width % STEP == 0 and size % STEP == 0


def bake(graph: GraphBuilder, query: ir.Value, key: ir.Value, positions: int) -> Baked | None:
    """Queries and keys that are rotated alike, and tables as initializers, which layers share; None where not so."""
    first, second = rotary.find(query), rotary.find(key)
    if first is None or second is None or first[1:] != second[1:] or not fits(first.width, dim(query, 3)):
        return None
    known = [(NAME, part, first.cos.name, first.sin.name) for part in ("cos", "sin")]
    if known[0] not in graph.shared:
        stored = [value.const_value for name, value in graph.graph.initializers.items() if name.startswith(NAME)]
        if sum(each.nbytes for each in stored if each) + table_bytes(positions, first.width) > LIMIT:
            return None
        found = tables(graph.graph, first, positions)
        if found is None:
            return None
        name = NAME + hashlib.sha256(found[0].tobytes() + found[1].tobytes()).hexdigest()[:12]
        for place, part in zip(known, found, strict=True):
            values = torch.from_numpy(part)
            graph.shared[place] = graph.initializer(f"{name}.{place[1]}", values.clone, torch.float32, part.shape)
    return Baked(first.values, second.values, *(graph.shared[place] for place in known))


def tables(graph: ir.Graph, rotation: rotary.Rotation, positions: int) -> tuple[Floats, Floats] | None:
    """cos and sin by position, each (positions, width / 2); None where they do not follow from the position alone."""
    evaluator = _evaluator(graph, (rotation.cos, rotation.sin))
    if evaluator is None or positions < 1 + max(max(map(max, wanted)) for *_, wanted in PROBES):
        return None
    cos, sin = (each[0] for each in _run(evaluator, positions, np.ones((1, positions), np.int64)))
    for length, mask, wanted in PROBES:
        for found, table in zip(_run(evaluator, length, np.asarray(mask)), (cos, sin), strict=True):
            if np.abs(found - table[np.asarray(wanted)]).max() > NEAR:
                return None
    half = rotation.width // 2
    if not all(np.array_equal(table[:, :half], table[:, half:]) for table in (cos, sin)):
        return None
    return np.ascontiguousarray(cos[:, :half]), np.ascontiguousarray(sin[:, :half])


def as_operators(builder: GraphBuilder) -> None:
    """Rotations become com.microsoft RotaryEmbedding, with angles computed for the tokens at hand, once for all layers.

    As seven operators for queries and seven for keys in each layer they took as long as the products: without them, a
    decode step is 1.12 times as fast (pycoder in INT4, one thread).
    """
    known: dict[tuple[ir.Value, ir.Value], bool] = {}
    for kind in ("Concat", "Add"):  # of parts of heads first: each holds an Add
        for node in list(builder.graph):
            found = rotary.find(node.outputs[0]) if node.op_type == kind and node.outputs[0].uses() else None
            if found is None:
                continue
            pair = found.cos, found.sin
            if pair not in known:
                known[pair] = same_halves(builder.graph, found)
            if not known[pair]:
                continue
            heads, size = dim(found.values, 1), dim(found.values, 3)
            partial = {"num_heads": heads, "rotary_embedding_dim": found.width} if found.width < size else {}
            angles = [_half(builder, each, found.width) for each in (found.cos, found.sin)]
            inputs = [found.values, _rows(builder, found.cos), *angles]
            put_for(builder.graph, node, ir.node("RotaryEmbedding", inputs, partial, domain=MICROSOFT, name=node.name))


def same_halves(graph: ir.Graph, rotation: rotary.Rotation) -> bool:
    """Whether both halves turn by the same angles, as the operator takes for granted."""
    evaluator, half = _evaluator(graph, (rotation.cos, rotation.sin)), rotation.width // 2
    found = [] if evaluator is None else _run(evaluator, PROBES[0][0], np.asarray(PROBES[0][1]))
    return bool(found) and all(np.array_equal(each[..., :half], each[..., half:]) for each in found)


def _half(builder: GraphBuilder, angles: ir.Value, width: int) -> ir.Value:
    """(batch, s, width) → (batch · s, width / 2)."""
    key = (NAME, "half", angles.name)
    if key not in builder.shared:
        place = builder.at(f"{NAME}{angles.name}")
        ends = [place.constant([0]), place.constant([width // 2]), place.constant([-1])]
        half = place.node("Slice", [angles, *ends])
        builder.shared[key] = place.node("Reshape", [half, place.constant([-1, width // 2])])
        producer = angles.producer()
        assert producer is not None
        builder.graph.insert_after(producer, place.nodes)
    return builder.shared[key]


def _rows(builder: GraphBuilder, angles: ir.Value) -> ir.Value:
    """Where a token's angles are among (batch · s, width / 2): rows (batch, s); or [0], the first token's, where all
    rows of a batch share them."""
    assert angles.shape is not None
    if angles.shape[0] == 1:
        return builder.constant([0])
    key = (NAME, "rows")
    if key not in builder.shared:
        place, integer = builder.at(f"{NAME}rows"), ir.DataType.INT64
        ids = next(value for value in builder.graph.inputs if value.name == INPUTS[0])
        count = place.node("Size", [ids], dtype=integer)
        flat = place.node("Range", [place.constant(0), count, place.constant(1)], dtype=integer)
        shape = place.node("Shape", [ids], dtype=integer)
        builder.shared[key] = place.node("Reshape", [flat, shape], dtype=integer)
        builder.graph.insert_before(builder.graph[0], place.nodes)
    return builder.shared[key]


def _run(evaluator: ReferenceEvaluator, length: int, mask: NDArray[Any]) -> list[Floats]:
    """Angles (batch, length, width) of the last `length` tokens of a mask (batch, total)."""
    feeds = {"input_ids": np.zeros((len(mask), length), np.int64), "attention_mask": mask.astype(np.int64)}
    found: list[Any] = list(evaluator.run(None, {name: feeds[name] for name in evaluator.input_names}))
    return [np.broadcast_to(each, (len(mask), *each.shape[1:])) for each in found]


def _evaluator(graph: ir.Graph, wanted: Sequence[ir.Value]) -> ReferenceEvaluator | None:
    """Of the part of a graph that makes values; None where it reads more than ids, the mask and constants."""
    constants: dict[str, onnx.TensorProto] = {}
    nodes: set[ir.Node] = set()
    used: set[str] = set()
    left = list(wanted)
    while left:
        value = left.pop()
        node, name = value.producer(), str(value.name)
        if value.const_value is not None and not isinstance(value.const_value, ir.LazyTensor):
            constants[name] = numpy_helper.from_array(value.const_value.numpy(), name)
        elif node is None and name in INPUTS:
            used.add(name)
        elif node is None or node.domain or node.op_type in ("If", "Loop", "Scan"):
            return None
        elif node not in nodes:
            nodes.add(node)
            left += [each for each in node.inputs if each is not None]
    part = helper.make_graph(
        [ir.serde.serialize_node(node) for node in graph if node in nodes],
        "angles",
        [helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [None, None]) for name in sorted(used)],
        [helper.make_tensor_value_info(str(value.name), onnx.TensorProto.FLOAT, None) for value in wanted],
        list(constants.values()),
    )
    opset = helper.make_opsetid("", graph.opset_imports.get("", 0))
    return ReferenceEvaluator(helper.make_model(part, opset_imports=[opset]))
