"""The error of every layer as an inline SVG: blocks down, kinds of layers across, darker is worse."""

from __future__ import annotations

from html import escape

from compress.report import format as fmt
from compress.report.heat_rows import LEVELS, Cell, Heat

CAPTION = (
    "A cell per layer, on a log scale; outlined: the largest errors. The name, error and "
    "bits of a cell are in its tooltip, its figures in the table."
)
_LEFT, _RIGHT = 9.0, 95.0  # percent of the width
_TOP, _LEGEND = 78, 46  # pixels: names of the columns, legend
_STEP = 6.0  # percent: a colour of the legend
_TALL, _LOW = 20, 9  # height of a row: of few blocks, of many
_FEW, _MOST_LABELS = 32, 24


def heat_map(heat: Heat | None) -> str:
    """Empty where there is nothing to show."""
    if heat is None:
        return ""
    height = _TALL if len(heat.rows) <= _FEW else _LOW
    width = (_RIGHT - _LEFT) / len(heat.columns)
    bottom = _TOP + height * len(heat.rows)
    parts = [f'<svg class="chart heat" role="img" aria-labelledby="heat-map" width="100%" height="{bottom + _LEGEND}">']
    parts.append(f'<title id="heat-map">{heat.measure.capitalize()} of each layer</title>')
    for place, name in enumerate(heat.columns):
        x = _LEFT + width * (place + 0.5)
        text = f'<text class="axis" transform="rotate(-40)">{escape(fmt.clean(name, limit=20))}</text>'
        parts.append(f'<svg x="{x:.2f}%" y="{_TOP - 8}" overflow="visible">{text}</svg>')
    every = -(-len(heat.rows) // _MOST_LABELS)
    for row, (name, cells) in enumerate(zip(heat.rows, heat.cells, strict=True)):
        top = _TOP + height * row
        if row % every == 0:
            y = top + height / 2 + 4
            parts.append(f'<text class="axis" x="{_LEFT - 1}%" y="{y:.0f}" text-anchor="end">{escape(name)}</text>')
        for column, cell in enumerate(cells):
            if cell:
                parts.append(_cell(cell, (_LEFT + width * column, top, width, height), cell in heat.worst))
    return "\n".join([*parts, _legend(heat, bottom + 14), "</svg>"])


def _cell(cell: Cell, box: tuple[float, int, float, int], is_worst: bool) -> str:
    x, y, width, height = box
    level = "unknown" if cell.level is None else f"h{cell.level}"
    bits = f", {fmt.short(cell.bits)} bits" if cell.bits is not None else ""
    error = fmt.significant(cell.error) if cell.error is not None else "no error known"
    alike = f", worst of {cell.count}" if cell.count > 1 else ""
    title = escape(f"{fmt.clean(cell.layer, limit=80)}: {error}{bits}{alike}")
    worst = " worst" if is_worst else ""
    return (
        f'<rect class="{level}{worst}" x="{x + 0.15:.2f}%" y="{y + 0.5}" width="{width - 0.3:.2f}%" '
        f'height="{height - 1}"><title>{title}</title></rect>'
    )


def _legend(heat: Heat, top: int) -> str:
    """A row of the colours, with the smallest and the largest error at its ends."""
    errors = [cell.error for row in heat.cells for cell in row if cell and cell.error is not None]
    ends = fmt.significant(min(errors)), fmt.significant(max(errors))
    used = range(LEVELS) if heat.bounds else range(1)
    size = f'y="{top}" width="{_STEP}%" height="10"'
    boxes = "".join(f'<rect class="h{level}" x="{_LEFT + _STEP * level:.2f}%" {size}/>' for level in used)
    end = _LEFT + _STEP * len(used)
    return (
        f'{boxes}<text class="axis" x="{_LEFT}%" y="{top + 25}">{ends[0]}</text>'
        f'<text class="axis" x="{end:.2f}%" y="{top + 25}" text-anchor="end">{ends[1] if heat.bounds else ""}</text>'
    )
