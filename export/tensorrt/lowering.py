"""Quantized layers in the form that TensorRT knows: QuantizeLinear and DequantizeLinear in front of MatMul and Conv,
DequantizeLinear in front of an embedding's Gather: its builder takes codes nowhere else.

Codes stand in the file as the type that they are (INT8, INT4, FLOAT8E4M3FN, FLOAT4E2M1), input columns first, so that
DequantizeLinear feeds the product directly and blocks run along the first axis; of an embedding rows first. TensorRT
is strongly typed: the scales' type is that of the product: bfloat16, or float16 unless a scale is too small for it.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import Tensor

from compress.export.onnx import conv as convolution
from compress.export.onnx.float_matmul import add_bias, float_bias
from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.lowering import TRANSFORMED, Lowering, Source
from compress.export.tensorrt.rules import EngineChoice
from compress.formats.base import QuantTensor
from compress.formats.float_grid import FloatGrid
from compress.formats.int_grid import IntGrid
from compress.honours import Honours
from compress.layer import LayerKind
from compress.maths import floats

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
SMALLEST = 2.0**-17
"""Scales from here on are within 0.4 % in float16, whose numbers thin out below 2^-14."""
CODES = {"INT8": ir.DataType.INT8, "INT4": ir.DataType.INT4, "FP8": ir.DataType.FLOAT8E4M3FN}
CODES["FP4"] = ir.DataType.FLOAT4E2M1
PARSER, DYNAMIC_FP4, FP4_BLOCK = "trt", "TRT_FP4DynamicQuantize", 16
"""Domain of what TensorRT's parser knows beyond ONNX, its operator that rounds to FP4 at run time, and its blocks."""


def linear(graph: GraphBuilder, source: Source, values: ir.Value) -> ir.Value:
    """values (…, in) → (…, out)."""
    rows, columns = source.spec.shape
    kind = _compute(source)
    if source.spec.kind is LayerKind.EMBEDDING:
        weight = graph.node("Transpose", [_table(graph, source, kind)], {"perm": [1, 0]}, dtype=kind)
    else:
        weight = _weight(graph, source, kind, lambda codes: codes.T, (columns, rows), axis=1)
    out = graph.node("MatMul", [_input(graph, source, kind, values), weight], dtype=kind)
    return add_bias(graph, source, _cast(graph, out, kind, FLOAT))


def gather(graph: GraphBuilder, source: Source, ids: ir.Value) -> ir.Value:
    """ids (…) → (…, features), from the table that a tied head also reads."""
    kind = _compute(source)
    return _cast(graph, graph.node("Gather", [_table(graph, source, kind), ids], {"axis": 0}, dtype=kind), kind, FLOAT)


def _table(graph: GraphBuilder, source: Source, kind: ir.DataType) -> ir.Value:
    """An embedding's weight (rows, features), decoded once for the look-up and a tied head."""
    key = ("table", source.spec.name)
    if key not in graph.shared:
        graph.shared[key] = _weight(graph, source, kind, lambda codes: codes, source.spec.shape, axis=0)
    return graph.shared[key]


def conv(graph: GraphBuilder, source: Source, values: ir.Value, node: ir.Node) -> ir.Value:
    """values (batch, channels, h, w) → (batch, out, h', w'); node: the placeholder."""
    shape, kind = convolution.weight_shape(source.spec), _compute(source)
    weight = _weight(graph, source, kind, lambda codes: codes.reshape(shape), shape, axis=0)
    bias = float_bias(graph, source)
    inputs = [_input(graph, source, kind, values), weight, None if bias is None else _cast(graph, bias, FLOAT, kind)]
    out = graph.node("Conv", inputs, convolution.attributes(node), dtype=kind)
    return _cast(graph, out, kind, FLOAT)


