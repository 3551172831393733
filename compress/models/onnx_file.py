"""Opening an ONNX file that nobody vouches for: sizes, names and every byte range are checked before they are used.

A tensor may lie in another file ("external data"). onnx has followed such names out of the folder four times
(CVE-2022-25882, -2024-27318, -2026-27489, links in -2026-34446 and -34447), so they are resolved here: relative, inside
the folder also after links, a regular file with one name, a range that lies in it and that no other tensor cuts into.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from math import prod
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from compress.errors import InputError, UnsupportedError, UsageError
from compress.models.folder import first_line

LARGEST = 2 << 30
"""Bytes of a model with its weights, the most that one protobuf message holds."""
KEYS = frozenset({"location", "offset", "length", "checksum"})
LOWEST_OPSET = 7
MOST_NODES = 1_000_000
"""Of a graph with its functions written out. Ten functions that each call the one before ten times are a file of a few
kilobytes and ten thousand million operators."""
RUN_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
_PACKED_BITS: dict[int, int] = {
    onnx.TensorProto.UINT4: 4,
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.FLOAT4E2M1: 4,
}


class Opened(NamedTuple):
    """A model with all its weights in it, the sha256 of its files, and their bytes."""

    model: onnx.ModelProto
    sha256: str
    nbytes: int


def open_file(path: Path, domains: frozenset[str] = RUN_DOMAINS) -> Opened:
    """Read and check a model.

    Args: domains: of the operators that may occur.
    Raises: UsageError (no such file), InputError (malformed, or data outside of its folder), UnsupportedError (too
    large, operators of other domains, an opset below 7).
    """
    if not path.is_file():
        raise UsageError(f"No such file: {path}. Give an ONNX model, model.onnx.")
    _limit(path, path.stat().st_size)
    content = path.read_bytes()
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise InputError(f"{path} is not an ONNX model ({error}). Fetch or export it again.") from error
    if not model.graph.node:
        raise InputError(f"{path} holds no graph with operators: it is no ONNX model, or an empty one.")
    digest = hashlib.sha256(content)
    size = _load_external(model, path, len(content), digest.update)
    for tensor in tensors(model):
        _check_size(tensor, path)
    _check_operators(model, path, domains)
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is not valid ONNX ({first_line(error)}). Export it again.") from error
    return Opened(model, digest.hexdigest(), size)


def nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node, in subgraphs and functions too."""
    yield from _inner_nodes(model.graph.node)
    for function in model.functions:
        yield from _inner_nodes(function.node)


