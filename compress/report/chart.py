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

MAX_BARS = 40
_ROW, _BAR, _AXIS = 46, 32, 34  # pixels: height of a row, of its bar in it, of the axis
_LEFT, _SPAN = 3.0, 94.0  # percent of the width
_LIMIT = 64.0  # ratios beyond it are drawn at the edge
_TICK_GAP = 0.12  # of the width between two labels
_COARSE = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
_MIDDLE = (*_COARSE, 0.25, 0.3, 0.4, 0.7, 1.5, 3.0, 4.0, 7.0, 15.0, 30.0)
_FINE = tuple(step / 10 for step in range(3, 31))
_FINEST = tuple(step / 20 for step in range(16, 27))
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
    low, high = _range(shown)
    bottom = _ROW * len(shown) + 8
    parts = [f'<svg class="chart" role="img" aria-labelledby="chart-title" width="100%" height="{bottom + _AXIS}">']
    parts.append('<title id="chart-title">Speed-up over the baseline per setting</title>')
    parts += [_tick(value, low, high, bottom) for value in _ticks(low, high)]
    parts += [_bar(timing, index * _ROW, low, high) for index, timing in enumerate(shown)]
    return "\n".join([*parts, "</svg>"])


def _bar(timing: Timing, top: int, low: float, high: float) -> str:
    middle = top + _BAR
    start, end = _x(timing.interval.low, low, high), _x(timing.interval.high, low, high)
    noise, noise_end = _x(timing.control.low, low, high), _x(timing.control.high, low, high)
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
        + f'<svg x="{_x(timing.speedup, low, high):.2f}%" y="{middle}" overflow="visible">'
        f'<path d="{_MARKS[timing.verdict]}"/></svg></g></g>'
    )


def _tick(value: float, low: float, high: float, bottom: int) -> str:
    x = _x(value, low, high)
    kind = "one" if value == 1 else "tick"
    return (
        f'<line class="{kind}" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="{bottom}"/>'
        f'<text class="axis" x="{x:.2f}%" y="{bottom + 18}" text-anchor="middle">{value:g}x</text>'
    )


def _range(timings: Sequence[Timing]) -> tuple[float, float]:
    intervals = [interval for timing in timings for interval in (timing.interval, timing.control)]
    values = [end for interval in intervals for end in (interval.low, interval.high)] + [t.speedup for t in timings]
    known = [_clamp(value) for value in values if not math.isnan(value)]
    return min(*known, 0.9) / 1.03, max(*known, 1.1) * 1.03


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from 1 outwards, at least four where they fit, none closer than its label is wide."""
    for candidates in (_COARSE, _MIDDLE, _FINE, _FINEST):
        kept = [1.0]
        inside = sorted((value for value in candidates if low <= value <= high), key=lambda v: abs(math.log(v)))
        for value in inside:
            if all(abs(_share(value, low, high) - _share(other, low, high)) >= _TICK_GAP for other in kept):
                kept.append(value)
        if len(kept) >= 4:
            break
    return sorted(kept)


def _x(value: float, low: float, high: float) -> float:
    return _LEFT + _SPAN * _share(1.0 if math.isnan(value) else _clamp(value), low, high)


def _share(value: float, low: float, high: float) -> float:
    """Log scale: half and double are equally far from 1."""
    return math.log(value / low) / math.log(high / low)


def _clamp(value: float) -> float:
    return min(max(value, 1 / _LIMIT), _LIMIT)
