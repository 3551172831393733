"""What TensorRT takes, checked before anything is built: types, symmetric zero points, axes and the chip's formats.

The formats of a chip stand in its profile; tests/data/tensorrt_rtx.json holds the builder's own answers to them.
"""

from __future__ import annotations

from dataclasses import dataclass

from compress.export.onnx import float_matmul
from compress.export.onnx.lowering import Choice
from compress.formats.float_grid import FloatGrid
from compress.formats.int_grid import IntGrid
from compress.hwprofiles import Element, Profile, Runtime, Support, Use
from compress.layer import LayerKind, LayerSpec
from compress.records import Bounds
from compress.target import Refusal

RTX, FULL = "tensorrt-rtx", "tensorrt"
"""Runtimes in profiles: TensorRT-RTX, which builds for another machine, and TensorRT, which builds on its own."""
LOWERING = "compress.export.tensorrt.lowering"
FLOAT_TYPES = ("float16", "float32")
INPUTS = {"integer": IntGrid(8, group="tensor"), "float": FloatGrid(4, 3, group="tensor")}
# Products in half precision: its rounding, which later blocks amplify (benchmarks/tensorrt_matrix.py).
HALF_BOUNDS = Bounds(shipped=0.05, exact=0.05)
# As export/onnx/static_qdq.py: inputs that rounding moves across the middle between two points of their grid. Those of
# E4M3 are up to an eighth apart: 0.16 on random models of 2 blocks, where int8 has 0.08.
STATIC_BOUNDS = {"integer": Bounds(shipped=0.25, exact=0.25), "float": Bounds(shipped=0.5, exact=0.5)}


@dataclass(frozen=True)
class EngineChoice(Choice):
    """A layer's way into the engine. compute: type of its product, `float16` or `float32`."""

    compute: str = "float16"


def runtime_of(profile: Profile) -> Runtime | Refusal:
    """The profile's TensorRT. Refuses one for other machines, and types that this target does not compute in."""
    found = profile.runtimes.get(RTX) or profile.runtimes.get(FULL)
    if found is None or profile.gpu is None:
        return Refusal(f"{profile.id} has no runtime {RTX} or {FULL}: take a profile of an NVIDIA GPU, as nvidia-l4")
    if found.float_dtype not in FLOAT_TYPES:
        return Refusal(f"{profile.id} asks for {found.float_dtype}; this target computes in {' or '.join(FLOAT_TYPES)}")
    return found


def choose(spec: LayerSpec, profile: Profile) -> EngineChoice | Refusal:
    """How a layer is stored, or why TensorRT does not take it, on any chip or on this one."""
    runtime, element = runtime_of(profile), _element(spec)
    problem = _problem(spec, element)
    if problem is not None:
        return problem
    if isinstance(runtime, Refusal):
        return runtime
    if spec.format is None:
        return _float(spec, runtime)
    static = spec.act is not None
    use: Use = "weight_and_static_activation" if static else "weight_only"
    assert isinstance(spec.format, IntGrid | FloatGrid)
    support = runtime.support(use, spec.format.bits, element)
    if support.state == "no":
        inputs = " with static inputs" if static else ""
        return Refusal(f"{spec.format}{inputs}: {support.note.removesuffix('.')}", usage=False)
    return _block(spec, support) or _choice(spec, support, runtime)


def _element(spec: LayerSpec) -> Element:
    return "integer" if isinstance(spec.format, IntGrid) else "float"


def _problem(spec: LayerSpec, element: Element) -> Refusal | None:
    """What no chip takes."""
    if spec.kind is LayerKind.EXPERT:
        return Refusal("a mixture of experts: its loop was never tried in TensorRT; export for onnx", usage=False)
    if spec.format is None:
        return None
    if spec.kind is LayerKind.EMBEDDING:
        return Refusal(f"an embedding in {spec.format}: look-ups stay in float for TensorRT; leave this layer out")
    told = _weight(spec) or _inputs(spec, element)
    return Refusal(told) if told else None


