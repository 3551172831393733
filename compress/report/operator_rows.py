"""The table of what each kind of operator takes of a call, and the bars over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from compress.records import Speed
from compress.records.speed import OPERATORS, OperatorTime, OperatorTimes
from compress.report import format as fmt
from compress.report.format import NOT_MEASURED, clean
from compress.report.table import Row, Table

KEY = "operator-times"
CAPTION = "Pale: baseline; full: variant. Seconds of all operators of a kind in one call, the same scale for all."
MOST_ROWS, MOST_BARS = 20, 8
_ROW, _BAR = 44, 9  # pixels
_NONE = "-"


def operator_table(speed: Speed) -> Table:
    """One row per kind, those that take least together in one, and all; or the reason why nothing is known."""
    found = speed.operators
    columns = ("operator", "baseline", "of all", "variant", "of all", "baseline nodes", "variant nodes")
    rows: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()
    if found is not None:
        rows = (*(_row(clean(each.kind), each, found) for each in _shown(found, MOST_ROWS)), _sum_row(found))
        notes = (
            f"{clean(found.setting)}, by the {clean(found.profiler)}: medians of {found.calls} calls, of a session of "
            "its own that is never timed. Counting takes time, and so does the runtime between operators; neither is "
            "in here. No interval, so no verdict.",
        )
    elif OPERATORS in speed.unavailable:
        rows = (("-", *(NOT_MEASURED,) * 6),)
        notes = (clean(f"Not measured: {speed.unavailable[OPERATORS]}", limit=600),)
    return Table(KEY, "Time by operator", columns, "lrrrrrr", rows, notes=notes)


def operator_chart(found: OperatorTimes | None) -> str:
    """Two bars per kind; empty for nothing to draw."""
    shown = () if found is None else _shown(found, MOST_BARS)
    shown = [each for each in shown if math.isfinite(each.baseline_s + each.variant_s)]
    most = max((max(each.baseline_s, each.variant_s) for each in shown), default=0.0)
    if most <= 0:
        return ""
    parts = [
        f'<svg class="chart operators" role="img" aria-labelledby="operator-chart" width="100%" '
        f'height="{_ROW * len(shown)}">',
        '<title id="operator-chart">Seconds of each kind of operator in one call, baseline and variant</title>',
    ]
    parts += [_bars(each, _ROW * place, most) for place, each in enumerate(shown)]
    return "\n".join([*parts, "</svg>"])


def _bars(each: OperatorTime, top: int, most: float) -> str:
    name = escape(clean(each.kind, limit=40))
    figures = " to ".join(fmt.duration(seconds) if seconds else "none" for seconds in (each.baseline_s, each.variant_s))
    old, new = (max(100 * seconds / most, 0.2) if seconds else 0.0 for seconds in (each.baseline_s, each.variant_s))
    return (
        f"<g><title>{name}: {figures}</title>"
        f'<text class="label" x="0" y="{top + 14}">{name}</text>'
        f'<text class="value" x="100%" y="{top + 14}" text-anchor="end">{figures}</text>'
        f'<rect class="before" x="0" y="{top + 20}" width="{old:.2f}%" height="{_BAR}"/>'
        f'<rect class="after" x="0" y="{top + 20 + _BAR}" width="{new:.2f}%" height="{_BAR}"/></g>'
    )


def _shown(found: OperatorTimes, most: int) -> Sequence[OperatorTime]:
    """The first of them, and the others as one."""
    if len(found.operators) <= most:
        return found.operators
    others = found.operators[most - 1 :]
    rest = OperatorTime(
        kind=f"{len(others)} other kinds",
        baseline_nodes=sum(each.baseline_nodes for each in others),
        variant_nodes=sum(each.variant_nodes for each in others),
        baseline_s=sum(each.baseline_s for each in others),
        variant_s=sum(each.variant_s for each in others),
    )
    return (*found.operators[: most - 1], rest)


def _row(name: str, each: OperatorTime, found: OperatorTimes) -> Row:
    before = _duration(each.baseline_s), _share(each.baseline_s, found.baseline_s)
    after = _duration(each.variant_s), _share(each.variant_s, found.variant_s)
    return name, *before, *after, _count(each.baseline_nodes), _count(each.variant_nodes)


def _sum_row(found: OperatorTimes) -> Row:
    nodes = (sum(each.baseline_nodes for each in found.operators), sum(each.variant_nodes for each in found.operators))
    seconds = fmt.duration(found.baseline_s), fmt.duration(found.variant_s)
    return "all operators", seconds[0], _NONE, seconds[1], _NONE, *map(str, nodes)


def _duration(seconds: float) -> str:
    return fmt.duration(seconds) if seconds else _NONE


def _count(nodes: int) -> str:
    return str(nodes) if nodes else _NONE


def _share(part: float, whole: float) -> str:
    return fmt.percent(part / whole) if part and whole else _NONE
