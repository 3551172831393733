"""8-bit weights and activations on static grids: standard QuantizeLinear and DequantizeLinear around MatMul and Conv.

ONNX Runtime turns them into integer kernels when it loads the graph; what it fuses is in tests/test_static_qdq.py. It
leaves the bias of a MatMul behind as an addition of its own (5 % of an encoder's time), so where the profile names
com.microsoft MatMulIntegerToFloat that operator is written instead, with the bias in it.
Inputs become uint8 and weights int8, the pair for which its x86 kernels are fastest: a symmetric grid has its zero
point at 128. Layers that are fed the same tensor on the same grid share one QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import Tensor

from compress.export.onnx import conv as convolution
from compress.export.onnx import qdq_edges
from compress.export.onnx.dynamic_quantize import signed_weight
from compress.export.onnx.float_matmul import add_bias, float_bias
from compress.export.onnx.graph import MICROSOFT, GraphBuilder
from compress.export.onnx.lowering import TRANSFORMED, Choice, Lowering, Source
from compress.formats import name_of
from compress.formats.int_grid import IntGrid
from compress.honours import Honours
from compress.hwprofiles import Runtime
from compress.layer import LayerKind, LayerSpec
from compress.records import Bounds
from compress.target import Refusal

# The kernels round as our own decoder does; what remains are inputs that float32 summation order moves across the
# middle between two points of their grid (benchmarks/agreement.py).
BOUNDS = Bounds(shipped=0.25, exact=0.25)
KERNEL = "MatMulIntegerToFloat"
INPUTS = (IntGrid(8, group="tensor"), IntGrid(8, group="tensor", scheme="asymmetric"))


def choose(spec: LayerSpec, runtime: Runtime) -> Choice | Refusal | None:
    """Takes symmetric int2 … int8 weights per channel or tensor with static 8-bit inputs."""
    if spec.act is None or not spec.act.static or spec.format is None:
        return None
    if spec.act.format not in INPUTS:
        return Refusal(f"static inputs in {spec.act.format}: QuantizeLinear takes int8(tensor), with asymmetric or not")
    form = spec.format
    if not isinstance(form, IntGrid) or form.group not in ("channel", "tensor") or form.scheme != "symmetric":
        return Refusal(f"{form}: beside static int8 inputs a weight is int8(channel) or int8(tensor), symmetric")
    if spec.kind not in (LayerKind.LINEAR, LayerKind.CONV):
        return Refusal(f"a {spec.kind} has no rounded input")
    support = runtime.support("weight_and_static_activation", form.bits, format=name_of(form))
    if support.state == "no":
        return Refusal(f"{form} with static inputs: {support.note}", usage=False)
    rows, columns = spec.shape
    note = support.note if support.state != "fast" else ""
    own = spec.kind is LayerKind.LINEAR and support.kernel == KERNEL
    size = rows * columns + rows * (4 if own else 5) + spec.bias_bytes
    operator = KERNEL if own else "QDQ+Conv" if spec.kind is LayerKind.CONV else "QDQ+MatMul"
    speed = support.speed() if own else None
    return Choice(operator, support.state, __name__, size, note, bounds=BOUNDS, speed=speed)


def linear(graph: GraphBuilder, source: Source, values: ir.Value) -> ir.Value:
    """values (…, in) → (…, out)."""
    rows, columns = source.spec.shape
    codes, scale = _weight(graph, source, lambda codes: codes.T, (columns, rows))
    if source.choice.operator == KERNEL:
        rounded, step, zero = _quantized(graph, source, values)
        inputs = [rounded, codes, step, scale, zero, None, float_bias(graph, source)]
        return graph.node(KERNEL, inputs, domain=MICROSOFT)
    weight = _decoded(graph, source, codes, scale, axis=1)
    return add_bias(graph, source, graph.node("MatMul", [_input(graph, source, values), weight]))


def conv(graph: GraphBuilder, source: Source, values: ir.Value, node: ir.Node) -> ir.Value:
    """values (batch, channels, h, w) → (batch, out, h', w'); node: the placeholder. `close` looks after its output."""
    shape = convolution.weight_shape(source.spec)
    rounded = _input(graph, source, values)
    codes, scale = _weight(graph, source, lambda codes: codes.reshape(shape), shape)
    weight = _decoded(graph, source, codes, scale, axis=0)
    inputs = [rounded, weight, float_bias(graph, source)]
    out = graph.node("Conv", inputs, convolution.attributes(node))
    graph.shared[("static convolution", source.spec.name)] = qdq_edges.Output(out, *_grid(source, "output_"))
    return out


def _grid(source: Source, prefix: str = "") -> tuple[float, int]:
    """Scale and zero point of the layer's inputs or outputs."""
    act = source.read().act
    assert act is not None and act.params is not None
    zero = act.params.get(f"{prefix}zero")
    return float(act.params[f"{prefix}scale"]), 128 if zero is None else int(zero)


def _quantized(graph: GraphBuilder, source: Source, values: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """values as codes on the layer's grid, and its scale and zero point."""
    scale, zero = qdq_edges.grid_constants(graph, *_grid(source))
    key = ("quantized", id(values), id(scale), id(zero))
    if key not in graph.shared:
        graph.shared[key] = graph.node("QuantizeLinear", [values, scale, zero], dtype=ir.DataType.UINT8)
    return graph.shared[key], scale, zero


def _input(graph: GraphBuilder, source: Source, values: ir.Value) -> ir.Value:
    """values on the layer's grid, as float32 again."""
    return graph.node("DequantizeLinear", list(_quantized(graph, source, values)))


def _weight(
    graph: GraphBuilder, source: Source, turn: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> tuple[ir.Value, ir.Value]:
    """Codes, as `turn` makes them of (out, in), in that shape, and scales (out,)."""
    name, rows = f"{source.spec.name}.weight", source.spec.shape[0]
    return (
        graph.initializer(f"{name}.codes", lambda: turn(signed_weight(source)[0]), torch.int8, shape),
        graph.initializer(f"{name}.scale", lambda: signed_weight(source)[1], torch.float32, (rows,)),
    )


def _decoded(graph: GraphBuilder, source: Source, codes: ir.Value, scale: ir.Value, axis: int) -> ir.Value:
    """The weight as float32, its output channels on `axis`.

    Its zero points are written out: where they are missing ONNX Runtime takes uint8 for the type.
    """
    name, rows = f"{source.spec.name}.weight.zero", source.spec.shape[0]
    zero = graph.initializer(name, lambda: torch.zeros(rows, dtype=torch.int8), torch.int8, (rows,))
    return graph.node("DequantizeLinear", [codes, scale, zero], {"axis": axis})


KINDS = frozenset({LayerKind.LINEAR, LayerKind.CONV})
LOWERS = Lowering(Honours(KINDS, act=KINDS, pre=TRANSFORMED, bias=KINDS), linear=linear, conv=conv)
