"""One layer per kind of ONNX Runtime kernel, with what it must compute: for `doctor` and `hardware calibrate`.

Of other packages it imports numpy, onnx and onnxruntime only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.files import scratch_folder

Array = NDArray[Any]
MICROSOFT = "com.microsoft"
BLOCK = 32
# Largest error of an output as a share of the largest output: float kernels, and those that round inputs to 8 bits.
EXACT, ROUNDED = 1e-4, 0.05


@dataclass(frozen=True)
class Probe:
    """A graph of one layer y = x Wᵀ (or a convolution): its bytes, a maker of inputs, and the exact answer.

    operators: of which at least one must be in the graph that the runtime really executes; use, bits: as hardware
    profiles name a format.
    """

    name: str
    use: str
    bits: int
    graph: bytes
    make: Callable[[int], Array]
    answer: Callable[[Array], Array]
    operators: frozenset[str]
    bound: float


@dataclass(frozen=True)
class Product:
    """A square layer of one kernel: the operator with its attributes and constants, the weight (out, in) that they
    stand for, and the bytes that an artifact stores of it (scales of blocks in 2). block: 0 where a scale is for a
    whole row, or there is none; axis: of the outputs, in every constant."""

    name: str
    use: str
    bits: int
    operator: str
    constants: Mapping[str, Array]
    decoded: Array
    stored_bytes: int
    attributes: Mapping[str, Any] = field(default_factory=dict)
    block: int = 0
    axis: int = -1


@dataclass(frozen=True)
class Outcome:
    """What a runtime did with a probe. problem: empty where it ran and agreed on the expected kernel."""

    probe: str
    problem: str
    operators: tuple[str, ...] = ()
    error: float | None = None


def probes(size: int = 64, seed: int = 0) -> list[Probe]:
    """All kinds, as square layers of `size` inputs and outputs (a multiple of 32)."""
    maker = np.random.default_rng(seed)
    weight = maker.standard_normal((size, size)).astype(np.float32)
    made = (plain(weight), *(blocks(weight, bits) for bits in (4, 8, 2)), dynamic(weight))
    return [*map(_probe, made), _convolution(maker)]


def check(probe: Probe, threads: int = 1) -> Outcome:
    """Run a probe on a batch of 4. Never raises for what a runtime does: that is the answer."""
    try:
        session, executed = open_probe(probe, threads)
        x = probe.make(4)
        (y,) = session.run(None, {"x": x})
    except Exception as refusal:  # onnxruntime raises its own kinds, which share no base but Exception
        return Outcome(probe.name, f"does not run ({str(refusal).splitlines()[0][:200]})")
    wanted = probe.answer(x)
    error = float(np.abs(y - wanted).max() / np.abs(wanted).max())
    if not error <= probe.bound:
        return Outcome(probe.name, f"is off by {error:.2g} of its largest output", executed, error)
    if not probe.operators & set(executed):
        kernels = ", ".join(sorted(probe.operators))
        return Outcome(probe.name, f"runs as {', '.join(executed)}, not as {kernels}", executed, error)
    return Outcome(probe.name, "", executed, error)


def open_probe(probe: Probe, threads: int) -> tuple[Any, tuple[str, ...]]:
    """A session on the CPU, and the operators that it executes after its own optimizations."""
    import onnx

    with scratch_folder() as folder:
        path = folder / "executed.onnx"
        session = open_session(probe.graph, threads, path)
        executed = onnx.load(str(path)).graph.node
    return session, tuple(dict.fromkeys(node.op_type for node in executed))


def open_session(graph: bytes, threads: int, executed: Path | None = None) -> Any:
    """A session on the CPU as artifacts have it. executed: where the graph is written as it was optimized."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if executed is not None:
        options.optimized_model_filepath = str(executed)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _model(nodes: list[Any], inputs: list[int | str], outputs: list[int | str], constants: dict[str, Array]) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, inputs)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, outputs)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def rows(size: int) -> Callable[[int], Array]:
    """A maker of so many inputs of this size."""
    return lambda batch: np.random.default_rng(1).standard_normal((batch, size)).astype(np.float32)


def _probe(product: Product) -> Probe:
    weight, bound = product.decoded, EXACT if product.use == "float" else ROUNDED
    operators, make = frozenset({product.operator}), rows(len(weight))
    return Probe(
        product.name, product.use, product.bits, chain(product), make, lambda x: x @ weight.T, operators, bound
    )


def plain(weight: Array) -> Product:
    """MatMul in float32."""
    return Product("float32", "float", 32, "MatMul", {"w": np.ascontiguousarray(weight.T)}, weight, weight.nbytes)


