"""Norms in the form that ONNX Runtime computes fast."""

from __future__ import annotations

import onnx_ir as ir
import torch

from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.pattern import (
    last_size,
    made_by,
    number,
    only_user,
    other_side,
    put_for,
    vector_sides,
)


def as_quotients(builder: GraphBuilder) -> None:
    """RMSNorms divide by the root, as ONNX Runtime expects of what it makes one SimplifiedLayerNormalization of.

    x · rsqrt(mean x² + ε) · g, which torch's exporter writes, stays seven operators there; x / sqrt(mean x² + ε) · g
    becomes one (1.31.1). A norm without gains gets ones. The addition in front stays an operator of its own:
    SkipSimplifiedLayerNormalization takes a third longer than both (2048 rows of 1536, one thread).
    """
    for node in list(builder.graph):
        found = _normed(node)
        if found is None:
            continue
        values, root = found
        quotient = ir.node("Div", [values, root], name=node.name)
        if _has_gains(node.outputs[0]):
            put_for(builder.graph, node, quotient)
        else:
            _put_with_ones(builder, node, quotient)


def keep_apart(builder: GraphBuilder) -> None:
    """The addition in front of a LayerNormalization becomes a Sum, which is the same of two tensors.

    ONNX Runtime fuses Add and LayerNormalization into SkipLayerNormalization, whose CPU kernel takes several times as
    long as both (1.31.1, one thread: of an int8 encoder of 6 blocks of 384, 2048 tokens, it was 38 % of the time; with
    Sum the whole encoder is 1.25 to 1.35 times faster). It does not look for Sum.
    """
    for norm in list(builder.graph):
        before = made_by(norm.inputs[0], "Add") if norm.op_type == "LayerNormalization" else None
        if before is not None:
            put_for(builder.graph, before, ir.node("Sum", list(before.inputs), name=before.name))


def _normed(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """x and sqrt(mean x² + ε) of a node that is x · (1 / sqrt(mean x² + ε)), the mean over the last axis."""
    if node.op_type != "Mul" or node.domain:
        return None
    for factor in node.inputs:
        inverse = made_by(factor, "Reciprocal")
        root = made_by(inverse.inputs[0], "Sqrt") if inverse is not None else None
        values = other_side(node, factor)
        if root is not None and values is not None and _is_mean_square(root.inputs[0], values):
            return values, root.outputs[0]
    return None


def _is_mean_square(value: ir.Value | None, values: ir.Value) -> bool:
    """Whether a value is mean values² + ε over the last axis."""
    shifted = made_by(value, "Add")
    if shifted is None:
        return False
    for side, epsilon in (tuple(shifted.inputs), tuple(reversed(shifted.inputs))):
        mean = made_by(side, "ReduceMean")
        square = made_by(mean.inputs[0], "Pow") if mean is not None and number(epsilon) is not None else None
        if mean is not None and square is not None and square.inputs[0] is values and _over_the_last(mean, values):
            return number(square.inputs[1]) == 2
    return False


def _over_the_last(mean: ir.Node, values: ir.Value) -> bool:
    axes = mean.inputs[1] if len(mean.inputs) > 1 else None
    kept = mean.attributes["keepdims"].as_int() if "keepdims" in mean.attributes else 1
    rank = len(values.shape) if values.shape is not None else 0
    return bool(kept) and rank > 0 and number(axes) in (-1, rank - 1)


def _has_gains(normed: ir.Value) -> bool:
    gains = only_user(normed)
    if gains is None or gains.op_type != "Mul" or gains.domain:
        return False
    sides = vector_sides(gains)
    return sides is not None and sides[0] is normed


def _put_with_ones(builder: GraphBuilder, node: ir.Node, quotient: ir.Node) -> None:
    """Put the quotient, multiplied by ones, for a node whose width is known."""
    size, normed = last_size(node.outputs[0]), quotient.outputs[0]
    if size is None:
        return
    normed.name, normed.type, normed.shape = f"{node.name}/normed", node.outputs[0].type, node.outputs[0].shape
    builder.graph.insert_before(node, quotient)
    ones = builder.initializer(f"ones_{size}", lambda: torch.ones(size), torch.float32, [size])
    put_for(builder.graph, node, ir.node("Mul", [normed, ones], name=f"{node.name}/gains"))
