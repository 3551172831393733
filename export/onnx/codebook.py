"""Codes of learned codebooks in standard operators: tables looked up for a few tokens, a decoded weight for many.

Stored: codes (blocks, stages · units, rows of codes in a block) in 4, 8 or 16 bits, codebooks and scales in float16. A
Scan goes over the blocks, so that what is decoded stays in a cache and takes no memory to speak of. With vectors along
the inputs, a few tokens are computed from tables of the products of their vectors and all entries (MatMul,
GatherElements, ReduceSum), never from weights. For more tokens, and vectors along the outputs, entries are added up
(Gather, Add) to a block of weights for one product. Where both are in the graph, an If decides by the tokens.

What depends on constants alone ONNX Runtime computes when it loads a graph: codes in a Cast become 32 bits, a Gather
behind it the float32 weight (1.31.1). What a Scan takes apart is no constant inside it: its body is computed anew for
each part, and no optimization takes an operator with a body for a constant. DequantizeLinear in front of the Cast would
be kept as well (for fusions of its own; so not where these are off), and needs float32 and int32 of all codes at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from math import prod
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from compress.export.onnx import codebook_pieces, half
from compress.export.onnx.float_matmul import add_bias
from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.lowering import TRANSFORMED, Choice, Lowering, Source
from compress.formats import name_of
from compress.formats.base import QuantTensor
from compress.formats.codebook import Codebook
from compress.honours import Honours
from compress.hwprofiles import Runtime
from compress.layer import LayerKind, LayerSpec
from compress.target import Refusal

# Beyond these, decoding is quicker: two codebooks of 256 vectors of 8, 4096x4096, onnxruntime 1.31.1, processor time of
# 1 thread of a Zen 5 EPYC: 3.4 ms a token up to 4, then more, against 20.
FEW_TOKENS = 5
# Weights decoded at once: with half as many tables take a fifth longer, with twice as many prompts a tenth.
BLOCK = 1 << 19
INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64
Body = Callable[[GraphBuilder, ir.Value], ir.Value]
TABLES, DENSE = "GatherElements+ReduceSum", "Gather+MatMul"


def choose(spec: LayerSpec, runtime: Runtime) -> Choice | Refusal | None:
    """Takes every codebook of a product whose inputs are float32."""
    form = spec.format
    if not isinstance(form, Codebook) or spec.kind is LayerKind.CONV or spec.act is not None:
        return None  # whoever takes these says with which weights
    if spec.kind is LayerKind.EMBEDDING:
        return Refusal(f"{form}: rows of an embedding are not looked up in codes; use int8 or int4 there")
    support = runtime.support("lookup", form.bits, format=name_of(form))
    if support.state == "no":
        return Refusal(f"{form}: {support.note.removesuffix('.')}", usage=False)
    if half.wanted(runtime):
        return Refusal(f"{form}: codes are computed with in float32 only, and this profile says float16; use int4")
    width = _width(form)
    kept = f"codes of {form.bits} bits are stored in {width}" if width > form.bits else ""
    return Choice(
        TABLES if _has_tables(spec) else DENSE,
        support.state,
        __name__,
        _stored_bytes(spec),
        "; ".join(filter(None, (support.note, kept))),
        stored_bits=width,
        speed=support.speed(),
        decodes=True,
        graph_bytes=_graph_bytes(spec),
    )


def _has_tables(spec: LayerSpec) -> bool:
    """Whether a few tokens are looked up. Tables of more entries than rows are larger than the decoded weight, and a
    vector along the outputs is no factor of a product with the input."""
    return _form(spec).axis == "in" and _form(spec).entries <= spec.shape[0]


def _width(form: Codebook) -> int:
    """Stored bits of a code."""
    return next(width for width in (4, 8, 16) if form.bits <= width)


class _Layout(NamedTuple):
    """Of the stored codes. rows: of codes, in a block; the last block is filled up with zeros."""

    blocks: int
    stages: int
    units: int
    rows: int

    @property
    def packed(self) -> tuple[int, int, int]:
        """(blocks, …, …) of codes in 8 or 16 bits."""
        return self.blocks, self.stages * self.units, self.rows


def _layout(spec: LayerSpec) -> _Layout:
    form = _form(spec)
    rows, units = form.units(spec.shape)
    blocks = -(-rows * units * form.vector // BLOCK)
    return _Layout(blocks, form.stages, units, -(-rows // blocks))


def _stored_shape(spec: LayerSpec) -> tuple[int, int, int]:
    """Of the stored tensor: two codes of 4 bits are in a byte, that of the later half of the rows in its high bits."""
    blocks, codes, rows = _layout(spec).packed
    return (blocks, codes, -(-rows // 2) if _width(_form(spec)) == 4 else rows)


def _form(spec: LayerSpec) -> Codebook:
    assert isinstance(spec.format, Codebook)
    return spec.format


def _stored_bytes(spec: LayerSpec) -> int:
    form = _form(spec)
    if form.extras:
        return codebook_pieces.bytes_beside(spec) + sum(map(_stored_bytes, codebook_pieces.piece_specs(spec)))
    packed = prod(form.tensor_specs(spec.shape)["codes"][0])
    codes = prod(_stored_shape(spec)) * max(1, _width(form) // 8)
    return form.stored_bytes(spec.shape) - packed + codes + spec.bias_bytes


def _graph_bytes(spec: LayerSpec) -> int:
    """Fitted on eight of these formats on a Llama of 8 blocks."""
    form = _form(spec)
    if form.extras:
        return codebook_pieces.graph_bytes(spec) + sum(map(_graph_bytes, codebook_pieces.piece_specs(spec)))
    nodes, unpacking = (4_260, 765) if _has_tables(spec) else (2_110, 350)
    stages = 95 + 250 * form.stages if form.stages > 1 else 0
    return nodes + stages + unpacking * (_width(form) == 4) + 650 * (form.scale != "none")


def _stored(source: Source) -> QuantTensor:
    """A layer's weight as its format stores it."""
    weight = source.read().weight
    assert isinstance(weight, QuantTensor)
    return weight


