"""Small ONNX models made from seeds, as exporters write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

SIZE = (3, 12, 12)


class Graph:
    """Nodes and weights in order."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, *shape: int) -> str:
        """Normal values of a size that keeps activations near 1."""
        scale = (2 / max(1, int(np.prod(shape[1:])))) ** 0.5 if len(shape) > 1 else 0.1
        return self.constant(name, self.random.standard_normal(shape).astype(np.float32) * np.float32(scale))

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """A stored tensor."""
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(self, op: str, inputs: Sequence[str], output: str, name: str = "", **attributes: Any) -> str:
        """One node; gives the name of its output."""
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output

    def model(
        self,
        shape: Sequence[int | str],
        outputs: dict[str, Sequence[int | str]],
        opset: int = 13,
        input_name: str = "input",
    ) -> onnx.ModelProto:
        """The whole, of one input of images."""
        inputs = [helper.make_tensor_value_info(input_name, TensorProto.FLOAT, list(shape))]
        made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(own)) for name, own in outputs.items()]
        graph = helper.make_graph(self.nodes, "graph", inputs, made, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def classifier(opset: int = 13) -> onnx.ModelProto:
    """Conv, BatchNormalization, Relu, a depthwise Conv on a residual path, pooling, Gemm and a MatMul: five classes."""
    g = Graph()
    x = g.node("Conv", ["input", g.weight("stem.weight", 8, 3, 3, 3)], "c", "/stem/Conv", pads=[1, 1, 1, 1])
    norm = [g.constant(f"bn.{key}", g.random.uniform(0.5, 1.5, 8).astype(np.float32)) for key in "sbmv"]
    x = g.node("Relu", [g.node("BatchNormalization", [x, *norm], "n", "/bn")], "r", "/relu")
    w, b = g.weight("deep.weight", 8, 1, 3, 3), g.weight("deep.bias", 8)
    y = g.node("Conv", [x, w, b], "d", "/block.0/deep/Conv", pads=[1, 1, 1, 1], group=8)
    x = g.node("Relu", [g.node("Add", [x, y], "a", "/add")], "q", "/relu2")
    x = g.node("MaxPool", [x], "p", "/pool", kernel_shape=[2, 2], strides=[2, 2])
    x = g.node("Flatten", [x], "f", "/flatten")
    w, b = g.weight("fc.weight", 16, 8 * 36), g.weight("fc.bias", 16)
    x = g.node("Relu", [g.node("Gemm", [x, w, b], "g", "/fc/Gemm", transB=1)], "h", "/relu3")
    g.node("MatMul", [x, g.weight("head.weight", 16, 5)], "output", "/head/MatMul")
    return g.model(["batch", *SIZE], {"output": ["batch", 5]}, opset)


def detector() -> onnx.ModelProto:
    """One image at a time, no names of nodes, two outputs, and arithmetic on shapes between."""
    g = Graph()
    x = g.node("Relu", [g.node("Conv", ["images", g.weight("w0", 8, 3, 3, 3), g.weight("b0", 8)], "c0")], "r0")
    for name, channels in (("scores", 2), ("boxes", 4)):
        y = g.node("Conv", [x, g.weight(f"w.{name}", channels, 8, 3, 3), g.weight(f"b.{name}", channels)], f"c.{name}")
        y = g.node("Transpose", [y], f"t.{name}", perm=[0, 2, 3, 1])
        y = g.node("Reshape", [y, g.constant(f"s.{name}", np.array([1, -1, channels]))], f"m.{name}")
        g.node("Softmax" if name == "scores" else "Sigmoid", [y], name)
    return g.model([1, *SIZE], {"scores": [1, 64, 2], "boxes": [1, 64, 4]}, input_name="images")


def save(model: onnx.ModelProto, path: Path) -> Path:
    """Write it as one file."""
    path.write_bytes(model.SerializeToString())
    return path
