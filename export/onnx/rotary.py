"""Rotary position embeddings in a captured graph, found by their form.

transformers writes x · cos + (−x₂, x₁) · sin, x₁ and x₂ the halves of a head or of its first features. What is rotated
in pairs of neighbours is left as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from compress.export.onnx.pattern import last_size, made_by, number, sides


class Rotation(NamedTuple):
    """values (batch, heads, s, d) before they are rotated; cos, sin (batch or 1, s, width), width ≤ d."""

    values: ir.Value
    cos: ir.Value
    sin: ir.Value
    width: int


class _Part(NamedTuple):
    """Features `start` to `stop` of a value."""

    source: ir.Value
    start: int
    stop: int


def find(value: ir.Value | None) -> Rotation | None:
    """The rotation that makes a value, of whole heads or of their first features."""
    found = _rotated(value)
    if found is not None:
        return found
    pair = _joined(value)
    inner = _rotated(pair[0]) if pair is not None else None
    if pair is None or inner is None:
        return None
    first, rest = _part(inner.values), _part(pair[1])
    if first is None or rest is None or first.source is not rest.source:
        return None
    whole = (first.start, first.stop, rest.start, rest.stop) == (0, inner.width, inner.width, last_size(rest.source))
    return inner._replace(values=first.source) if whole else None


def _rotated(value: ir.Value | None) -> Rotation | None:
    """x · cos + (−x₂, x₁) · sin, with the operands of each in any order."""
    for straight, crossed in sides(made_by(value, "Add")):
        for values, cos in sides(made_by(straight, "Mul")):
            for halves, sin in sides(made_by(crossed, "Mul")):
                width = last_size(values)
                if width is None or not _swaps(halves, values, width):
                    continue
                angles = _angles(cos, width), _angles(sin, width)
                if angles[0] is not None and angles[1] is not None:
                    return Rotation(values, angles[0], angles[1], width)
    return None


def _swaps(halves: ir.Value, values: ir.Value, width: int) -> bool:
    """Whether a value is (−x₂, x₁)."""
    pair = _joined(halves)
    negated = made_by(pair[0], "Neg") if pair is not None else None
    if pair is None or negated is None or width % 2:
        return False
    return _part(negated.inputs[0]) == (values, width // 2, width) and _part(pair[1]) == (values, 0, width // 2)


def _joined(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """Two values that are put together along the last axis."""
    node = made_by(value, "Concat")
    if node is None or value is None or len(node.inputs) != 2 or value.shape is None:
        return None
    first, second = node.inputs
    last = node.attributes["axis"].as_int() in (-1, len(value.shape) - 1)
    return (first, second) if last and first is not None and second is not None else None


def _part(value: ir.Value | None) -> _Part | None:
    """What a Slice takes along the last axis."""
    node = made_by(value, "Slice")
    source = node.inputs[0] if node is not None else None
    size = last_size(source)
    if node is None or source is None or source.shape is None or size is None or len(node.inputs) < 4:
        return None
    start, stop, axis = (number(each) for each in node.inputs[1:4])
    step = number(node.inputs[4]) if len(node.inputs) > 4 else 1
    if start is None or stop is None or step != 1 or axis not in (-1, len(source.shape) - 1):
        return None
    return _Part(source, int(start), int(min(stop, size))) if 0 <= start < stop else None


def _angles(value: ir.Value, width: int) -> ir.Value | None:
    """(batch or 1, s, width), of which a value is what every head reads."""
    node = made_by(value, "Unsqueeze")
    found = node.inputs[0] if node is not None and number(node.inputs[1]) == 1 else None
    known = found is not None and found.shape is not None and len(found.shape) == 3 and found.shape[2] == width
    return found if known else None