def _compute(source: Source) -> ir.DataType:
    """Type of a layer's scales and product."""
    assert isinstance(source.choice, EngineChoice)
    if source.choice.compute != "float16":
        return ir.DataType.BFLOAT16 if source.choice.compute == "bfloat16" else FLOAT
    smallest = min(float(scale.min()) for scale in _scales(source))
    return HALF if smallest >= SMALLEST else FLOAT


def _scales(source: Source) -> list[Tensor]:
    layer = source.read()
    assert isinstance(layer.weight, QuantTensor)
    found = [decoded(layer.weight)[1]]
    if "global_scale" in layer.weight.tensors:
        found.append(1.0 / layer.weight.tensors["global_scale"].float())
    if layer.act is not None and layer.act.params is not None:
        params = layer.act.params
        found.append(1.0 / params["global_scale"].float() if "global_scale" in params else params["scale"].float())
    return found


def decoded(weight: QuantTensor) -> tuple[Tensor, Tensor]:
    """What the codes stand for, (out, in), int8 or float32, and their scales (out, groups) float32, 1 for a group of
    zeros: TensorRT wants scales above 0."""
    form = weight.format
    if isinstance(form, IntGrid):
        stored, scale, zero = form.unpack(weight.tensors, weight.shape)
        codes = (stored.to(torch.int16) - zero[:, :1].to(torch.int16)).to(torch.int8)
    else:
        assert isinstance(form, FloatGrid)
        stored, scale = form.unpack(weight.tensors, weight.shape)
        codes = floats.decode(stored, form.kind)
    filled = (codes.reshape(*scale.shape, -1) != 0).any(-1)
    return codes, torch.where(filled, scale.float(), 1.0)


