"""8-bit weights and activations: com.microsoft DynamicQuantizeMatMul, one dynamic grid for the whole input."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from compress.export.onnx.float_matmul import float_bias
from compress.export.onnx.graph import MICROSOFT, GraphBuilder
from compress.export.onnx.lowering import Choice, Lowering, Source
from compress.formats import name_of
from compress.formats.base import QuantTensor
from compress.formats.int_grid import IntGrid
from compress.honours import Honours
from compress.hwprofiles import Runtime
from compress.layer import LayerKind, LayerSpec
from compress.records import Bounds
from compress.target import Refusal

INPUT = IntGrid(8, group="tensor", scheme="asymmetric")
# The kernel rounds as our own decoder does; what remains are inputs that float32 summation order moves across the
# middle between two points of their grid: 0.03 of the largest logit on pycoder, 0.06 on a model of 64 features
# (benchmarks/agreement.py). There is no exact form of this kernel to compare with.
BOUNDS = Bounds(shipped=0.25, exact=0.25)


def choose(spec: LayerSpec, runtime: Runtime) -> Choice | Refusal | None:
    """Takes symmetric int2 … int8 weights per channel or tensor with `int8(tensor, asymmetric)` inputs."""
    if spec.act is None or spec.act.static or spec.format is None:
        return None
    if spec.act.format != INPUT:
        return Refusal(f"inputs in {spec.act.format}: DynamicQuantizeMatMul rounds them to {INPUT} only")
    form = spec.format
    shifted = isinstance(form, IntGrid) and form.scheme in ("asymmetric", "float_zero")
    if not isinstance(form, IntGrid) or form.group not in ("channel", "tensor") or shifted:
        return Refusal(f"{form}: DynamicQuantizeMatMul takes int8(channel) or int8(tensor), not this group or scheme")
    if spec.kind is not LayerKind.LINEAR:
        return Refusal(f"a {spec.kind} has no rounded input")
    support = runtime.support("weight_and_activation", form.bits, format=name_of(form))
    if support.state == "no":
        return Refusal(f"{form}: {support.note}", usage=False)
    rows, columns = spec.shape
    note = support.note if support.state != "fast" else ""
    size = rows * columns + rows * 4 + spec.bias_bytes
    return Choice("DynamicQuantizeMatMul", support.state, __name__, size, note, bounds=BOUNDS, speed=support.speed())


def signed_weight(source: Source) -> tuple[Tensor, Tensor]:
    """Weight (out, in) int8 and scale (out,) float32 of a grid without zero points."""
    weight = source.read().weight
    assert isinstance(weight, QuantTensor) and isinstance(weight.format, IntGrid)
    codes, scale, zero = weight.format.unpack(weight.tensors, weight.shape)
    signed = codes.to(torch.int16) - zero[:, :1].to(torch.int16)
    return signed.to(torch.int8), scale[:, 0].float().contiguous()


def linear(graph: GraphBuilder, source: Source, values: ir.Value) -> ir.Value:
    """values (…, in) → (…, out)."""
    name, (rows, columns) = f"{source.spec.name}.weight", source.spec.shape
    weight = graph.initializer(f"{name}.codes", lambda: signed_weight(source)[0].T, torch.int8, (columns, rows))
    scale = graph.initializer(f"{name}.scale", lambda: signed_weight(source)[1], torch.float32, (rows,))
    inputs = [values, weight, scale, None, float_bias(graph, source)]
    return graph.node("DynamicQuantizeMatMul", inputs, domain=MICROSOFT)


KINDS = frozenset({LayerKind.LINEAR})
LOWERS = Lowering(Honours(KINDS, act=KINDS, pre=KINDS, bias=KINDS), linear=linear)
