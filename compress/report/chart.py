"""The speed-ups as an inline SVG: estimate, interval, noise floor and a line at 1.

Positions are percentages and text is in pixels, so the drawing narrows with the page and the text stays readable.
Numbers come from the records only to place marks; every figure that is read comes from the table's own text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from compress.records import Timing
from compress.report import format as fmt
from compress.report.axes import Scale, ratio_scale, ratio_ticks

MAX_BARS = 40
CAPTION = (
    "Mark: estimate; line: its interval; grey band: noise floor, the baseline against itself. Log scale; right of the "
    "dashed line the variant is faster."
)
_ROW, _LABEL, _BAR, _AXIS = 46, 21, 32, 34  # pixels: height of a row, of its label, of its bar in it, of the axis
_LEFT, _RIGHT = 3.0, 97.0  # percent of the width
_MARKS = {
    "faster": "M-6,-6 L7,0 L-6,6 Z",
    "slower": "M6,-6 L-7,0 L6,6 Z",
    "same": "M-5,-5 H5 V5 H-5 Z",
    "inconclusive": "M0,-7 L7,0 L0,7 L-7,0 Z",
}


def speed_chart(timings: Sequence[Timing]) -> str:
    """One bar per setting; empty where nothing was timed."""
    shown = [timing for timing in timings if timing.speedup > 0 and math.isfinite(timing.speedup)][:MAX_BARS]
    if not shown:
        return ""
    intervals = [interval for timing in shown for interval in (timing.interval, timing.control)]
    values = [end for interval in intervals for end in (interval.low, interval.high)]
    scale = ratio_scale([*values, *(timing.speedup for timing in shown)], _LEFT, _RIGHT)
    bottom = _ROW * len(shown) + 8
    parts = [f'<svg class="chart" role="img" aria-labelledby="speed-chart" width="100%" height="{bottom + _AXIS}">']
    parts.append('<title id="speed-chart">Speed-up over the baseline per setting</title>')
    parts += [_tick(value, scale, bottom, len(shown)) for value in ratio_ticks(scale)]
    parts += [_bar(timing, index * _ROW, scale) for index, timing in enumerate(shown)]
    return "\n".join([*parts, "</svg>"])


def _bar(timing: Timing, top: int, scale: Scale) -> str:
    middle = top + _BAR
    start, end = _x(timing.interval.low, scale), _x(timing.interval.high, scale)
    noise, noise_end = _x(timing.control.low, scale), _x(timing.control.high, scale)
    noise_width = max(noise_end - noise, 0.2)
    value, bounds = fmt.speedup(timing.speedup, timing.interval)
    title = escape(f"{timing.name}: {value} ({bounds}), {timing.verdict}")
    return (
        f"<g><title>{title}</title>"
        f'<text class="label" x="0" y="{top + 16}">{escape(timing.name)}</text>'
        f'<text class="value" x="100%" y="{top + 16}" text-anchor="end">{escape(f"{value} {timing.verdict}")}</text>'
        f'<rect class="noise" x="{noise:.2f}%" y="{middle - 9}" width="{noise_width:.2f}%" height="18"/>'
        f'<g class="{timing.verdict}"><line x1="{start:.2f}%" x2="{end:.2f}%" y1="{middle}" y2="{middle}"/>'
        + "".join(f'<line x1="{x:.2f}%" x2="{x:.2f}%" y1="{middle - 5}" y2="{middle + 5}"/>' for x in (start, end))
        + f'<svg x="{_x(timing.speedup, scale):.2f}%" y="{middle}" overflow="visible">'
        f'<path d="{_MARKS[timing.verdict]}"/></svg></g></g>'
    )


def _tick(value: float, scale: Scale, bottom: int, rows: int) -> str:
    """A line beside every bar, below the row's label; the last one reaches the axis."""
    x = scale.at(value)
    kind = "one" if value == 1 else "tick"
    ends = [*(_ROW * row for row in range(1, rows)), bottom]
    lines = (
        f'<line class="{kind}" x1="{x:.2f}%" x2="{x:.2f}%" y1="{_ROW * row + _LABEL}" y2="{end}"/>'
        for row, end in enumerate(ends)
    )
    return "".join(lines) + f'<text class="axis" x="{x:.2f}%" y="{bottom + 18}" text-anchor="middle">{value:g}x</text>'


def _x(value: float, scale: Scale) -> float:
    return scale.at(1.0 if math.isnan(value) else value)