def _weight(
    graph: GraphBuilder,
    source: Source,
    kind: ir.DataType,
    turn: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    axis: int,
) -> ir.Value:
    """The decoded weight in the product's type. turn: codes (out, in) → shape; axis: of the output channels. Blocks
    run along the other one of two."""
    name, (rows, columns), block = f"{source.spec.name}.weight", source.spec.shape, source.choice.block

    def read() -> QuantTensor:
        weight = source.read().weight
        assert isinstance(weight, QuantTensor)
        return weight

    stored = CODES[source.choice.operator.split()[1]]
    codes = graph.typed(f"{name}.codes", lambda: turn(decoded(read())[0]), stored, shape)
    form = source.spec.format
    if isinstance(form, FloatGrid) and form.shares_peak:
        scale = _two_levels(graph, source, read, kind, axis)
    elif block:
        sizes = (columns // block, rows)[:: 1 if axis else -1]
        scale = graph.typed(f"{name}.scale", lambda: _along(decoded(read())[1], axis), kind, sizes)
    else:
        scale = graph.typed(f"{name}.scale", lambda: decoded(read())[1][:, 0], kind, (rows,))
    attributes = {"axis": 1 - axis, "block_size": block} if block else {"axis": axis}
    return graph.node("DequantizeLinear", [codes, scale], attributes, dtype=kind)


def _along(scales: Tensor, axis: int) -> Tensor:
    """Scales (out, blocks), as they lie beside codes whose output channels are on `axis`."""
    return scales.T if axis else scales


def _two_levels(
    graph: GraphBuilder, source: Source, read: Callable[[], QuantTensor], kind: ir.DataType, axis: int
) -> ir.Value:
    """NVFP4's scales, beside codes whose output channels are on `axis`: FP8 times one float for the tensor."""
    (rows, columns), name = source.spec.shape, f"{source.spec.name}.weight"

    def blocks() -> Tensor:
        return _along(read().tensors["scale"].view(torch.float8_e4m3fn).float(), axis)

    shape = (columns // source.choice.block, rows)[:: 1 if axis else -1]
    inner = graph.typed(f"{name}.scale", blocks, ir.DataType.FLOAT8E4M3FN, shape)
    outer = graph.typed(f"{name}.global_scale", lambda: 1.0 / read().tensors["global_scale"].float()[0], kind, ())
    return graph.node("DequantizeLinear", [inner, outer], dtype=kind)


def _input(graph: GraphBuilder, source: Source, kind: ir.DataType, values: ir.Value) -> ir.Value:
    """What the product reads: values, rounded to the layer's grid if it has one, in the product's type."""
    if source.spec.act is None:
        return _cast(graph, values, FLOAT, kind)
    act = source.read().act
    assert act is not None and act.params is not None
    if act.format.shares_peak:
        outer = graph.constant(1.0 / float(act.params["global_scale"]), kind.numpy())
        whole = _of_known_width(graph, values, source.spec.shape[1])
        return _blocks_at_run_time(graph, _cast(graph, whole, FLOAT, kind), outer, kind)
    scale = graph.constant(float(act.params["scale"]), kind.numpy())
    whole = isinstance(act.format, IntGrid)
    kinds = ir.DataType.INT8 if whole else ir.DataType.FLOAT8E4M3FN
    key = ("rounded", values, scale, kinds)
    if key not in graph.shared:
        zero = graph.typed(f"zero_{kinds.name.lower()}", lambda: torch.zeros((), dtype=torch.int8), kinds, ())
        codes = graph.node("QuantizeLinear", [_cast(graph, values, FLOAT, kind), scale, zero], dtype=kinds)
        graph.shared[key] = graph.node("DequantizeLinear", [codes, scale, zero], dtype=kind)
    return graph.shared[key]


def _of_known_width(graph: GraphBuilder, values: ir.Value, width: int) -> ir.Value:
    """values (…, width), whose width the builder knows beforehand: it does not follow that of every reshaped value."""
    key = ("width", values)
    if key not in graph.shared:
        if values.shape is not None:
            shape = graph.constant([*[0] * (len(values.shape) - 1), width])
        else:
            integer = ir.DataType.INT64
            outer = graph.node("Shape", [values], {"end": -1}, dtype=integer)
            shape = graph.node("Concat", [outer, graph.constant([width])], {"axis": 0}, dtype=integer)
        graph.shared[key] = graph.node("Reshape", [values, shape])
    return graph.shared[key]


def _blocks_at_run_time(graph: GraphBuilder, values: ir.Value, scale: ir.Value, kind: ir.DataType) -> ir.Value:
    """NVFP4 inputs: FP4 in blocks along the features, whose FP8 scales the engine fits at run time under one that is
    fixed for the tensor, by an operator of the parser's own; then both levels decoded."""
    key = ("rounded", values, scale)
    if key not in graph.shared:
        fp8, fp4, blocks = ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1, {"axis": -1, "block_size": FP4_BLOCK}
        settings = {**blocks, "scale_type": fp8.value}
        codes = graph.node(DYNAMIC_FP4, [values, scale], settings, domain=PARSER, outputs=2, dtype=fp4)
        scales = graph.nodes[-1].outputs[1]
        scales.type = ir.TensorType(fp8)
        inner = graph.node("DequantizeLinear", [scales, scale], dtype=kind)
        graph.shared[key] = graph.node("DequantizeLinear", [codes, inner], blocks, dtype=kind)
    return graph.shared[key]


def _cast(graph: GraphBuilder, value: ir.Value, have: ir.DataType, want: ir.DataType) -> ir.Value:
    """The same value in another type; layers that read one tensor share the node."""
    if have is want:
        return value
    key = ("cast", value, want)
    if key not in graph.shared:
        graph.shared[key] = graph.node("Cast", [value], {"to": want.value}, dtype=want)
    return graph.shared[key]


KINDS = frozenset(LayerKind)
# of an embedding it is the head that reads it whose inputs may be rounded
LOWERS = Lowering(
    Honours(KINDS, act=KINDS, pre=TRANSFORMED, bias=KINDS),
    linear=linear,
    gather=gather,
    conv=conv,
)