def _inner_nodes(found: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in found:
        yield node
        for graph in subgraphs(node):
            yield from _inner_nodes(graph.node)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The branches or bodies of control flow."""
    for attribute in node.attribute:
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor: initializers and attributes, in subgraphs and functions too."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            sparse = [
                *attribute.sparse_tensors,
                *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []),
            ]
            for each in sparse:
                yield from (each.values, each.indices)
        for graph in subgraphs(node):
            yield from _graph_tensors(graph)


def stored_bytes(tensor: onnx.TensorProto, path: Path) -> int:
    """Bytes of a tensor's values as `raw_data`. Raises: InputError for a shape or type that cannot be."""
    if any(size < 0 for size in tensor.dims) or prod(tensor.dims) > LARGEST:
        raise InputError(f"{path}: tensor {tensor.name} has the shape {list(tensor.dims)}. Export the file again.")
    bits = _PACKED_BITS.get(tensor.data_type)
    if bits is None:
        try:
            bits = 8 * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
        except (KeyError, ValueError) as error:
            raise InputError(f"{path}: tensor {tensor.name} has the unknown type {tensor.data_type}.") from error
    count: int = prod(tensor.dims)
    return (count * bits + 7) // 8


def _check_size(tensor: onnx.TensorProto, path: Path) -> None:
    """Values of another number than the shape says would be read out of bounds."""
    if tensor.data_type == onnx.TensorProto.STRING:
        return
    wanted = stored_bytes(tensor, path)
    if tensor.HasField("raw_data") and len(tensor.raw_data) != wanted:
        raise InputError(
            f"{path}: tensor {tensor.name} holds {len(tensor.raw_data)} bytes, but its shape {list(tensor.dims)} "
            f"takes {wanted}. Export the file again."
        )


def _limit(path: Path, size: int) -> None:
    if size > LARGEST:
        raise UnsupportedError(
            f"{path}: {size / 2**30:.1f} GiB with its weights; an ONNX file of up to 2 GiB is supported. Give the "
            "model that it was exported from."
        )


def _load_external(model: onnx.ModelProto, path: Path, size: int, update: Callable[[bytes], None]) -> int:
    """Put external values into the model, each range read once it is checked. Returns: size and their bytes."""
    taken: dict[Path, list[tuple[int, int, str]]] = {}
    for tensor in tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        wanted = stored_bytes(tensor, path)
        size += wanted
        _limit(path, size)
        found, offset, length = _place(tensor, path, wanted)
        tensor.raw_data = _read(found, offset, length, tensor.name, path)
        taken.setdefault(found, []).append((offset, offset + length, tensor.name))
        update(tensor.raw_data)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    for ranges in taken.values():
        _check_overlap(ranges, path)
    return size


def _place(tensor: onnx.TensorProto, path: Path, wanted: int) -> tuple[Path, int, int]:
    """The file, offset and length of external values."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    where = f"{path}: the values of tensor {tensor.name}"
    unknown = set(entries) - KEYS
    if unknown or len(entries) != len(tensor.external_data):
        raise InputError(f"{where} are described by {sorted(entries)}; allowed once each: {', '.join(sorted(KEYS))}.")
    location = entries.get("location", "")
    parts = location.replace("\\", "/").split("/")
    outside = not location or "\0" in location or ".." in parts or Path(location).is_absolute()
    if outside or PureWindowsPath(location).drive or PureWindowsPath(location).root:
        raise InputError(f"{where} lie in {location!r}, which is not inside its folder. It is not read.")
    try:
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", str(wanted)))
    except ValueError as error:
        raise InputError(f"{where} have offset or length that are no numbers ({error}).") from error
    if offset < 0 or length != wanted:
        raise InputError(f"{where}: offset {offset}, length {length}; the shape {list(tensor.dims)} takes {wanted}.")
    folder = path.parent.resolve()
    try:
        found = (folder / location).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{where} lie in {location}, which is not there ({error}). Fetch it beside the model."
        ) from error
    if not found.is_relative_to(folder):
        raise InputError(
            f"{where} lie in {location}, a link out of its folder. It is not read. If the link is yours (a download "
            "cache makes such ones), copy the model with what is linked: cp -rL."
        )
    return found, offset, length


def _read(found: Path, offset: int, length: int, name: str, path: Path) -> bytes:
    try:
        handle = os.open(found, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise InputError(f"{path}: {found.name} cannot be read ({error}).") from error
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            raise InputError(f"{path}: {found.name}, where the values of {name} lie, is not a regular file.")
        if info.st_nlink != 1:
            raise InputError(
                f"{path}: {found.name} has {info.st_nlink} names (hard links), so it may be another folder's file. "
                "It is not read; copy it."
            )
        if offset + length > info.st_size:
            raise InputError(
                f"{path}: {found.name} has {info.st_size} bytes, but {name} lies in {offset} to {offset + length}. "
                "Fetch it again."
            )
        with os.fdopen(os.dup(handle), "rb") as stream:
            stream.seek(offset)
            return stream.read(length)
    finally:
        os.close(handle)


def _check_overlap(ranges: list[tuple[int, int, str]], path: Path) -> None:
    """Two tensors may share a range (tied weights), but not a part of one."""
    ranges = sorted(ranges)
    for (start, end, first), (other, stop, second) in pairwise(ranges):
        if other < end and (start, end) != (other, stop):
            raise InputError(f"{path}: the values of {first} and {second} overlap in its data file. Export it again.")


def _check_operators(model: onnx.ModelProto, path: Path, domains: frozenset[str]) -> None:
    own = {function.domain for function in model.functions}
    other = sorted({f"{node.domain}::{node.op_type}" for node in nodes(model) if node.domain not in domains | own})
    if other:
        raise UnsupportedError(
            f"{path} takes operators of other domains: {', '.join(other[:5])}. Supported are those of ONNX and of "
            "com.microsoft; export the model without them."
        )
    version = opset(model)
    if version < LOWEST_OPSET:
        raise UnsupportedError(f"{path} has opset {version}; {LOWEST_OPSET} and later are read. Export it again.")
    _check_functions(model, path)


def _check_functions(model: onnx.ModelProto, path: Path) -> None:
    """Functions are written out before a graph is run: that must end, and fit. Raises: InputError, UnsupportedError."""
    bodies = {(each.domain, each.name, each.overload): each for each in model.functions}
    sizes: dict[tuple[str, str, str], int] = {}
    entered: set[tuple[str, str, str]] = set()

    def written(found: Iterable[onnx.NodeProto]) -> int:
        return min(sum(size(node) for node in _inner_nodes(found)), MOST_NODES + 1)

    def size(node: onnx.NodeProto) -> int:
        key = (node.domain, node.op_type, node.overload)
        if key not in bodies:
            return 1
        if key not in sizes:
            if key in entered:
                raise InputError(f"{path}: the function {node.op_type} calls itself. Export the model again.")
            entered.add(key)
            sizes[key] = written(bodies[key].node)
        return sizes[key]

    try:
        count = written(model.graph.node)
    except RecursionError as error:
        raise InputError(f"{path}: its functions call each other too deeply. Export the model again.") from error
    if count > MOST_NODES:
        raise UnsupportedError(f"{path} has more than {MOST_NODES:,} operators with its functions written out.")


def opset(model: onnx.ModelProto) -> int:
    """The version of the standard operators; 0 where none is named."""
    return max((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), default=0)
