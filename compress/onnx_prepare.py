"""An opened ONNX model made ready: one opset, normalisations folded, constants computed, the same outputs as before.

ONNX Runtime's own basic optimizations fold BatchNormalization into convolutions, transposes of weights and arithmetic
on shapes; onnx's converter then raises the opset to the one that the lowerings write. Both are held against the model's
own outputs. What cannot be compressed is refused here by name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
import torch
from numpy.typing import NDArray

from compress.errors import InputError, UnsupportedError
from compress.onnx_file import LARGEST, RUN_DOMAINS, nodes, opset, subgraphs
from compress.onnx_interface import Interface

OPSET = 21
IR_VERSION = 10
TOLERANCE = 1e-4
"""Largest change of an output, as a share of its largest value, that float32 rounding may make."""
QUANTIZED = ("QLinear", "QuantizeLinear", "DequantizeLinear", "DynamicQuantize", "MatMulInteger", "ConvInteger")
QUANTIZED_MORE = ("MatMulNBits", "MatMulBnb4", "QAttention", "QGemm", "QEmbed", "GatherBlockQuantized", "QMoE")
Arrays = list[NDArray[Any]]


def prepare(model: onnx.ModelProto, path: Path) -> tuple[onnx.ModelProto, Interface]:
    """The model at opset 21 or later, simplified, and its interface.

    Raises: UnsupportedError (quantized already, control flow, other inputs than one of images, outputs that do not
    belong to an image each, operators that cannot be converted), InputError (ONNX Runtime does not run it).
    """
    refuse_quantized(model, path)
    _refuse_loops(model, path)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _drop_initializer_inputs(model)
    name, shape, batch = _image_input(model, path)
    images = sample(shape, batch)
    expected = _outputs(model, {name: images}, path)
    outputs = _per_image(model, expected, len(images), path)
    ready = _converted(_simplified(model, path), path)
    _refuse_control_flow(ready, path)
    _compare(ready, expected, _outputs(ready, {name: images}, path), path)
    return ready, Interface(name, shape, batch, outputs)


def refuse_quantized(model: onnx.ModelProto, path: Path) -> None:
    """Raises: UnsupportedError where its weights or activations are rounded already."""
    kinds = (*QUANTIZED, *QUANTIZED_MORE)
    found = sorted({node.op_type for node in nodes(model) if node.op_type.startswith(kinds)})
    if found:
        raise UnsupportedError(
            f"{path} is quantized already ({', '.join(found)}). Give the float model that it was made from."
        )


def sample(shape: Iterable[int], batch: int) -> NDArray[np.float32]:
    """Seeded normal noise, which is what normalised images look like in scale; two images where any number is taken."""
    return np.random.default_rng(0).standard_normal((batch or 2, *shape), dtype=np.float32)


def load_onnxruntime() -> Any:
    """The onnxruntime module. Raises: UnsupportedError naming what to install."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UnsupportedError(
            "An ONNX model is read with onnxruntime, which is not installed. Install exactly one of onnxruntime-gpu "
            "and onnxruntime."
        ) from error
    return onnxruntime


def open_session(model: onnx.ModelProto, what: str, optimized: str = "") -> Any:
    """A model in memory in ONNX Runtime on the CPU.

    Args: what: named in errors; optimized: where to write the graph after the basic optimizations, which then are all.
    Raises: InputError where it does not load.
    """
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized:
        options.optimized_model_filepath = optimized
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own kinds, which share no base but Exception
        raise InputError(f"onnxruntime {ort.__version__} cannot load {what} ({_first_line(error)}).") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _outputs(model: onnx.ModelProto, feeds: dict[str, NDArray[Any]], path: Path) -> Arrays:
    session = open_session(model, str(path))
    try:
        found: Arrays = session.run(None, feeds)
        again: Arrays = session.run(None, feeds)
    except Exception as error:  # as above
        raise InputError(f"{path} fails on {list(feeds)} of noise ({_first_line(error)}).") from error
    if any(not np.array_equal(one, two, equal_nan=True) for one, two in zip(found, again, strict=True)):
        raise UnsupportedError(f"{path} gives other outputs for the same images: it draws random numbers.")
    return found


def _drop_initializer_inputs(model: onnx.ModelProto) -> None:
    """Graphs of IR version 3 list their weights as inputs, where they could be overridden."""
    stored = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in stored]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.ir_version = max(model.ir_version, 8)


def _image_input(model: onnx.ModelProto, path: Path) -> tuple[str, tuple[int, int, int], int]:
    inputs = {value.name: value.type.tensor_type for value in model.graph.input}
    listed = ", ".join(f"{name} {_dims(kind)}" for name, kind in inputs.items())
    if len(inputs) != 1:
        raise UnsupportedError(
            f"{path} takes {len(inputs)} inputs ({listed or 'none'}). Supported are graphs of one input, images "
            "(batch, channels, h, w). Compress a transformer from its Hugging Face folder."
        )
    name, kind = next(iter(inputs.items()))
    if kind.elem_type != onnx.TensorProto.FLOAT or len(kind.shape.dim) != 4:
        raise UnsupportedError(
            f"{path} takes {listed} of type {onnx.TensorProto.DataType.Name(kind.elem_type)}. Supported are float32 "
            "images (batch, channels, h, w)."
        )
    batch, *sizes = (dim.dim_value if dim.HasField("dim_value") else 0 for dim in kind.shape.dim)
    if min(sizes) < 1:
        raise UnsupportedError(
            f"{path} takes {listed}, images of any size. Fix it first: python -m "
            f"onnxruntime.tools.make_dynamic_shape_fixed --input_name {name} --input_shape 1,3,640,640 (your size) "
            f"{path.name} fixed.onnx"
        )
    count = max(batch, 0) or 2
    if 4 * count * sizes[0] * sizes[1] * sizes[2] > LARGEST:
        raise UnsupportedError(f"{path} takes {listed}: {count} images of more than 2 GiB, the most that is supported.")
    return name, (sizes[0], sizes[1], sizes[2]), max(batch, 0)


def _dims(kind: Any) -> list[int | str]:
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in kind.shape.dim]


def _per_image(
    model: onnx.ModelProto, found: Arrays, batch: int, path: Path
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    made = []
    for value, array in zip(model.graph.output, found, strict=True):
        if array.dtype != np.float32 or array.ndim < 1 or array.shape[0] != batch or array.size == 0:
            raise UnsupportedError(
                f"{path}: output {value.name} is {array.dtype} {array.shape} for {batch} image(s). Supported are "
                "float32 outputs with a row for each image; export a detector without its non-maximum suppression."
            )
        if not np.isfinite(array).all():
            raise InputError(f"{path}: output {value.name} holds NaN or infinite values for images of noise.")
        made.append((value.name, tuple(int(size) for size in array.shape[1:])))
    return tuple(made)


def _simplified(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """After ONNX Runtime's basic optimizations; as it was where these bring in operators of other domains."""
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        written = str(Path(folder) / "model.onnx")
        open_session(model, str(path), optimized=written)
        found = onnx.load(written)
    if any(node.domain not in RUN_DOMAINS for node in found.graph.node):
        return model
    used = {node.domain for node in found.graph.node} | {""}
    kept = [item for item in found.opset_import if ("" if item.domain == "ai.onnx" else item.domain) in used]
    del found.opset_import[:]
    found.opset_import.extend(kept)
    return found


def _converted(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """At opset 21, that of the quantized operators and types that are written."""
    before = opset(model)
    if before < OPSET:
        try:
            model = onnx.version_converter.convert_version(model, OPSET)
        except Exception as error:  # the converter is C++ and raises several kinds
            raise UnsupportedError(
                f"{path} has opset {before}, which onnx cannot convert to {OPSET} ({_first_line(error)}). Export it "
                f"again with opset {OPSET}."
            ) from error
    model.ir_version = IR_VERSION
    del model.graph.value_info[:]  # the converter leaves types of values that are gone
    inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(model)
    return inferred


def _refuse_loops(model: onnx.ModelProto, path: Path) -> None:
    """Before anything is run: a loop need not end."""
    found = sorted({node.op_type for node in nodes(model) if node.op_type in ("Loop", "Scan")})
    if found:
        raise UnsupportedError(f"{path} has loops ({', '.join(found)}), which are not supported.")


def _refuse_control_flow(model: onnx.ModelProto, path: Path) -> None:
    """What is left of it: branches on constants are gone once the graph is simplified."""
    found = sorted({node.op_type for node in model.graph.node if next(subgraphs(node), None) is not None})
    if found:
        raise UnsupportedError(f"{path} has branches or loops ({', '.join(found)}), which are not supported.")


def _compare(model: onnx.ModelProto, expected: Arrays, found: Arrays, path: Path) -> None:
    for value, one, two in zip(model.graph.output, expected, found, strict=True):
        change = float(np.abs(one - two).max() / (np.abs(one).max() or 1.0)) if one.shape == two.shape else np.inf
        if not change <= TOLERANCE:
            raise UnsupportedError(
                f"{path}: simplified and at opset {OPSET} its output {value.name} changes by {change:.2g} of the "
                f"largest value. Export it again with opset {OPSET}."
            )
