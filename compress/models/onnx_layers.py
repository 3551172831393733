"""The layers of an ONNX graph: MatMul, Gemm and Conv with a stored weight, put out of the graph as placeholders.

A placeholder is a node of the domain `compress`, as `capture` of the onnx target makes them of torch modules: `Conv
{layer, kernel, strides, pads, dilations, group}`, `Linear {layer}`, here with `weight`, the shape of its weight, and
`bias`, whether it has one. Everything else of the graph stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn

DOMAIN = "compress"
GIVEN = "given/"
"""Before the names of values inside of the graph, so that they meet none of those that a target makes."""
Stored = Mapping[str, onnx.TensorProto]


@dataclass(frozen=True)
class Taken:
    """A graph with placeholders; weights and biases by `<layer>.weight`, `<layer>.bias`; remarks."""

    model: onnx.ModelProto
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Found:
    """A node's weight, (out, in) or (out, in/groups, kh, kw), bias (out,) and what its placeholder says."""

    kind: str
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    attributes: dict[str, Any]


class _Left(Exception):  # noqa: N818 (why a node is no layer)
    pass


def take_layers(source: onnx.ModelProto) -> Taken:
    """The layers of a graph whose values have known types. Nodes that look like one but are not are told of."""
    model = onnx.ModelProto()
    model.CopyFrom(source)
    graph = model.graph
    _lift_constants(graph)
    stored = {tensor.name: tensor for tensor in graph.initializer}
    taken: dict[str, Tensor] = {}
    left: list[str] = []
    names, uses = _Names(), [name for node in graph.node for name in node.input]
    shared = 0
    for place, node in enumerate(graph.node):
        read = _READERS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if node.op_type == "MatMul" and node.input[1] not in stored:
            continue  # of two activations, as attention has it
        if read is None:
            if node.op_type in ("ConvTranspose", "LSTM", "GRU", "RNN"):
                left.append(f"{node.op_type} {node.name}".strip())
            continue
        try:
            if node.input[0] in stored:
                raise _Left("its input is stored")
            found = read(node, stored)
        except _Left as reason:
            left.append(f"{node.name or node.op_type} ({reason})")
            continue
        name = names.of(node, place)
        shared += uses.count(node.input[1]) > 1
        node.CopyFrom(_placeholder(name, node, found))
        taken[f"{name}.weight"] = torch.from_numpy(found.weight.copy(order="C"))
        if found.bias is not None:
            taken[f"{name}.bias"] = torch.from_numpy(found.bias.copy(order="C"))
    _drop_unused(graph)
    _rename(graph)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return Taken(model, taken, _notes(left, shared))


def _notes(left: list[str], shared: int) -> tuple[str, ...]:
    found = []
    if left:
        found.append(f"{len(left)} node(s) with weights are left as they are: {', '.join(left[:3])}.")
    if shared:
        found.append(f"{shared} layers share a weight with another; each is stored with its own.")
    return tuple(found)


def _lift_constants(graph: onnx.GraphProto) -> None:
    """Constant nodes that hold a tensor, as initializers."""
    kept = []
    for node in graph.node:
        values = [attribute.t for attribute in node.attribute if attribute.name == "value"]
        if node.op_type != "Constant" or not values:
            kept.append(node)
            continue
        tensor = graph.initializer.add()
        tensor.CopyFrom(values[0])
        tensor.name = node.output[0]
    if len(kept) < len(graph.node):
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(copies)


def _array(name: str, stored: Stored, what: str) -> NDArray[np.float32]:
    tensor = stored.get(name)
    if tensor is None:
        raise _Left(f"its {what} is computed")
    if tensor.data_type != onnx.TensorProto.FLOAT:
        raise _Left(f"its {what} is {onnx.TensorProto.DataType.Name(tensor.data_type).lower()}, not float32")
    return numpy_helper.to_array(tensor)


