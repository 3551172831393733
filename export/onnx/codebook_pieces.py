"""A codebook with outlier columns, an order of columns or a bias: the products of its pieces, added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir
import torch
from torch import Tensor

from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.lowering import Linear, Source
from compress.formats import codebook_columns
from compress.formats.base import QuantTensor
from compress.formats.codebook import Codebook
from compress.formats.codebook_columns import Piece
from compress.layer import Layer, LayerSpec

# bytes of nodes beside those of the products, fitted on a Llama of 8 blocks
PICKED, SUMMED, BIASED = 600, 1900, 900


def piece_specs(spec: LayerSpec) -> list[LayerSpec]:
    """The layer as one for each piece: the outlier columns, where there are any, and all others, which have its name
    and its bias."""
    form, (rows, columns) = _form(spec), spec.shape
    count = codebook_columns.outlier_count(form, columns)
    main = replace(spec, format=form.main, shape=(rows, columns - count))
    if not count:
        return [main]
    aside = codebook_columns.outlier_form(form)
    return [replace(spec, name=f"{spec.name}.outliers", format=aside, shape=(rows, count), has_bias=False), main]


def bytes_beside(spec: LayerSpec) -> int:
    """Stored bytes of what is not in the pieces: the bias, and the places of columns in four bytes each."""
    form, specs = _form(spec), _form(spec).tensor_specs(spec.shape)
    bias = 2 * specs["bias"][0][0] if "bias" in specs else 0
    return bias + (4 * spec.shape[1] if form.only_learned else 0)


def graph_bytes(spec: LayerSpec) -> int:
    """Bytes of the nodes beside those of the pieces."""
    form, count = _form(spec), len(piece_specs(spec))
    biased = count if form.bias == "column" else int(form.bias == "row")
    return PICKED * count * bool(form.only_learned) + SUMMED * (count - 1) + BIASED * biased


def linear(graph: GraphBuilder, source: Source, values: ir.Value, plain: Linear) -> ir.Value:
    """values (…, in) → (…, out); plain: how one piece is written."""
    form, specs = _form(source.spec), piece_specs(source.spec)
    total: ir.Value | None = None
    for at, spec in enumerate(specs):
        own = _picked(graph, source, spec, at, values) if form.only_learned else values
        found = plain(graph, Source(spec, source.choice, lambda at=at: _layer(source, at)), own)  # type: ignore[misc]
        found = _biased(graph, source, at, own, found, len(specs))
        total = found if total is None else graph.node("Add", [total, found])
    assert total is not None
    return total


def _picked(graph: GraphBuilder, source: Source, spec: LayerSpec, at: int, values: ir.Value) -> ir.Value:
    """The piece's columns of the input."""
    shape = (spec.shape[1],)
    places = graph.typed(f"{spec.name}.weight.order", lambda: _piece(source, at).columns, ir.DataType.INT32, shape)
    return graph.node("Gather", [values, places], {"axis": -1})


def _biased(graph: GraphBuilder, source: Source, at: int, values: ir.Value, found: ir.Value, count: int) -> ir.Value:
    """With the bias of columns, which all outputs get alike, or of rows, which goes with the sum of the inputs."""
    kind, name = _form(source.spec).bias, f"{piece_specs(source.spec)[at].name}.weight.bias"
    if kind == "none" or (kind == "row" and at + 1 < count):
        return found
    rows, columns = piece_specs(source.spec)[at].shape
    size = (columns, 1) if kind == "column" else (1, rows)

    def made() -> Tensor:
        bias = _piece(source, at).bias
        assert bias is not None
        return bias.half().reshape(size)

    bias = graph.float_initializer(name, made, torch.float16, size)
    if kind == "column":
        return graph.node("Add", [found, graph.node("MatMul", [values, bias])])
    whole = graph.node("ReduceSum", [values, graph.constant([-1])], {"keepdims": 1})
    return graph.node("Add", [found, graph.node("Mul", [whole, bias])])


def _layer(source: Source, at: int) -> Layer:
    layer, pieces = source.read(), _pieces(source)
    bias = layer.bias if at + 1 == len(pieces) else None
    return replace(layer, weight=QuantTensor(pieces[at].form, pieces[at].tensors, pieces[at].shape), bias=bias)


def _piece(source: Source, at: int) -> Piece:
    return _pieces(source)[at]


def _pieces(source: Source) -> Sequence[Piece]:
    weight = source.read().weight
    assert isinstance(weight, QuantTensor) and isinstance(weight.format, Codebook)
    return weight.format.pieces(weight.tensors, weight.shape)


def _form(spec: LayerSpec) -> Codebook:
    assert isinstance(spec.format, Codebook)
    return spec.format