def _float(spec: LayerSpec, runtime: Runtime) -> EngineChoice | Refusal:
    found = float_matmul.choose(spec, runtime)
    assert found is not None
    if isinstance(found, Refusal):
        return found
    bounds = HALF_BOUNDS if runtime.float_dtype == "float16" else Bounds()
    return EngineChoice(
        found.operator, found.kernel, found.lowering, found.stored_bytes, bounds=bounds, compute=runtime.float_dtype
    )


def _weight(spec: LayerSpec) -> str:
    """What is wrong with the weight's format; empty where nothing."""
    form = spec.format
    if isinstance(form, IntGrid):
        return "" if form.scheme == "symmetric" else f"{form}: TensorRT takes symmetric grids, without zero points"
    if not isinstance(form, FloatGrid):
        return f"{form}: TensorRT has no such type; it takes int8, int4, fp8_e4m3, fp4_e2m1 and nvfp4"
    if (form.exponent, form.mantissa) not in ((4, 3), (2, 1)):
        return f"{form}: of small floats TensorRT takes fp8_e4m3, fp4_e2m1 and nvfp4"
    if form.bits == 8 and (form.scale == "float8_e4m3" or isinstance(form.group, int)):
        return f"{form}: FP8 weights have one scale per output row: fp8_e4m3(channel)"
    return ""


def _inputs(spec: LayerSpec, element: Element) -> str:
    """What is wrong with the layer's inputs; empty where nothing, or where they stay in float."""
    if spec.act is None:
        return ""
    if spec.act.static and spec.act.format != INPUTS[element]:
        return f"inputs in {spec.act}: beside {spec.format} they are static {INPUTS[element]}, symmetric"
    if not spec.act.static:
        wanted = f"act_quant(format={INPUTS[element]}, static=true)"
        return f"inputs in {spec.act.format}: TensorRT rounds inputs on grids that are fixed beforehand; use {wanted}"
    assert isinstance(spec.format, IntGrid | FloatGrid)
    if spec.format.group not in ("channel", "tensor") or (element == "float" and spec.format.bits != 8):
        known = "int8(channel)" if element == "integer" else "fp8_e4m3(channel)"
        return f"{spec.format}: beside rounded inputs a weight is {known}"
    return ""


def _block(spec: LayerSpec, support: Support) -> Refusal | None:
    """What is wrong with the groups of a weight."""
    form, columns = spec.format, spec.shape[1]
    assert isinstance(form, IntGrid | FloatGrid)
    if not isinstance(form.group, int):
        if form.bits == 4 and isinstance(form, FloatGrid):
            return Refusal(f"{form}: FP4 weights have scales per block; use nvfp4")
        return None
    if spec.kind is LayerKind.CONV:
        return Refusal(f"a convolution's weight in {form}: TensorRT has blocks for matrix products only; use channel")
    if support.blocks and form.group not in support.blocks:
        return Refusal(f"{form}: blocks of {', '.join(map(str, support.blocks))} are taken")
    if not support.blocks:
        return Refusal(f"{form}: 8-bit weights have one scale per output row; use int8(channel)")
    if columns % form.group:
        return Refusal(f"{form}: {columns} inputs are no whole number of blocks; take a divisor of {columns}")
    return None


def _choice(spec: LayerSpec, support: Support, runtime: Runtime) -> EngineChoice:
    rows, columns = spec.shape
    form = spec.format
    assert isinstance(form, IntGrid | FloatGrid)
    groups = columns // form.group if isinstance(form.group, int) else 1
    scale = 1 if form.shares_peak else 2
    size = rows * columns * support.stored_bits // 8 + rows * groups * scale + spec.bias_bytes
    stored = f"{'INT' if support.element == 'integer' else 'FP'}{support.stored_bits}"
    product = "Conv" if spec.kind is LayerKind.CONV else "MatMul"
    form_of = "Q/DQ" if spec.act is not None else "DQ"
    half = HALF_BOUNDS if runtime.float_dtype == "float16" else Bounds()
    return EngineChoice(
        f"{form_of} {stored} {product}",
        support.state,
        LOWERING,
        size,
        note="" if support.state == "fast" else support.note,
        block=form.group if isinstance(form.group, int) else 0,
        stored_bits=support.stored_bits,
        bounds=STATIC_BOUNDS[support.element] if spec.act is not None else half,
        compute=runtime.float_dtype,
    )