def _codes(graph: GraphBuilder, source: Source) -> ir.Value:
    """In blocks; see `_layout`."""

    def made() -> Tensor:
        weight, layout, form = _stored(source), _layout(source.spec), _form(source.spec)
        codes = form.unpack(weight.tensors, weight.shape).codes.permute(2, 1, 0).flatten(0, 1)
        codes = torch.nn.functional.pad(codes, (0, layout.blocks * layout.rows - codes.shape[1]))
        codes = codes.reshape(-1, layout.blocks, layout.rows).transpose(0, 1)
        if _width(form) > 4:
            return codes
        half_way = -(-layout.rows // 2)
        return codes[..., :half_way] | torch.nn.functional.pad(codes[..., half_way:], (0, layout.rows % 2)) << 4

    kind = ir.DataType.UINT16 if _width(_form(source.spec)) == 16 else ir.DataType.UINT8
    return graph.typed(f"{source.spec.name}.weight.codes", made, kind, _stored_shape(source.spec))


def _unpacked(graph: GraphBuilder, spec: LayerSpec, codes: ir.Value) -> ir.Value:
    """Stored codes of a block → (stages · units, rows) int32."""
    if _width(_form(spec)) > 4:
        return graph.node("Cast", [codes], {"to": INT32.value}, dtype=None)
    parts = [
        graph.node("BitwiseAnd", [codes, graph.constant(15, np.uint8)], dtype=None),
        graph.node("BitShift", [codes, graph.constant(4, np.uint8)], {"direction": "RIGHT"}, dtype=None),
    ]
    rows = _layout(spec).rows
    halves = graph.node("Concat", parts, {"axis": 1}, dtype=None)
    if rows % 2:
        halves = graph.node("Slice", [halves, *(graph.constant([end]) for end in (0, rows, 1))], dtype=None)
    return graph.node("Cast", [halves], {"to": INT32.value}, dtype=None)


def _book(graph: GraphBuilder, source: Source) -> ir.Value:
    """(groups, stages, entries, vector) float32, made once for all layers that hold it in common."""
    form, name = _form(source.spec), f"{source.spec.name}.weight.codebook"
    if form.share > 1:
        content = _stored(source).tensors["codebook"].numpy().tobytes()
        name = f"codebook.{hashlib.sha256(content).hexdigest()[:32]}"
    shape = (form.groups, form.stages, form.entries, form.vector)
    return graph.float_initializer(name, lambda: _stored(source).tensors["codebook"], torch.float16, shape)


def _scaled(graph: GraphBuilder, source: Source, values: ir.Value) -> ir.Value:
    """values (tokens, in or out) times what their columns count."""
    width, name = source.spec.shape[0 if _form(source.spec).scale == "row" else 1], f"{source.spec.name}.weight.scale"
    scale = graph.float_initializer(name, lambda: _stored(source).tensors["scale"], torch.float16, [width])
    return graph.node("Mul", [values, scale])


def linear(graph: GraphBuilder, source: Source, values: ir.Value) -> ir.Value:
    """values (…, in) → (…, out)."""
    spec = source.spec
    if _form(spec).extras:
        return codebook_pieces.linear(graph, source, values, linear)
    rows, columns = spec.shape
    tokens = graph.node("Reshape", [values, graph.constant([-1, columns])])
    if _form(spec).scale == "column":
        tokens = _scaled(graph, source, tokens)
    codes, book = _codes(graph, source), _book(graph, source)
    found = _either(graph, spec, tokens, codes, book) if _has_tables(spec) else _dense(graph, spec, tokens, codes, book)
    layout = _layout(spec)
    width = layout.blocks * layout.rows * (1 if _form(spec).axis == "in" else _form(spec).vector)
    found = graph.node("Reshape", [found, graph.constant([-1, width])])
    if width > rows:
        ends = [graph.constant([end]) for end in (0, rows, 1)]
        found = graph.node("Slice", [found, *ends])
    if _form(spec).scale == "row":
        found = _scaled(graph, source, found)
    ahead = graph.node("Shape", [values], {"end": -1}, dtype=INT64)
    shape = graph.node("Concat", [ahead, graph.constant([rows])], {"axis": 0}, dtype=INT64)
    return add_bias(graph, source, graph.node("Reshape", [found, shape]))


def _either(graph: GraphBuilder, spec: LayerSpec, tokens: ir.Value, codes: ir.Value, book: ir.Value) -> ir.Value:
    """(tokens, in) → (tokens, blocks, rows) by tables for up to `FEW_TOKENS`, else by decoded weights."""
    factors = graph.node("Transpose", [book], {"perm": [1, 0, 3, 2]})  # (stages, groups, vector, entries)
    count = graph.node("Shape", [tokens], {"end": 1}, dtype=INT64)
    ends = [graph.constant(end) for end in (1, FEW_TOKENS)]  # none at all are no matrices to multiply with
    few = graph.node("Equal", [count, graph.node("Clip", [count, *ends], dtype=INT64)], dtype=ir.DataType.BOOL)
    inside = [graph.at(_short(few, name)) for name in "ab"]
    branches = [
        _subgraph(inside[0], [], _tables(inside[0], spec, tokens, codes, factors)),
        _subgraph(inside[1], [], _dense(inside[1], spec, tokens, codes, book)),
    ]
    return graph.node("If", [few], {"then_branch": branches[0], "else_branch": branches[1]})


def _short(value: ir.Value, *place: object) -> str:
    """A name for what is inside an operator that reads a value, at this place. It must differ from those of the whole
    graph, and is most of what such nodes take in a file."""
    return hashlib.sha256(repr((value.name, *place)).encode()).hexdigest()[:12]


def _subgraph(builder: GraphBuilder, inputs: list[ir.Value], output: ir.Value) -> ir.Graph:
    return ir.Graph(inputs, [output], nodes=builder.nodes, name=builder.prefix)


def _over(graph: GraphBuilder, values: ir.Value, kind: ir.DataType, axis: int, body: Body) -> ir.Value:
    """What `body` makes of each of some values along their first axis, side by side along `axis`."""
    inner = graph.at(_short(values, graph.prefix, len(graph.nodes)))
    assert values.shape is not None
    one = ir.Value(name=inner.prefix, shape=ir.Shape(values.shape[1:]), type=ir.TensorType(kind))
    output = body(inner, one)
    output.type = ir.TensorType(ir.DataType.FLOAT)
    settings = {"body": _subgraph(inner, [one], output), "num_scan_inputs": 1, "scan_output_axes": [axis]}
    return graph.node("Scan", [values], settings, dtype=None)


def _tables(graph: GraphBuilder, spec: LayerSpec, tokens: ir.Value, codes: ir.Value, factors: ir.Value) -> ir.Value:
    """(tokens, in) → (tokens, blocks, rows)."""
    form, layout = _form(spec), _layout(spec)
    vectors = graph.constant([-1, 1, form.groups, layout.units // form.groups, form.vector])
    products = graph.node("MatMul", [graph.node("Reshape", [tokens, vectors], dtype=None), factors], dtype=None)
    shape = [-1, layout.stages * layout.units, form.entries]
    tables = graph.node("Reshape", [products, graph.constant(shape)])
    tables.shape = ir.Shape([None, *shape[1:]])

    def block(inner: GraphBuilder, stored: ir.Value) -> ir.Value:
        places = _unpacked(inner, spec, stored)

        def token(one: GraphBuilder, table: ir.Value) -> ir.Value:
            parts = one.node("GatherElements", [table, places], {"axis": 1}, dtype=None)
            return one.node("ReduceSum", [parts, one.constant([0])], {"keepdims": 0}, dtype=None)

        return _over(inner, tables, ir.DataType.FLOAT, 0, token)

    return _over(graph, codes, codes.dtype, 1, block)


def _dense(graph: GraphBuilder, spec: LayerSpec, tokens: ir.Value, codes: ir.Value, book: ir.Value) -> ir.Value:
    """(tokens, in) → (tokens, blocks, rows), where rows are those of the weight. A block of it is decoded as (rows, in)
    or, of vectors along the outputs, as (in, rows)."""
    form, layout = _form(spec), _layout(spec)
    inward = form.axis == "in"
    books = _books(graph, form, book)
    first = np.repeat(np.arange(form.groups) * form.entries, layout.units // form.groups)

    def block(inner: GraphBuilder, stored: ir.Value) -> ir.Value:
        places = _unpacked(inner, spec, stored)
        places = inner.node("Reshape", [places, inner.constant(layout[1:])], dtype=None)
        if form.groups > 1:  # the groups' codebooks follow each other
            places = inner.node("Add", [places, inner.constant(first[:, None], np.int32)], dtype=None)
        if inward:
            places = inner.node("Transpose", [places], {"perm": [0, 2, 1]}, dtype=None)
        weight = _decoded(inner, form, places, books)
        height, width = (layout.rows, spec.shape[1]) if inward else (layout.units, layout.rows * form.vector)
        weight = inner.node("Reshape", [weight, inner.constant([height, width])], dtype=None)
        return inner.node("Gemm", [tokens, weight], {"transB": int(inward)}, dtype=None)

    return _over(graph, codes, codes.dtype, 1, block)


def _books(graph: GraphBuilder, form: Codebook, book: ir.Value) -> list[ir.Value]:
    """(groups, stages, entries, vector) → of each stage (groups · entries, vector)."""
    books = graph.node("Transpose", [book], {"perm": [1, 0, 2, 3]}, dtype=None)
    flat = graph.constant([-1, form.vector])
    return [graph.node("Reshape", [each, flat], dtype=None) for each in _stages(graph, form, books)]


def _decoded(graph: GraphBuilder, form: Codebook, codes: ir.Value, books: list[ir.Value]) -> ir.Value:
    """codes (stages, a, b) → (1, a, b, vector): each stage's entries, added."""
    total: ir.Value | None = None
    for codes_of, book_of in zip(_stages(graph, form, codes), books, strict=True):
        found = graph.node("Gather", [book_of, codes_of], {"axis": 0}, dtype=None)
        total = found if total is None else graph.node("Add", [total, found], dtype=None)
    assert total is not None
    return total


def _stages(graph: GraphBuilder, form: Codebook, values: ir.Value) -> list[ir.Value]:
    """(stages, …) → of each (1, …)."""
    if form.stages == 1:
        return [values]
    settings = {"axis": 0, "num_outputs": form.stages}
    node = graph.node("Split", [values], settings, outputs=form.stages, dtype=None).producer()
    assert node is not None
    return list(node.outputs)


KINDS = frozenset({LayerKind.LINEAR, LayerKind.EXPERT})
LOWERS = Lowering(Honours(KINDS, pre=TRANSFORMED, bias=KINDS), linear=linear)