def blocks(weight: Array, bits: int, block: int = BLOCK) -> Product:
    """MatMulNBits: symmetric codes in blocks, lowest bits first, with 8-bit activations (accuracy level 4)."""
    size, middle = len(weight), 1 << (bits - 1)
    parts = weight.reshape(size, -1, block)
    scales = np.abs(parts).max(-1, keepdims=True) / middle
    codes = np.clip(np.rint(parts / scales) + middle, 0, 2**bits - 1).astype(np.uint8)
    decoded = ((codes.astype(np.float32) - middle) * scales).reshape(size, size).astype(np.float32)
    each = 8 // bits
    shifts = (np.arange(each) * bits).astype(np.uint8)
    packed = np.bitwise_or.reduce(codes.reshape(size, -1, block // each, each) << shifts, axis=-1).astype(np.uint8)
    return Product(
        f"int{bits} weights, blocks of {block}",
        "weight_only",
        bits,
        "MatMulNBits",
        {"w": packed, "s": scales[..., 0].astype(np.float32)},
        decoded,
        packed.nbytes + 2 * scales.size,
        {"K": size, "N": size, "bits": bits, "block_size": block, "accuracy_level": 4},
        block,
        axis=0,
    )


def dynamic(weight: Array) -> Product:
    """DynamicQuantizeMatMul: a scale per output, inputs rounded to 8 bits at each call."""
    scales = (np.abs(weight).max(1) / 127).astype(np.float32)
    codes = np.rint(weight / scales[:, None]).astype(np.int8)
    decoded = codes.astype(np.float32) * scales[:, None]
    constants = {"w": np.ascontiguousarray(codes.T), "s": scales}
    name, use = "int8 weights and inputs", "weight_and_activation"
    return Product(name, use, 8, "DynamicQuantizeMatMul", constants, decoded, codes.nbytes + scales.nbytes)


def chain(product: Product, count: int = 1) -> bytes:
    """The graph of `count` such layers one after another. The outputs of each are those of the one before, moved on by
    one: onnxruntime keeps equal constants once, and a cache would then hold them all."""
    from onnx import helper

    values = ["x", *(f"h{place}" for place in range(1, count)), "y"]
    domain = "" if product.operator == "MatMul" else MICROSOFT
    nodes: list[Any] = []
    constants: dict[str, Array] = {}
    for place, (given, made) in enumerate(pairwise(values)):
        own = {f"{key}{place}": np.roll(value, place, product.axis) for key, value in product.constants.items()}
        nodes.append(helper.make_node(product.operator, [given, *own], [made], domain=domain, **product.attributes))
        constants |= own
    size = len(product.decoded)
    return _model(nodes, ["batch", size], ["batch", size], constants)


def _convolution(maker: np.random.Generator) -> Probe:
    """A 1×1 convolution between Quantize and Dequantize, which the runtime must fuse into QLinearConv."""
    from onnx import helper

    weight = maker.standard_normal((16, 16)).astype(np.float32)
    scales = (np.abs(weight).max(1) / 127).astype(np.float32)
    codes = np.rint(weight / scales[:, None]).astype(np.int8)
    decoded = codes.astype(np.float32) * scales[:, None]
    constants = {
        "w": codes[..., None, None],
        "ws": scales,
        "wz": np.zeros(16, np.int8),
        "xs": np.float32(8 / 255),
        "xz": np.uint8(128),
        "ys": np.float32(48 / 255),
    }
    pairs = [("x", "xs", "xq", "xd"), ("c", "ys", "cq", "y")]
    nodes = [helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0)]
    for place, (value, scale, code, result) in enumerate(pairs):
        nodes += [helper.make_node("Conv", ["xd", "wd"], ["c"], kernel_shape=[1, 1])] if place else []
        nodes.append(helper.make_node("QuantizeLinear", [value, scale, "xz"], [code]))
        nodes.append(helper.make_node("DequantizeLinear", [code, scale, "xz"], [result]))
    graph = _model(nodes, ["batch", 16, 4, 4], ["batch", 16, 4, 4], constants)

    def make(batch: int) -> Array:
        return np.random.default_rng(1).standard_normal((batch, 16, 4, 4)).astype(np.float32)

    def answer(x: Array) -> Array:
        found: Array = np.einsum("oi,bihw->bohw", decoded, x)
        return found

    name, use = "int8 convolution, static grids", "weight_and_static_activation"
    return Probe(name, use, 8, graph, make, answer, frozenset({"QLinearConv"}), ROUNDED)
