"""What TensorRT takes, checked before anything is built: types, symmetric zero points, axes and the chip's formats.

The formats of a chip stand in its profile; tests/data/tensorrt_rtx.json holds the builder's own answers to them.
"""

from __future__ import annotations

from dataclasses import dataclass

from compress.export.onnx import experts, float_matmul
from compress.export.onnx.lowering import Choice
from compress.formats import name_of
from compress.formats.codebook import Codebook
from compress.formats.float_grid import FloatGrid
from compress.formats.int_grid import IntGrid
from compress.hwprofiles import Element, Profile, Runtime, Support, Use
from compress.layer import LayerKind, LayerSpec
from compress.records import Bounds
from compress.target import Refusal

RTX, FULL = "tensorrt-rtx", "tensorrt"
"""Runtimes in profiles: TensorRT-RTX, which builds for another machine, and TensorRT, which builds on its own."""
LOWERING = "compress.export.tensorrt.lowering"
FLOAT_TYPES = ("float16", "bfloat16", "float32")
BFLOAT16_FROM = 80
"""SM from which on chips multiply bfloat16."""
NVFP4 = FloatGrid(2, 1, group=16, scale="float8_e4m3")
# Products in half precision: its rounding, which later blocks amplify (benchmarks/tensorrt_matrix.py).
HALF_BOUNDS = Bounds(shipped=0.05, exact=0.05)
# bfloat16 has three bits less (pycoder: 0.014, where float16 has 0.001).
FLOAT_BOUNDS = {"float16": HALF_BOUNDS, "bfloat16": Bounds(shipped=0.2, exact=0.2), "float32": Bounds()}
# As export/onnx/static_qdq.py: inputs that rounding moves across the middle between two points of their grid. Those of
# E4M3 are up to an eighth apart: 0.16 on random models of 2 blocks, where int8 has 0.08.
# FP4's are up to a third apart.
STATIC_BOUNDS = {
    "int8(tensor)": Bounds(shipped=0.25, exact=0.25),
    "fp8_e4m3(tensor)": Bounds(shipped=0.5, exact=0.5),
    "nvfp4": Bounds(shipped=1.0, exact=1.0),
}


BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
TIED = "a head reads the table too, so that the engine holds it decoded"
W4A8 = (
    "TensorRT-RTX 1.7.1 builds no product of INT4 weights and FP8 inputs (operands of one type are asked for); take "
    "weights in fp8_e4m3(channel), or leave the inputs in float"
)


@dataclass(frozen=True)
class EngineChoice(Choice):
    """A layer's way into the engine. compute: type of its product, `float16`, `bfloat16` or `float32`; decoded_bytes:
    what the engine holds beyond the file; below 0 where it holds less."""

    compute: str = "float16"
    decoded_bytes: int = 0


def runtime_of(profile: Profile) -> Runtime | Refusal:
    """The profile's TensorRT. Refuses one for other machines, and types that this target does not compute in."""
    found = profile.runtimes.get(RTX) or profile.runtimes.get(FULL)
    if found is None or profile.gpu is None:
        return Refusal(f"{profile.id} has no runtime {RTX} or {FULL}: take a profile of an NVIDIA GPU, as nvidia-l4")
    if found.float_dtype not in FLOAT_TYPES:
        return Refusal(f"{profile.id} asks for {found.float_dtype}; this target computes in {' or '.join(FLOAT_TYPES)}")
    if found.float_dtype == "bfloat16" and profile.gpu.sm < BFLOAT16_FROM:
        return Refusal(f"{profile.id} asks for bfloat16, which SM {profile.gpu.sm} does not multiply; take float16")
    return found


def choose(spec: LayerSpec, profile: Profile) -> EngineChoice | Refusal:
    """How a layer is stored, or why TensorRT does not take it, on any chip or on this one."""
    found = _choose(spec, profile)
    noted = experts.noted(spec, found) if isinstance(found, EngineChoice) else found
    assert isinstance(noted, EngineChoice | Refusal)
    return noted


def _choose(spec: LayerSpec, profile: Profile) -> EngineChoice | Refusal:
    runtime, element = runtime_of(profile), _element(spec)
    problem = _problem(spec)
    if problem is not None:
        return problem
    if isinstance(runtime, Refusal):
        return runtime
    if spec.format is None:
        return _float(spec, runtime)
    static = spec.act is not None
    use: Use = "weight_and_static_activation" if static else "weight_only"
    assert isinstance(spec.format, IntGrid | FloatGrid)
    support = runtime.support(use, spec.format.bits, element, name_of(spec.format))
    if support.state == "no":
        inputs = " with static inputs" if static else ""
        return Refusal(f"{spec.format}{inputs}: {support.note.removesuffix('.')}", usage=False)
    return _block(spec, support) or _choice(spec, support, runtime)


def _element(spec: LayerSpec) -> Element:
    return "integer" if isinstance(spec.format, IntGrid) else "float"


def _problem(spec: LayerSpec) -> Refusal | None:
    """What no chip takes."""
    if spec.format is None:
        return None
    told = _weight(spec) or _inputs(spec)
    return Refusal(told) if told else None


def _float(spec: LayerSpec, runtime: Runtime) -> EngineChoice | Refusal:
    found = float_matmul.choose(spec, runtime)
    assert found is not None
    if isinstance(found, Refusal):
        return found
    kind, (rows, columns) = runtime.float_dtype, spec.shape
    return EngineChoice(
        found.operator,
        found.kernel,
        found.lowering,
        found.stored_bytes,
        bounds=FLOAT_BOUNDS[kind],
        compute=kind,
        decoded_bytes=rows * columns * _beyond(spec, BYTES[kind]),
    )


def _beyond(spec: LayerSpec, size: int) -> int:
    """Bytes of each number of a plain weight that an engine holds beyond the file: a product's is cast when it is
    built; a table stays as it is stored, and a head that reads it too has its own."""
    if spec.kind is LayerKind.EMBEDDING:
        return size if len(spec.users) > 1 else 0
    return size - spec.source_dtype.itemsize


def _weight(spec: LayerSpec) -> str:
    """What is wrong with the weight's format; empty where nothing."""
    form = spec.format
    if isinstance(form, IntGrid):
        return "" if form.scheme == "symmetric" else f"{form}: TensorRT takes symmetric grids, without zero points"
    if isinstance(form, Codebook):
        return f"{form}: TensorRT reads no codes of codebooks; take int4(group=128) or fp8_e4m3(channel)"
    if not isinstance(form, FloatGrid):
        return f"{form}: TensorRT has no such type; it takes int8, int4, fp8_e4m3, fp4_e2m1 and nvfp4"
    if (form.exponent, form.mantissa) not in ((4, 3), (2, 1)):
        return f"{form}: of small floats TensorRT takes fp8_e4m3, fp4_e2m1 and nvfp4"
    if form.bits == 8 and (form.scale == "float8_e4m3" or isinstance(form.group, int)):
        return f"{form}: FP8 weights have one scale per output row: fp8_e4m3(channel)"
    return ""


def inputs_of(form: IntGrid | FloatGrid) -> IntGrid | FloatGrid:
    """The grid of rounded inputs beside a weight."""
    if isinstance(form, IntGrid):
        return IntGrid(8, group="tensor")
    return NVFP4 if form == NVFP4 else FloatGrid(4, 3, group="tensor")


def _inputs(spec: LayerSpec) -> str:
    """What is wrong with the layer's inputs; empty where nothing, or where they stay in float."""
    form = spec.format
    if spec.act is None:
        return ""
    assert isinstance(form, IntGrid | FloatGrid)
    wanted = inputs_of(form)
    if form.bits == 4 and isinstance(form, IntGrid) and isinstance(spec.act.format, FloatGrid):
        return f"inputs in {spec.act}: {W4A8}"
    if spec.act.static and spec.act.format != wanted:
        return f"inputs in {spec.act}: beside {form} they are static {wanted}, symmetric"
    if not spec.act.static:
        fixed = f"act_quant(format={wanted}, static=true)"
        return f"inputs in {spec.act.format}: TensorRT rounds inputs on grids that are fixed beforehand; use {fixed}"
    if form == NVFP4:
        convolution = spec.kind is LayerKind.CONV
        return f"a convolution with inputs in {wanted}: TensorRT has blocks for products only" if convolution else ""
    if form.group not in ("channel", "tensor") or (isinstance(form, FloatGrid) and form.bits != 8):
        known = "int8(channel)" if isinstance(form, IntGrid) else "fp8_e4m3(channel), or nvfp4 beside nvfp4 inputs"
        return f"{form}: beside rounded inputs a weight is {known}"
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


def stored_decoded(form: IntGrid | FloatGrid) -> bool:
    """Whether TensorRT-RTX (1.7.1, by the size of its engines) decodes a table when it builds, where a product reads
    it beside a look-up: all but INT4."""
    return not (isinstance(form, IntGrid) and form.bits <= 4)


def _choice(spec: LayerSpec, support: Support, runtime: Runtime) -> EngineChoice:
    rows, columns = spec.shape
    form = spec.format
    assert isinstance(form, IntGrid | FloatGrid)
    groups = columns // form.group if isinstance(form.group, int) else 1
    scale = 1 if form.shares_peak else 2
    size = rows * columns * support.stored_bits // 8 + rows * groups * scale + spec.bias_bytes
    tied = spec.kind is LayerKind.EMBEDDING and len(spec.users) > 1
    decoded = tied and stored_decoded(form)
    stored = f"{'INT' if support.element == 'integer' else 'FP'}{support.stored_bits}"
    product = {LayerKind.CONV: "Conv", LayerKind.EMBEDDING: "Gather+MatMul" if tied else "Gather"}
    form_of = "Q/DQ" if spec.act is not None else "DQ"
    return EngineChoice(
        f"{form_of} {stored} {product.get(spec.kind, 'MatMul')}",
        support.state,
        LOWERING,
        size,
        note="; ".join(([] if support.state == "fast" else [support.note]) + ([TIED] if decoded else [])),
        block=form.group if isinstance(form.group, int) else 0,
        stored_bits=support.stored_bits,
        bounds=STATIC_BOUNDS[str(spec.act.format)] if spec.act is not None else FLOAT_BOUNDS[runtime.float_dtype],
        compute=runtime.float_dtype,
        decoded_bytes=max(0, rows * columns * BYTES[runtime.float_dtype] - size) if decoded else 0,
    )
