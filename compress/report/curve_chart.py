"""A figure by something else as an inline SVG: a step per part of x, with its interval as a band."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from compress.records.quality import Curve, CurvePoint
from compress.report import format as fmt
from compress.report.axes import Scale, linear_scale, linear_ticks
from compress.report.quality_rows import curve_key, point_text

CAPTION = "Line: estimate over a part of the data; band: its interval, cut where it is very wide."
_DIAGONAL = " On the dashed diagonal it would be as often right as it is sure."
_HEIGHT, _TOP, _BOTTOM = 230, 22, 190  # pixels
_LEFT, _RIGHT = 13.0, 98.0  # percent of the width
_WIDEST = 3.0  # times the largest value that the axis reaches


def curve_caption(curve: Curve) -> str:
    """What the marks mean."""
    return CAPTION + (_DIAGONAL if _is_reliability(curve) else "")


def curve_chart(curve: Curve) -> str:
    """Empty for fewer than two parts."""
    points = [point for point in curve.points if math.isfinite(point.value)]
    if len(points) < 2:
        return ""
    across = Scale(points[0].low, max(point.high for point in points), _LEFT, _RIGHT)
    down = _scale(points, curve)
    key = f"{curve_key(curve)}-chart"
    title = fmt.clean(f"{curve.y} by {curve.x}")
    parts = [f'<svg class="chart curve" role="img" aria-labelledby="{key}" width="100%" height="{_HEIGHT}">']
    parts.append(f'<title id="{key}">{escape(title)}</title>')
    parts += _grid(curve, across, down)
    if _is_reliability(curve):
        parts.append(_diagonal(across, down))
    parts += [_part(point, curve, across, down) for point in points]
    return "\n".join([*parts, "</svg>"])


def _is_reliability(curve: Curve) -> bool:
    return curve.name == "reliability"


def _scale(points: Sequence[CurvePoint], curve: Curve) -> Scale:
    if _is_reliability(curve):
        return Scale(0.0, 1.0, _BOTTOM, _TOP)
    ends = [end for point in points if (found := point.interval) for end in (found.low, found.high)]
    values = [0.0, *(point.value for point in points)]
    if min(values) < 0:
        return linear_scale([*values, *ends], _BOTTOM, _TOP)
    # a band that is very much wider than the others ends at the edge
    high = min(max([*values, *ends]), _WIDEST * max(values)) or 1.0
    return Scale(0.0, 1.08 * high, _BOTTOM, _TOP)


def _grid(curve: Curve, across: Scale, down: Scale) -> list[str]:
    found = []
    for value in linear_ticks(down):
        y = down.at(value)
        found.append(f'<line class="tick" x1="{_LEFT}%" x2="{_RIGHT}%" y1="{y:.1f}" y2="{y:.1f}"/>')
        found.append(f'<text class="axis" x="{_LEFT - 1.5}%" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in linear_ticks(across, most=6):
        x = across.at(value)
        found.append(f'<text class="axis" x="{x:.2f}%" y="{_BOTTOM + 17}" text-anchor="middle">{value:g}</text>')
    unit = "" if _is_reliability(curve) else fmt.unit_text(curve.unit, ", ")
    found.append(f'<text class="name" x="0" y="{_TOP - 10}">{escape(fmt.clean(curve.y + unit, limit=50))}</text>')
    name = escape(fmt.clean(curve.x, limit=50))
    found.append(f'<text class="name" x="{_RIGHT}%" y="{_BOTTOM + 35}" text-anchor="end">{name}</text>')
    return found


def _diagonal(across: Scale, down: Scale) -> str:
    low, high = across.low, across.high
    return (
        f'<line class="one" x1="{across.at(low):.2f}%" x2="{across.at(high):.2f}%" y1="{down.at(low):.1f}" '
        f'y2="{down.at(high):.1f}"/>'
    )


def _part(point: CurvePoint, curve: Curve, across: Scale, down: Scale) -> str:
    left, right, y = across.at(point.low), across.at(point.high), down.at(point.value)
    ends = f"{fmt.short(point.low)} to {fmt.short(point.high)}"
    title = escape(f"{ends}: {point_text(point, curve.unit)}, of {point.count}")
    band = ""
    if interval := point.interval:
        top, bottom = down.at(interval.high), down.at(interval.low)
        size = f'width="{max(right - left, 0.3):.2f}%" height="{max(bottom - top, 0.5):.1f}"'
        band = f'<rect class="band" x="{left:.2f}%" y="{top:.1f}" {size}/>'
    middle = (left + right) / 2
    return (
        f"<g><title>{title}</title>{band}"
        f'<line class="line" x1="{left:.2f}%" x2="{right:.2f}%" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<circle class="dot" cx="{middle:.2f}%" cy="{y:.1f}" r="3"/></g>'
    )
