"""Transforms of a layer's input as nodes: blocks of neighbouring inputs times one constant matrix."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from compress.export.onnx.graph import GraphBuilder
from compress.layer import LayerSpec
from compress.transforms import Hadamard

NODE_BYTES = 500
"""Of the nodes of one transform, fitted on a graph of tests/test_hadamard.py."""


def lower(builder: GraphBuilder, pre: Iterable[Hadamard], values: ir.Value) -> ir.Value:
    """values (…, in) → the same shape. Layers that transform one tensor alike (q, k, v) share the nodes."""
    for transform in pre:
        key = ("transform", values, transform)
        if key not in builder.shared:
            matrix = builder.constant(transform.matrix().numpy(), np.float32)
            blocks = builder.node("Reshape", [values, builder.constant([-1, transform.block])])
            turned = builder.node("MatMul", [blocks, matrix])
            shape = builder.node("Shape", [values], dtype=ir.DataType.INT64)
            builder.shared[key] = builder.node("Reshape", [turned, shape])
        values = builder.shared[key]
    return values


def stored_bytes(specs: Iterable[LayerSpec]) -> int:
    """Bytes of all matrices, each stored once, and of the nodes."""
    used = [transform for spec in specs for transform in spec.pre]
    return sum(transform.block**2 * 4 for transform in set(used)) + len(used) * NODE_BYTES
