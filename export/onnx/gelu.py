"""GELU in the form that ONNX Runtime computes fast: the standard operator, and its bias an addition of its own."""

from __future__ import annotations

import math

import onnx_ir as ir

from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.pattern import made_by, number, other_side, put_for, side_with, vector_sides

OPSET = 20
"""The first of the standard opset that has Gelu."""
NEAR = 1e-5
"""How far the constants of a formula may be from those of the operator: float32 of decimals that models write out."""


def as_operators(builder: GraphBuilder) -> None:
    """Formulas of GELU that a model writes out, ½x(1 + erf(x/√2)) and the one with tanh, become Gelu.

    ONNX Runtime makes FastGelu of the second, whose kernel takes as long with its bias added apart (1.31.1); the first
    it finds itself, and the graph is the smaller for both.
    """
    if builder.graph.opset_imports.get("", 0) < OPSET:
        return
    for node in list(builder.graph):
        found = _formula(node)
        if found is not None:
            values, kind = found
            put_for(builder.graph, node, ir.node("Gelu", [values], {"approximate": kind}, name=node.name))


def keep_apart(builder: GraphBuilder) -> None:
    """The bias in front of a Gelu is added by a Sum.

    ONNX Runtime fuses Add and Gelu into BiasGelu, whose CPU kernel takes a fifth longer than both (1.31.1: 2.4 ms
    against 0.7 and 1.3 for 2048 rows of 1536, one thread). It does not look for Sum.
    """
    for node in list(builder.graph):
        before = made_by(node.inputs[0], "Add") if node.op_type == "Gelu" and not node.domain else None
        if before is not None and vector_sides(before) is not None:
            put_for(builder.graph, before, ir.node("Sum", list(before.inputs), name=before.name))


def _formula(node: ir.Node) -> tuple[ir.Value, str] | None:
    """x and the kind of GELU, of the last product of a formula: (x · ½) · (1 + f(x)), in any order."""
    if node.op_type != "Mul" or node.domain:
        return None
    for value, rest in (tuple(node.inputs), tuple(reversed(node.inputs))):
        shifted = made_by(value, "Add")
        inner = side_with(shifted, 1.0) if shifted is not None else None
        half = made_by(rest, "Mul")
        values = side_with(half, 0.5) if half is not None else None
        if inner is not None and values is not None:
            if _is_erf(inner, values):
                return values, "none"
            if _is_tanh(inner, values):
                return values, "tanh"
    return None


def _is_erf(value: ir.Value, values: ir.Value) -> bool:
    """erf(x / √2)."""
    error = made_by(value, "Erf")
    scaled = error.inputs[0].producer() if error is not None and error.inputs[0] is not None else None
    if scaled is None or scaled.domain:
        return False
    if scaled.op_type == "Div":
        divisor = number(scaled.inputs[1])
        return scaled.inputs[0] is values and divisor is not None and math.isclose(divisor, 2**0.5, rel_tol=NEAR)
    return scaled.op_type == "Mul" and side_with(scaled, 0.5**0.5, near=NEAR) is values


def _is_tanh(value: ir.Value, values: ir.Value) -> bool:
    """tanh(√(2/π) · (x + 0.044715 x³))."""
    curve = made_by(value, "Tanh")
    scaled = made_by(curve.inputs[0], "Mul") if curve is not None else None
    summed = made_by(side_with(scaled, math.sqrt(2 / math.pi), near=NEAR), "Add") if scaled is not None else None
    small = made_by(other_side(summed, values), "Mul") if summed is not None else None
    cube = made_by(side_with(small, 0.044715, near=NEAR), "Pow") if small is not None else None
    return cube is not None and cube.inputs[0] is values and number(cube.inputs[1]) == 3
