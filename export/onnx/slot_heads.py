"""Heads that score new tokens inside the slot graph: the nodes of compress/kv/heads.py's `scores_of`."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from compress.export.onnx.graph import GraphBuilder
from compress.kv.spec import LayerTensors
from compress.models import cache_tensors
from compress.models.model import Model

NAME = "caches."
"""How the names of their weights begin."""


def predict_bytes(model: Model) -> int:
    """Of all heads of a model's caches, float32, whether or not they are there yet."""
    return sum(size for name, size in cache_tensors.predicted(model) if name.startswith("head."))


def scores(graph: GraphBuilder, layer: int, features: Sequence[ir.Value], tensors: LayerTensors) -> ir.Value:
    """What a layer's head says of new tokens, (batch, kv heads, n).

    Args: features: (batch, n, …) each, side by side what the head looks at; tensors: `head.first` …
    """
    values = features[0]
    if len(features) > 1:
        values = graph.node("Concat", features, {"axis": -1})
    if "head.first" in tensors:
        values = _linear(graph, layer, "head.first", values, tensors)
        values = graph.node("Mul", [values, graph.node("Sigmoid", [values])])
    return graph.node("Transpose", [_linear(graph, layer, "head.second", values, tensors)], {"perm": [0, 2, 1]})


def _linear(graph: GraphBuilder, layer: int, name: str, values: ir.Value, tensors: LayerTensors) -> ir.Value:
    weight, bias = tensors[name], tensors.get(f"{name}_bias")
    turned = _stored(graph, f"{NAME}{layer}.{name}", weight.T)
    out = graph.node("MatMul", [values, turned])
    if bias is None:
        return out
    return graph.node("Add", [out, _stored(graph, f"{NAME}{layer}.{name}_bias", bias)])


def _stored(graph: GraphBuilder, name: str, tensor: Tensor) -> ir.Value:
    return graph.initializer(name, lambda: tensor.float(), torch.float32, tuple(tensor.shape))
