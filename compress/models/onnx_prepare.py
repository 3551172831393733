"""An opened ONNX model made ready: one opset, normalisations folded, constants computed, the same outputs as before.

ONNX Runtime's own basic optimizations fold BatchNormalization into convolutions, transposes of weights and arithmetic
on shapes; onnx's converter then raises the opset to the one that the lowerings write. Both are held against the model's
own outputs. What cannot be compressed is refused here by name.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
from numpy.typing import NDArray

from compress.errors import InputError, UnsupportedError
from compress.files import scratch_folder
from compress.models.folder import first_line
from compress.models.onnx_file import RUN_DOMAINS, nodes, opset, subgraphs
from compress.models.onnx_folder import Beside, refuse_decoders
from compress.models.onnx_inputs import LENGTHS, find_inputs, find_outputs
from compress.models.onnx_interface import Interface
from compress.models.onnx_runtime import failure, open_session

OPSET = 21
IR_VERSION = 10
TOLERANCE = 1e-4
"""Largest change of an output, as a share of its largest value, that float32 rounding may make."""
QUANTIZED = ("QLinear", "QuantizeLinear", "DequantizeLinear", "DynamicQuantize", "MatMulInteger", "ConvInteger")
QUANTIZED_MORE = ("MatMulNBits", "MatMulBnb4", "QAttention", "QGemm", "QEmbed", "GatherBlockQuantized", "QMoE")
Arrays = list[NDArray[Any]]


class Prepared(NamedTuple):
    """A graph at opset 21 or later, simplified; its interface; remarks."""

    model: onnx.ModelProto
    interface: Interface
    notes: tuple[str, ...]


def prepare(model: onnx.ModelProto, path: Path, beside: Beside) -> Prepared:
    """Make an opened model ready. Args: beside: what the files beside it say.

    Raises: UnsupportedError (quantized already, control flow, a decoder, inputs or outputs without a row for each
    sample, operators that cannot be converted), InputError (ONNX Runtime does not run it), ResourceError (too large).
    """
    refuse_quantized(model, path)
    _refuse_loops(model, path)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _drop_initializer_inputs(model)
    inputs, outputs = ([value.name for value in group] for group in (model.graph.input, model.graph.output))
    refuse_decoders(inputs, outputs, beside, path)
    interface, session = find_inputs(model, beside, path), open_session(model, str(path))
    interface = _fitting_length(session, interface, beside, path)
    expected = _outputs(session, interface, interface.length, path)
    short = _outputs(session, interface, max(1, interface.length // 2), path) if interface.length else expected
    interface = replace(interface, outputs=find_outputs(model, interface, expected, short, path))
    simplified, notes = _simplified(model, path)
    ready = _converted(simplified, path)
    _refuse_control_flow(ready, path)
    found = _outputs(open_session(ready, str(path)), interface, interface.length, path)
    _compare(ready, expected, found, path)
    return Prepared(ready, interface, notes)


def refuse_quantized(model: onnx.ModelProto, path: Path) -> None:
    """Raises: UnsupportedError where its weights or activations are rounded already."""
    kinds = (*QUANTIZED, *QUANTIZED_MORE)
    found = sorted({node.op_type for node in nodes(model) if node.op_type.startswith(kinds)})
    if found:
        raise UnsupportedError(
            f"{path} is quantized already ({', '.join(found)}). Give the float model that it was made from."
        )


def sample(interface: Interface, length: int | None = None) -> NDArray[np.float32]:
    """Seeded made-up rows (see `Interface.drawn`), two where any number is taken."""
    drawn = np.random.default_rng(0)
    return interface.drawn(interface.batch or 2, interface.length if length is None else length, drawn)


def _fitting_length(session: Any, interface: Interface, beside: Beside, path: Path) -> Interface:
    """With a length that the graph runs at, where none is known."""
    if not interface.length or beside.longest:
        return interface
    for length in LENGTHS:
        try:
            _outputs(session, interface, length, path)
        except InputError:
            continue
        return replace(interface, length=length)
    return interface  # its error is told when it is run


def _outputs(session: Any, interface: Interface, length: int, path: Path) -> Arrays:
    feeds = interface.split(sample(interface, length))
    try:
        found: Arrays = session.run(None, feeds)
        again: Arrays = session.run(None, feeds)
    except Exception as error:  # onnxruntime raises its own kinds, which share no base but Exception
        named = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
        raise failure(error, f"{path} fails on made-up inputs, {named}") from error
    if any(not np.array_equal(one, two, equal_nan=True) for one, two in zip(found, again, strict=True)):
        raise UnsupportedError(f"{path} gives other outputs for the same inputs: it draws random numbers.")
    return found


def _drop_initializer_inputs(model: onnx.ModelProto) -> None:
    """Graphs of IR version 3 list their weights as inputs, where they could be overridden."""
    stored = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in stored]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.ir_version = max(model.ir_version, 8)


def _simplified(model: onnx.ModelProto, path: Path) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """After ONNX Runtime's basic optimizations; as it was, with a remark, where these bring in operators of other
    domains."""
    with scratch_folder() as folder:
        written = str(folder / "model.onnx")
        open_session(model, str(path), optimized=written)
        found = onnx.load(written)
    other = sorted({f"{node.domain}::{node.op_type}" for node in found.graph.node if node.domain not in RUN_DOMAINS})
    if other:
        note = (
            f"The graph is compressed as it was written: simplified by ONNX Runtime it would hold {', '.join(other)}, "
            "which are not supported. BatchNormalization that is not folded into its convolution stays."
        )
        return model, (note,)
    used = {node.domain for node in found.graph.node} | {""}
    kept = [item for item in found.opset_import if ("" if item.domain == "ai.onnx" else item.domain) in used]
    del found.opset_import[:]
    found.opset_import.extend(kept)
    return found, ()


def _converted(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """At opset 21, that of the quantized operators and types that are written."""
    before = opset(model)
    if before < OPSET:
        try:
            model = onnx.version_converter.convert_version(model, OPSET)
        except Exception as error:  # the converter is C++ and raises several kinds
            raise UnsupportedError(
                f"{path} has opset {before}, which onnx cannot convert to {OPSET} ({first_line(error)}). Export it "
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
