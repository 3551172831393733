"""What compression cost against what it gained: quality up, speed to the right, an interval both ways.

A pure function of a list of points, so that a run (the baseline and the artifact) and a sweep of many variants are
drawn alike. Shape and words say what colour says; the figures are in the table under the drawing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal

from compress.records import Interval
from compress.report import format as fmt
from compress.report.axes import Scale, decade_scale, decade_ticks, linear_scale, linear_ticks, ratio_scale, ratio_ticks

State = Literal["baseline", "recommended", "front", "dominated"]
MAX_POINTS = 40
_HEIGHT, _TOP, _BOTTOM, _ROW = 340, 16, 300, 20  # pixels
_LEFT, _RIGHT = 14.0, 96.0  # percent of the width
_NARROW = 340.0  # pixels of a telephone, on which no two labels may meet
_LETTER, _LINE = 6.6, 15.0  # pixels
_SMALLEST, _LARGEST = 5.0, 11.0  # radius of a mark
_SPREAD = 30.0  # beyond it a loss is drawn on a log scale


@dataclass(frozen=True)
class Point:
    """One model: the figure that says what it lost and its speed-up over the baseline, with intervals where known.

    tied: within the noise of the recommended one. predicted: its speed was not measured. reason: why it was not chosen.
    """

    name: str
    quality: float
    speedup: float
    size_bytes: int
    state: State
    quality_interval: Interval | None = None
    speedup_interval: Interval | None = None
    tied: bool = False
    predicted: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Trade:
    """Points of one metric and one setting. limits: what the user asked for; what lies beyond is shaded."""

    metric: str
    setting: str
    better: Literal["lower", "higher"]
    points: tuple[Point, ...]
    worst_quality: float | None = None
    least_speedup: float | None = None
    unit: str = ""


def front_caption(trade: Trade) -> str:
    """What those marks mean that occur."""
    points = trade.points
    words = {
        "square: the baseline": any(point.state == "baseline" for point in points),
        "star: recommended": any(point.state == "recommended" for point in points),
        "filled: nothing is better at everything": any(point.state == "front" for point in points),
        "hollow: dominated": any(point.state == "dominated" for point in points),
        "ring: tied, the noise decides nothing": any(point.tied for point in points),
        "hatched: predicted, not measured": any(point.predicted for point in points),
        "shaded: beyond what was asked for": trade.worst_quality is not None or trade.least_speedup is not None,
    }
    told = "; ".join(text for text, occurs in words.items() if occurs)
    return f"Up is better, right is faster. Lines: intervals; area: size; {told}."


def front_chart(trade: Trade, key: str = "front-chart") -> str:
    """Inline SVG; empty for fewer than two points that can be drawn. key: id of its title, one per page."""
    points = [point for point in trade.points if _is_drawn(point)][:MAX_POINTS]
    if len(points) < 2:
        return ""
    across, down = _speed_scale(points, trade), _quality_scale(points, trade)
    title = f"{trade.metric} against speed-up at {trade.setting}"
    largest = max(point.size_bytes for point in points)
    labels, named = _labels(points, across, down, largest)
    height = _HEIGHT + (_ROW * -(-len(named) // 2) + 8 if named else 0)
    parts = [f'<svg class="chart front" role="img" aria-labelledby="{key}" width="100%" height="{height}">']
    parts.append(f'<title id="{key}">{escape(fmt.clean(title))}</title>')
    parts += [*_limits(trade, across, down), *_grid(trade, points, across, down), *_staircase(points, across, down)]
    parts += [_whiskers(point, across, down) for point in points]
    parts += [_mark(point, across, down, _radius(point, largest), trade) for point in points]
    return "\n".join([*parts, *labels, *named, "</svg>"])


def _is_drawn(point: Point) -> bool:
    return math.isfinite(point.quality) and math.isfinite(point.speedup) and point.speedup > 0


def _speed_scale(points: Sequence[Point], trade: Trade) -> Scale:
    ends = [end for point in points if (found := point.speedup_interval) for end in (found.low, found.high)]
    limit = [] if trade.least_speedup is None else [trade.least_speedup]
    values = [value for value in (*ends, *limit) if value > 0]
    return ratio_scale([*(point.speedup for point in points), *values], _LEFT + 5, _RIGHT - 3)


def _quality_scale(points: Sequence[Point], trade: Trade) -> Scale:
    """From bottom to top: the better end is always up. A loss of several orders goes on a log scale, with 0 on top."""
    values = [point.quality for point in points]
    ends = [end for point in points if (found := point.quality_interval) for end in (found.low, found.high)]
    limit = [] if trade.worst_quality is None else [trade.worst_quality]
    known = [value for value in (*values, *ends, *limit) if math.isfinite(value)]
    ends_at = (_TOP + 14, _BOTTOM - 14) if trade.better == "lower" else (_BOTTOM - 14, _TOP + 14)
    losses = [value for value in values if value > 0]
    if trade.better == "lower" and min(values) >= 0 and losses and max(losses) / min(losses) > _SPREAD:
        # 0 is drawn at the top edge, above the smallest loss
        least = min(losses) / 2
        return decade_scale([least, *(value for value in known if value >= least)], _TOP + 14, _BOTTOM - 14)
    return linear_scale(known, *ends_at)


def _grid(trade: Trade, points: Sequence[Point], across: Scale, down: Scale) -> list[str]:
    found = []
    for value in ratio_ticks(across):
        kind, x = "one" if value == 1 else "tick", across.at(value)
        found.append(f'<line class="{kind}" x1="{x:.2f}%" x2="{x:.2f}%" y1="{_TOP}" y2="{_BOTTOM}"/>')
        found.append(f'<text class="axis" x="{x:.2f}%" y="{_BOTTOM + 17}" text-anchor="middle">{value:g}x</text>')
    for value, text in _quality_ticks(down, points):
        y = down.at(value)
        found.append(f'<line class="tick" x1="{_LEFT}%" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        found.append(f'<text class="axis" x="{_LEFT - 1.5}%" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    unit = f", {trade.unit}" if trade.unit else ""
    name = escape(fmt.clean(f"{trade.metric}{unit}, {trade.better} is better", limit=60))
    below = escape(fmt.clean(f"speed-up, {trade.setting}", limit=60))
    found.append(f'<text class="name" x="0" y="{_TOP - 4}">{name}</text>')
    found.append(f'<text class="name" x="100%" y="{_BOTTOM + 36}" text-anchor="end">{below}</text>')
    return found


def _quality_ticks(down: Scale, points: Sequence[Point]) -> list[tuple[float, str]]:
    if not down.log:
        return [(value, f"{value:g}") for value in linear_ticks(down)]
    zero = [(0.0, "0")] if any(point.quality == 0 for point in points) else []
    inside = [value for value in decade_ticks(down) if down.share(value) > 0.06 or not zero]
    return [*zero, *((value, f"{value:g}") for value in inside)]


def _limits(trade: Trade, across: Scale, down: Scale) -> list[str]:
    """Shades what the user asked not to get."""
    found = []
    if trade.worst_quality is not None:
        y = down.at(trade.worst_quality)
        size = f'width="{100 - _LEFT:.2f}%" height="{max(_BOTTOM - y, 0):.1f}"'
        found.append(f'<rect class="beyond" x="{_LEFT}%" y="{y:.1f}" {size}/>')
    if trade.least_speedup is not None:
        width = max(across.at(trade.least_speedup) - _LEFT, 0)
        found.append(f'<rect class="beyond" x="{_LEFT}%" y="{_TOP}" width="{width:.2f}%" height="{_BOTTOM - _TOP}"/>')
    return found


def _staircase(points: Sequence[Point], across: Scale, down: Scale) -> list[str]:
    """Along the front, where it has three points or more."""
    front = [point for point in points if point.state != "dominated" and not point.predicted]
    front.sort(key=lambda point: point.speedup)
    if len(front) < 3:
        return []
    found = []
    for left, right in pairwise(front):
        x, far = across.at(left.speedup), across.at(right.speedup)
        y, low = down.at(left.quality), down.at(right.quality)
        found.append(f'<line class="step" x1="{x:.2f}%" x2="{x:.2f}%" y1="{y:.1f}" y2="{low:.1f}"/>')
        found.append(f'<line class="step" x1="{x:.2f}%" x2="{far:.2f}%" y1="{low:.1f}" y2="{low:.1f}"/>')
    return found


def _whiskers(point: Point, across: Scale, down: Scale) -> str:
    x, y, kind = across.at(point.speedup), down.at(point.quality), f"whisker {point.state}"
    found = ""
    if interval := point.speedup_interval:
        low, high = across.at(interval.low), across.at(interval.high)
        found += f'<line class="{kind}" x1="{low:.2f}%" x2="{high:.2f}%" y1="{y:.1f}" y2="{y:.1f}"/>'
    if interval := point.quality_interval:
        low, high = down.at(interval.low), down.at(interval.high)
        found += f'<line class="{kind}" x1="{x:.2f}%" x2="{x:.2f}%" y1="{low:.1f}" y2="{high:.1f}"/>'
    return found


def _radius(point: Point, largest: int) -> float:
    return max(_SMALLEST, _LARGEST * math.sqrt(max(point.size_bytes, 0) / largest)) if largest > 0 else _SMALLEST


def _mark(point: Point, across: Scale, down: Scale, radius: float, trade: Trade) -> str:
    words = [point.state, *(["tied"] if point.tied else []), *(["predicted, not measured"] if point.predicted else [])]
    title = f"{fmt.clean(point.name, limit=80)}: {fmt.significant(point.speedup)}x, "
    title += f"{trade.metric} {fmt.significant(point.quality)}, {fmt.size(point.size_bytes)}, {', '.join(words)}"
    if point.reason:
        title += f". {fmt.clean(point.reason)}"
    kind = "predicted" if point.predicted else point.state
    shape = f'<circle r="{radius:.1f}"/>'
    if point.state == "baseline":
        shape = f'<rect x="{-radius:.1f}" y="{-radius:.1f}" width="{2 * radius:.1f}" height="{2 * radius:.1f}"/>'
    if point.state == "recommended":
        shape = f'<path class="star" d="{_star(1.5 * radius)}"/>'
    if point.predicted:
        shape += f'<path d="{_hatching(radius)}"/>'
    ring = f'<circle class="ring" r="{radius + 5:.1f}"/>' if point.tied else ""
    return (
        f'<svg class="mark {kind}" x="{across.at(point.speedup):.2f}%" y="{down.at(point.quality):.1f}" '
        f'overflow="visible"><title>{escape(title)}</title>{ring}{shape}</svg>'
    )


def _star(radius: float) -> str:
    """Five points, the first straight up."""
    turns = [(math.pi * step / 5, radius if step % 2 == 0 else 0.45 * radius) for step in range(10)]
    ends = (f"{reach * math.sin(turn):.1f},{-reach * math.cos(turn):.1f}" for turn, reach in turns)
    return f"M{' L'.join(ends)} Z"


def _hatching(radius: float) -> str:
    """Slanted lines inside a circle, ending on it."""
    found = []
    for offset in (-0.55 * radius, 0.0, 0.55 * radius):
        reach = math.sqrt(radius**2 - offset**2) / math.sqrt(2)
        x, y = offset / math.sqrt(2), offset / math.sqrt(2)
        found.append(f"M{x - reach:.1f},{y + reach:.1f} L{x + reach:.1f},{y - reach:.1f}")
    return " ".join(found)


def _labels(points: Sequence[Point], across: Scale, down: Scale, largest: int) -> tuple[list[str], list[str]]:
    """Each name beside its mark; numbers with a key below where names would meet on a narrow page.

    Numbers that have no room either are left to the tooltips.
    """
    names = [fmt.clean(point.name, limit=28) for point in points]
    found = _placed(points, names, across, down, largest)
    if found is not None:
        return found, []
    numbers = [str(place) for place in range(1, len(points) + 1)]
    rows = -(-len(points) // 2)
    key = [
        f'<text class="{_label_class(point)}" x="{50 * (place // rows)}%" y="{_HEIGHT + _ROW * (place % rows) + 10}">'
        f"{place + 1}. {escape(name)}</text>"
        for place, (point, name) in enumerate(zip(points, names, strict=True))
    ]
    return _placed(points, numbers, across, down, largest, whole=False) or [], key


def _label_class(point: Point) -> str:
    return "label chosen" if point.state == "recommended" else "label"


def _placed(
    points: Sequence[Point], texts: Sequence[str], across: Scale, down: Scale, largest: int, *, whole: bool = True
) -> list[str] | None:
    """On a page of `_NARROW` pixels. What has no free place is left out, or with `whole` makes it None."""
    marks = [(_NARROW * across.at(point.speedup) / 100, down.at(point.quality)) for point in points]
    radii = [_radius(point, largest) + (5 if point.tied else 0) for point in points]
    taken = [(x - r, y - r, x + r, y + r) for (x, y), r in zip(marks, radii, strict=True)]
    found = []
    for point, text, (x, y), radius in zip(points, texts, marks, radii, strict=True):
        width = _LETTER * len(text)
        for dx, dy, anchor, left in (
            (radius + 5, -7.0, "start", 0.0),
            (-radius - 5, -7.0, "end", -width),
            (radius + 5, 20.0, "start", 0.0),
            (-radius - 5, 20.0, "end", -width),
            (0.0, -radius - 7, "middle", -width / 2),
            (0.0, radius + 15, "middle", -width / 2),
        ):
            box = (x + dx + left, y + dy - _LINE + 3, x + dx + left + width, y + dy + 3)
            inside = box[0] >= 0.1 * _NARROW and box[2] <= _NARROW and box[1] >= _TOP - 2 and box[3] <= _BOTTOM + 4
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                place = f'x="{across.at(point.speedup):.2f}%" y="{y:.1f}"'
                mark = f'class="{_label_class(point)}" x="{dx:.1f}" y="{dy:.1f}" text-anchor="{anchor}"'
                found.append(f'<svg {place} overflow="visible"><text {mark}>{escape(text)}</text></svg>')
                break
        else:
            if whole:
                return None
    return found


def _meet(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
