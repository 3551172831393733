"""Small ONNX models made from seeds, as exporters write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

SIZE = (3, 12, 12)
CONFIG = {"model_type": "bert", "architectures": ["BertModel"], "vocab_size": 256, "max_position_embeddings": 24}


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


def encoder(name: str = "last_hidden_state", mask: bool = True, length: int | str = "length") -> onnx.ModelProto:
    """Tokens of 256 → a table, two layers with a residual path and the mean over what the mask shows. Puts out the
    hidden states (length, 16), or for "logits" three classes."""
    g = Graph()
    x = g.node(
        "Gather", [g.constant("table", g.random.standard_normal((256, 16)).astype(np.float32)), "input_ids"], "e"
    )
    hidden = g.node("Relu", [g.node("MatMul", [x, g.weight("w1", 16, 32)], "m1", "/up/MatMul")], "r")
    x = g.node("Add", [x, g.node("MatMul", [hidden, g.weight("w2", 32, 16)], "m2", "/down/MatMul")], "s")
    given = ["input_ids", "attention_mask"] if mask else ["input_ids"]
    if mask:
        seen = g.node("Cast", ["attention_mask"], "f", to=TensorProto.FLOAT)
        seen = g.node("Unsqueeze", [seen, g.constant("axis", np.array([2]))], "u")
        top = g.node("ReduceSum", [g.node("Mul", [x, seen], "x"), g.constant("one", np.array([1]))], "t", keepdims=1)
        mean = g.node("Div", [top, g.node("ReduceSum", [seen, "one"], "n", keepdims=1)], "a")
        x = g.node("Add", [x, mean], name if name != "logits" else "h")
    if name == "logits":
        pooled = g.node("Squeeze", [mean, g.constant("ax", np.array([1]))], "p")
        g.node("MatMul", [pooled, g.weight("head", 16, 3)], "logits", "/head/MatMul")
    outputs = {name: ["batch", 3] if name == "logits" else ["batch", length, 16]}
    if not mask:
        g.node("Identity", [x], name)
    inputs = {each: (TensorProto.INT64, ["batch", length]) for each in given}
    return several(g, inputs, outputs)


def table() -> onnx.ModelProto:
    """Numbers (6,), a place in a table of nine and switches (4,), each by its name → two outputs."""
    g = Graph()
    one = g.node("MatMul", ["numbers", g.weight("w1", 6, 16)], "a", "numbers.MatMul")
    two = g.node("Gather", [g.constant("places", g.random.standard_normal((9, 16)).astype(np.float32)), "place"], "b")
    two = g.node("Squeeze", [two, g.constant("axis", np.array([1]))], "c")
    three = g.node("Cast", ["switches"], "d", to=TensorProto.FLOAT)
    three = g.node("MatMul", [three, g.weight("w3", 4, 16)], "f", "switches.MatMul")
    x = g.node("Relu", [g.node("Sum", [one, two, three], "s")], "r")
    g.node("MatMul", [x, g.weight("w4", 16, 1)], "price", "price.MatMul")
    g.node("Reshape", [g.node("MatMul", [x, g.weight("w5", 16, 6)], "m", "map.MatMul"),
                       g.constant("shape", np.array([-1, 2, 3]))], "map")  # fmt: skip
    inputs = {
        "numbers": (TensorProto.FLOAT, ["n", 6]),
        "place": (TensorProto.INT32, ["n", 1]),
        "switches": (TensorProto.BOOL, ["n", 4]),
    }
    return several(g, inputs, {"price": ["n", 1], "map": ["n", 2, 3]})


def several(
    g: Graph, inputs: dict[str, tuple[int, list[int | str]]], outputs: dict[str, list[int | str]], opset: int = 17
) -> onnx.ModelProto:
    """A model of inputs of any type."""
    given = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()]
    graph = helper.make_graph(g.nodes, "graph", given, made, g.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def save_folder(model: onnx.ModelProto, folder: Path, **config: Any) -> Path:
    """As an exporter writes it: model.onnx beside a config.json."""
    folder.mkdir(exist_ok=True)
    save(model, folder / "model.onnx")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder
