"""Weight-only integer grids of convolutions: Cast, Mul and Reshape in front of a float32 Conv.

The runtime has no convolution of such weights. It computes these nodes once, when it loads the graph, so the file is
small while memory and speed are those of float32. DequantizeLinear would say the same, but ONNX Runtime keeps it for
its own fusions and decodes on every call (1.31.1, 128 channels at 8x8: 1.5 times slower than float32).
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from compress.export.onnx import conv as convolution
from compress.export.onnx.float_matmul import float_bias
from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.lowering import Choice, Lowering, Source
from compress.formats.base import QuantTensor
from compress.formats.int_grid import IntGrid
from compress.honours import Honours
from compress.hwprofiles import Runtime
from compress.layer import LayerKind, LayerSpec
from compress.target import Refusal

NOTE = "smaller on disk only: the weights are decoded to float32 when the graph is loaded"


def choose(spec: LayerSpec, runtime: Runtime) -> Choice | Refusal | None:
    """Takes every integer grid; a short last group is filled up."""
    if spec.kind is not LayerKind.CONV or spec.format is None or spec.act is not None:
        return None
    form = spec.format
    if not isinstance(form, IntGrid):
        return Refusal(f"a convolution's weight in {form}: only integer grids are stored")
    if form.scheme == "float_zero":
        return Refusal(f"a convolution's weight in {form}: float zero points are not stored; use asymmetric")
    return Choice("Cast+Mul+Conv", "works", __name__, _stored_bytes(spec, form), NOTE)


def _layout(spec: LayerSpec) -> tuple[int, int, int]:
    """(out, groups, columns per group) of the stored codes."""
    assert isinstance(spec.format, IntGrid)
    size = min(spec.format.group_size(spec.shape[1]), spec.shape[1])
    return spec.shape[0], -(-spec.shape[1] // size), size


def _stored_bytes(spec: LayerSpec, form: IntGrid) -> int:
    rows, groups, size = _layout(spec)
    codes, scales = rows * groups * size, rows * groups
    zeros = scales if form.scheme == "asymmetric" else 0
    packed = -(-codes // 2) - (-zeros // 2) if form.bits <= 4 else codes + zeros
    return packed + 2 * scales + spec.bias_bytes


def _tensors(source: Source) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, groups, group), scales (out, groups, 1), zero points (out, groups, 1).

    Codes of a grid without zero points are signed.
    """
    weight = source.read().weight
    assert isinstance(weight, QuantTensor) and isinstance(weight.format, IntGrid)
    codes, scale, zero = weight.format.unpack(weight.tensors, weight.shape)
    rows, groups, size = _layout(source.spec)
    scale, zero = (tensor[:, :groups, None].contiguous() for tensor in (scale, zero))
    codes = torch.nn.functional.pad(codes, (0, groups * size - codes.shape[1])).reshape(rows, groups, size)
    if weight.format.scheme != "asymmetric":
        codes = (codes.to(torch.int16) - zero.to(torch.int16)).to(torch.int8)
    return codes, scale, zero


def conv(graph: GraphBuilder, source: Source, values: ir.Value, node: ir.Node) -> ir.Value:
    """values (batch, channels, h, w) → (batch, out, h', w')."""
    spec = source.spec
    assert isinstance(spec.format, IntGrid)
    name, (rows, groups, size) = f"{spec.name}.weight", _layout(spec)
    shifted = spec.format.scheme == "asymmetric"
    dtype, narrow = torch.uint8 if shifted else torch.int8, spec.format.bits <= 4
    stored = graph.initializer(f"{name}.codes", lambda: _tensors(source)[0], dtype, (rows, groups, size), narrow)
    scale = graph.float_initializer(f"{name}.scale", lambda: _tensors(source)[1], torch.float16, (rows, groups, 1))
    codes = graph.node("Cast", [stored], {"to": ir.DataType.FLOAT.value})
    if shifted:
        zero = graph.initializer(f"{name}.zero", lambda: _tensors(source)[2], dtype, (rows, groups, 1), narrow)
        codes = graph.node("Sub", [codes, graph.node("Cast", [zero], {"to": ir.DataType.FLOAT.value})])
    weight = graph.node("Mul", [codes, scale])
    if groups * size != spec.shape[1]:
        flat = graph.node("Reshape", [weight, graph.constant([rows, groups * size])])
        ends = [graph.constant([value]) for value in (0, spec.shape[1], 1)]
        weight = graph.node("Slice", [flat, *ends])
    weight = graph.node("Reshape", [weight, graph.constant(convolution.weight_shape(spec))])
    return graph.node("Conv", [values, weight, float_bias(graph, source)], convolution.attributes(node))


KINDS = frozenset({LayerKind.CONV})
LOWERS = Lowering(Honours(KINDS, bias=KINDS), conv=conv)
