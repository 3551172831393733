"""What the inputs and outputs of an ONNX graph are, sample by sample: found from its types and by running it.

Each input and output has a row for each sample. One more axis may be free, that of a text or a sound, under one name
in all inputs; the sizes of images are fixed, by the graph or by the config beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from compress.errors import InputError, UnsupportedError
from compress.models.onnx_file import LARGEST
from compress.models.onnx_folder import Beside
from compress.models.onnx_interface import FREE, IDS, KINDS, Feed, Interface, Shape

USUAL_LENGTH = 128
"""Of a free axis where nothing says it."""
LENGTHS = (USUAL_LENGTH, 16, 16_000, 2)
"""Tried in turn, where the model's positions are not known: a short position table, or convolutions over a sound."""
_KINDS = {getattr(onnx.TensorProto, name.upper().replace("FLOAT32", "FLOAT")): name for name in KINDS}
Arrays = Sequence[NDArray[Any]]
Dims = tuple[int | str, ...]


def find_inputs(model: onnx.ModelProto, beside: Beside, path: Path) -> Interface:
    """The inputs of a graph; no outputs yet. Sizes of images that a config fixes are written into the graph.

    Raises: UnsupportedError for other types, no row for each sample, or sizes that are not fixed.
    """
    dims = {value.name: _dims(value.type.tensor_type) for value in model.graph.input}
    listed = ", ".join(f"{name} {list(own)}" for name, own in dims.items()) or "nothing"
    where = f"{path} takes {listed}"
    for value in model.graph.input:
        kind = value.type.tensor_type.elem_type
        if kind not in _KINDS or not dims[value.name]:
            raise UnsupportedError(
                f"{where}: {value.name} is {onnx.TensorProto.DataType.Name(kind)}. Supported are inputs with a row for "
                f"each sample, of {', '.join(KINDS)}."
            )
    if not dims:
        raise UnsupportedError(f"{where}. Supported are graphs with inputs that have a row for each sample.")
    batch = _batch(dims, where)
    _fix_images(model, dims, beside)
    free = _free(dims, where, path.name)
    feeds = tuple(
        Feed(
            value.name,
            _KINDS[value.type.tensor_type.elem_type],
            tuple(size if isinstance(size, int) else FREE for size in dims[value.name][1:]),
            _high(model, value.name, beside),
        )
        for value in model.graph.input
    )
    made = Interface(feeds, batch, (), min(USUAL_LENGTH, beside.longest or USUAL_LENGTH) if free else 0)
    count = batch or 2
    if 4 * count * made.width(made.length) > LARGEST:
        what = "images" if made.is_image else "samples"
        raise UnsupportedError(f"{where}: {count} {what} of more than 2 GiB, the most that is supported.")
    return made


def _dims(kind: Any) -> Dims:
    """Sizes, or names of those that are open ("?" without one)."""
    return tuple(dim.dim_value if dim.dim_value > 0 else dim.dim_param or "?" for dim in kind.shape.dim)


def _batch(dims: Mapping[str, Dims], where: str) -> int:
    found = {own[0] if isinstance(own[0], int) else 0 for own in dims.values()}
    if len(found) != 1:
        raise UnsupportedError(
            f"{where}, whose first axes differ. Supported are inputs with a row for each sample: export it with the "
            "batch as the first axis of all."
        )
    return found.pop()


def _fix_images(model: onnx.ModelProto, dims: dict[str, Dims], beside: Beside) -> None:
    """Give an input of images of any size the one that the config says."""
    for value in model.graph.input:
        own, wanted = dims[value.name], beside.image
        if len(own) != 4 or not wanted or _is_fixed(own):
            continue
        if all(isinstance(size, str) or size == given for size, given in zip(own[1:], wanted, strict=True)):
            for dim, size in zip(value.type.tensor_type.shape.dim[1:], wanted, strict=True):
                dim.dim_value = size
            dims[value.name] = (own[0], *wanted)


def _is_fixed(own: Dims) -> bool:
    return all(isinstance(size, int) for size in own[1:])


def _free(dims: Mapping[str, Dims], where: str, file: str) -> bool:
    """Whether an axis is free. Raises: UnsupportedError for more than one."""
    names = {size for own in dims.values() for size in own[1:] if isinstance(size, str)}
    most = max(sum(isinstance(size, str) for size in own[1:]) for own in dims.values())
    image = next((name for name, own in dims.items() if len(own) == 4 and not _is_fixed(own)), None)
    if len(names) <= 1 and most <= 1 and image is None:
        return bool(names)
    if image is not None:
        raise UnsupportedError(
            f"{where}, images of any size. Fix it first: python -m onnxruntime.tools.make_dynamic_shape_fixed "
            f"--input_name {image} --input_shape 1,3,640,640 (your size) {file} fixed.onnx"
        )
    first = sorted(names)[0]
    raise UnsupportedError(
        f"{where}: beside the batch one axis may be open, under one name in all inputs; these are "
        f"{', '.join(sorted(names))}. Fix the others first: python -m onnxruntime.tools.make_dynamic_shape_fixed "
        f"--dim_param {first} --dim_value 128 (your size) {file} fixed.onnx"
    )


def _high(model: onnx.ModelProto, name: str, beside: Beside) -> int:
    """Numbers that a whole input may hold lie below: the rows of the tables that it looks up."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:  # exporters before opset 13 write tables as constants
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            stored[node.output[0]] = node.attribute[0].t
    names, rows = {name}, list[int]()
    for node in model.graph.node:
        if node.op_type in ("Cast", "Identity") and node.input[0] in names:
            names.add(node.output[0])
        if node.op_type == "Gather" and node.input[1] in names and node.input[0] in stored:
            rows.append(int(stored[node.input[0]].dims[0]))
    return min(rows) if rows else (beside.vocabulary or 2) if name == IDS else 2


def find_outputs(
    model: onnx.ModelProto,
    interface: Interface,
    found: Arrays,
    other: Arrays,
    path: Path,
) -> tuple[tuple[str, Shape], ...]:
    """Name and shape of each output for a sample.

    Args: found, other: outputs for made-up samples of the usual length, and of half of it.
    Raises: UnsupportedError (no row for each sample, another type, a size that follows the length otherwise),
    InputError (not finite).
    """
    made = []
    count, half = interface.batch or 2, max(1, interface.length // 2)
    for value, array, short in zip(model.graph.output, found, other, strict=True):
        if array.dtype != np.float32 or array.ndim < 1 or array.shape[0] != count or array.size == 0:
            what = "image(s)" if interface.is_image else "sample(s)"
            raise UnsupportedError(
                f"{path}: output {value.name} is {array.dtype} {array.shape} for {count} {what}. Supported are "
                "float32 outputs with a row for each; export a detector without its non-maximum suppression."
            )
        if not np.isfinite(array).all():
            raise InputError(f"{path}: output {value.name} holds NaN or infinite values for made-up inputs.")
        sizes = tuple(
            FREE if interface.length and (one, two) == (interface.length, half) and one != two else int(one)
            for one, two in zip(array.shape[1:], short.shape[1:], strict=True)
        )
        expected = tuple(size or half for size in sizes)
        if short.shape[1:] != expected:
            raise UnsupportedError(
                f"{path}: output {value.name} is {array.shape[1:]} for a length of {interface.length}, and "
                f"{short.shape[1:]} for {half}. Supported are outputs of the input's length, and such as it does not "
                "change. Fix the length with onnxruntime.tools.make_dynamic_shape_fixed."
            )
        made.append((value.name, sizes))
    return tuple(made)
