"""What OpenVINO takes, and how a layer is stored for it."""

from __future__ import annotations

from dataclasses import replace

from compress.export.onnx import static_qdq
from compress.export.onnx.lowering import Choice
from compress.formats import name_of
from compress.formats.codebook import Codebook
from compress.formats.int_grid import IntGrid
from compress.formats.trellis import Trellis
from compress.hwprofiles import Profile, Runtime
from compress.layer import LayerKind, LayerSpec
from compress.records import Bounds
from compress.target import Refusal

RUNTIME = "openvino"
LOWERING = "compress.export.openvino.lowering"
OPERATORS = {LayerKind.EMBEDDING: "Gather", LayerKind.CONV: "Convolution"}
# Its kernels for 4-bit and 8-bit weights may round inputs to 8 bits by themselves, as MatMulNBits does; the setting
# DYNAMIC_QUANTIZATION_GROUP_SIZE 0 switches that off.
INT8_ACTIVATIONS = Bounds(shipped=0.25)


def runtime_of(profile: Profile) -> Runtime | Refusal:
    """The profile's OpenVINO; refuses a profile without."""
    found = profile.runtimes.get(RUNTIME)
    if found is None:
        return Refusal(f"{profile.id} has no runtime {RUNTIME}: take a profile of an x86 CPU, as cpu-x86-avx2")
    return found


def choose(spec: LayerSpec, profile: Profile) -> Choice | Refusal:
    """How a layer is stored, or why it is not."""
    runtime = runtime_of(profile)
    if isinstance(runtime, Refusal):
        return runtime
    if spec.kind is LayerKind.EXPERT:
        return Refusal("a mixture of experts was never tried in OpenVINO; export for onnx", usage=False)
    if spec.act is not None:
        return _rounded(spec, runtime)
    operator = OPERATORS.get(spec.kind, "MatMul")
    if spec.format is None:
        return Choice(operator, "fast", LOWERING, spec.source_bytes + spec.bias_bytes)
    return _weight_only(spec, runtime, operator)


def _rounded(spec: LayerSpec, runtime: Runtime) -> Choice | Refusal:
    """Weights and inputs in 8 bits."""
    assert spec.act is not None
    if not spec.act.static:
        wanted = f"act_quant(format={static_qdq.INPUTS[1]}, static=true)"
        return Refusal(f"inputs in {spec.act.format}: OpenVINO rounds inputs on grids fixed beforehand; use {wanted}")
    found = static_qdq.choose(spec, runtime)
    if found is None:
        return Refusal(f"its input is {spec.act}, but its weight is not quantized; quantize it, e.g. to int8(channel)")
    if isinstance(found, Refusal):
        return found
    rows, columns = spec.shape
    operator = f"FakeQuantize+{OPERATORS.get(spec.kind, 'MatMul')}"
    return replace(found, operator=operator, lowering=LOWERING, stored_bytes=rows * (columns + 4) + spec.bias_bytes)


def _weight_only(spec: LayerSpec, runtime: Runtime, operator: str) -> Choice | Refusal:
    """Weights in 4 or 8 bits, decoded by the kernel or, of a convolution, when the model is loaded."""
    form, (rows, columns) = spec.format, spec.shape
    if not isinstance(form, IntGrid):
        other = "onnx or native" if isinstance(form, Codebook) else "onnx or checkpoint"
        other = "checkpoint-exl3" if isinstance(form, Trellis) else other
        told = f"of this target only integer grids are stored; take int4(group=128), or export for {other}"
        return Refusal(f"{form}: {told}")
    support = runtime.support("weight_only", form.bits, format=name_of(form))
    if support.state == "no":
        return Refusal(f"{form}: {support.note.removesuffix('.')}", usage=False)
    if columns % form.group_size(columns):
        return Refusal(f"{form}: {columns} inputs are no whole number of groups; take a divisor of {columns}")
    groups = columns // form.group_size(columns)
    bits = support.stored_bits
    zeros = {"asymmetric": bits / 8, "float_zero": 2.0}.get(form.scheme, 0.0)
    size = rows * columns * bits // 8 + round(rows * groups * (2 + zeros)) + spec.bias_bytes
    slow = spec.kind is LayerKind.CONV
    note = CONV_NOTE if slow else "" if support.state == "fast" else support.note
    state = "works" if slow else support.state
    bounds = INT8_ACTIVATIONS if spec.kind is LayerKind.LINEAR else Bounds()
    return Choice(f"{operator} int{bits}", state, LOWERING, size, note, stored_bits=bits, bounds=bounds)


CONV_NOTE = "smaller on disk only: the weights are decoded to float32 when the model is loaded"