def _given(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _convolution(node: onnx.NodeProto, stored: Stored) -> _Found:
    weight = _array(node.input[1], stored, "weight")
    if weight.ndim != 4:
        raise _Left(f"a convolution over {weight.ndim - 2} axes")
    bias = _array(node.input[2], stored, "bias") if len(node.input) > 2 and node.input[2] else None
    given = _given(node)
    pads = list(given.get("pads", [0, 0, 0, 0]))
    if given.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID", b""):
        raise _Left("padding by the size of the image (auto_pad)")
    if pads[:2] != pads[2:]:
        raise _Left(f"padding {pads} is not the same on both sides")
    group = int(given.get("group", 1))
    attributes = {
        "kernel": list(weight.shape[2:]),
        "strides": list(given.get("strides", [1, 1])),
        "pads": pads,
        "dilations": list(given.get("dilations", [1, 1])),
        "group": group,
    }
    return _Found("Conv", weight, bias, attributes)


def _gemm(node: onnx.NodeProto, stored: Stored) -> _Found:
    weight, given = _array(node.input[1], stored, "weight"), _given(node)
    if given.get("transA", 0) or given.get("alpha", 1.0) != 1.0:
        raise _Left("it turns or scales its input")
    weight = weight if given.get("transB", 0) else weight.T
    bias = None
    if len(node.input) > 2 and node.input[2]:
        values = _array(node.input[2], stored, "bias") * np.float32(given.get("beta", 1.0))
        if values.size not in (1, weight.shape[0]) or (values.ndim > 1 and values.shape[0] != 1):
            raise _Left(f"its bias is {values.shape}")
        bias = np.broadcast_to(values.reshape(-1), weight.shape[:1])
    return _Found("Linear", weight, bias, {})


def _product(node: onnx.NodeProto, stored: Stored) -> _Found:
    weight = _array(node.input[1], stored, "weight")
    if weight.ndim != 2:
        raise _Left(f"its weight has {weight.ndim} axes")
    return _Found("Linear", weight.T, None, {})


_READERS: dict[str, Callable[[onnx.NodeProto, Stored], _Found]] = {
    "Conv": _convolution,
    "Gemm": _gemm,
    "MatMul": _product,
}


def _placeholder(name: str, node: onnx.NodeProto, found: _Found) -> onnx.NodeProto:
    more = {**found.attributes, "layer": name, "weight": list(found.weight.shape), "bias": int(found.bias is not None)}
    return helper.make_node(found.kind, [node.input[0]], [node.output[0]], name=name, domain=DOMAIN, **more)


class _Names:
    """Layer names as module paths: `/model.0/conv/Conv` is `model.0.conv.Conv`. Each once, and none inside another."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._inner: set[str] = set()

    def of(self, node: onnx.NodeProto, place: int) -> str:
        """A name for the node at a place."""
        parts = [part for part in node.name.replace("/", ".").split(".") if part]
        # a module cannot hold a child of the name of one of its own attributes
        name = ".".join(part + "_" if hasattr(nn.Module, part) else part for part in parts) or f"{node.op_type}_{place}"
        while name in self._taken or name in self._inner or any(each in self._taken for each in _prefixes(name)):
            name = f"{name.replace('.', '_')}_{place}"
        self._taken.add(name)
        self._inner.update(_prefixes(name))
        return name


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    kept = [onnx.TensorProto.FromString(t.SerializeToString()) for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _rename(graph: onnx.GraphProto) -> None:
    """Put `GIVEN` before every name but those of the inputs and outputs."""
    own = {value.name for value in (*graph.input, *graph.output)} | {""}

    def named(names: Iterable[str]) -> list[str]:
        return [name if name in own else GIVEN + name for name in names]

    for place, node in enumerate(graph.node):
        node.input[:], node.output[:] = named(node.input), named(node.output)
        if node.domain != DOMAIN:
            node.name = f"{GIVEN}{node.name or place}"
    for item in (*graph.initializer, *graph.value_info):
        item.name = named([item.name])[0]
