"""A graph's types that ONNX Runtime has no kernels for on the CPU, as float32 that holds the same numbers.

FP4 weights are decoded; what is bfloat16 becomes float32 that is rounded to bfloat16 wherever it was made.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, external_data_helper, numpy_helper

BF16, FLOAT = TensorProto.BFLOAT16, TensorProto.FLOAT


def array(tensor: TensorProto, folder: Path) -> NDArray[np.float32]:
    """An initializer's values, read from beside the graph where it is stored there."""
    if tensor.data_location == TensorProto.EXTERNAL:
        external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]
    return np.asarray(numpy_helper.to_array(tensor), np.float32)


def decode_fp4(document: onnx.ModelProto, folder: Path) -> None:
    """In place: each FP4 weight as what its product reads, in the type of its scales."""
    fp4 = {each.name: each for each in document.graph.initializer if each.data_type == TensorProto.FLOAT4E2M1}
    stored = {each.name: each for each in document.graph.initializer}
    made = {node.output[0]: node for node in document.graph.node}
    for node in list(document.graph.node):
        if node.op_type != "DequantizeLinear" or node.input[0] not in fp4:
            continue
        attributes = {each.name: each.i for each in node.attribute}
        scale, inner = stored.get(node.input[1]), made.get(node.input[1])
        if scale is not None:
            scales, kind = array(scale, folder), scale.data_type
        else:  # two levels: the scales are codes themselves
            assert inner is not None
            outer = stored[inner.input[1]]
            scales, kind = array(stored[inner.input[0]], folder) * array(outer, folder), outer.data_type
        values = array(fp4[node.input[0]], folder)
        values = values * np.repeat(scales, attributes["block_size"], axis=attributes["axis"])
        number = onnx.helper.tensor_dtype_to_np_dtype(kind)
        document.graph.initializer.append(numpy_helper.from_array(values.astype(number), node.output[0]))
        document.graph.node.remove(node)
    for name in fp4:
        document.graph.initializer.remove(fp4[name])


def widen_bfloat16(document: onnx.ModelProto, folder: Path) -> None:
    """In place, inputs and outputs as well."""
    graph = document.graph
    values = {each.name: each.type.tensor_type for each in (*graph.input, *graph.output, *graph.value_info)}
    narrow = {each.name for each in graph.initializer if each.data_type == BF16}
    narrow |= {each.name for each in graph.input if values[each.name].elem_type == BF16}
    nodes: list[Any] = []
    for node in graph.node:
        nodes.append(node)
        if _makes_bfloat16(node, narrow):
            narrow.update(node.output)
            nodes += [extra for place in range(len(node.output)) for extra in _rounded(node, place)]
    del graph.node[:]
    graph.node.extend(nodes)
    for place, tensor in enumerate(graph.initializer):
        if tensor.data_type == BF16:
            graph.initializer[place].CopyFrom(numpy_helper.from_array(array(tensor, folder), tensor.name))
    for kind in values.values():
        if kind.elem_type == BF16:
            kind.elem_type = FLOAT


def _makes_bfloat16(node: onnx.NodeProto, narrow: Collection[str]) -> bool:
    if node.op_type == "Cast":
        return any(each.name == "to" and each.i == BF16 for each in node.attribute)
    if node.op_type in ("QuantizeLinear", "Shape"):
        return False
    return any(name in narrow for name in node.input)


def _rounded(node: onnx.NodeProto, place: int) -> list[onnx.NodeProto]:
    """What follows a node so that its output, under its own name, is float32 with the numbers of bfloat16."""
    name = node.output[place]
    if node.op_type == "Cast":
        node.output[place] = f"{name}/before widening"
        return [onnx.helper.make_node("Cast", [node.output[place]], [name], to=FLOAT)]
    node.output[place] = f"{name}/exact"
    first = onnx.helper.make_node("Cast", [node.output[place]], [f"{name}/before widening"], to=BF16)
    return [first, onnx.helper.make_node("Cast", [f"{name}/before widening"], [name], to=FLOAT)]
