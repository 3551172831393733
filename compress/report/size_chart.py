"""Where the bytes are, as one bar cut into parts, with a key under it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from compress.report import format as fmt
from compress.report.size_rows import Part

CAPTION = "One bar: all bytes that are deployed; the parts in the order of the table."
_BAR, _TOP, _ROW = 34, 8, 22  # pixels
_LEAST_LABEL = 9.0  # percent of the width that a number needs
_DARK = 7  # colours that a number can be read on


def size_chart(parts: Sequence[Part]) -> str:
    """Empty for nothing to cut."""
    total = sum(part.stored for part in parts)
    if len(parts) < 2 or total <= 0:
        return ""
    height = _TOP + _BAR + 16 + _ROW * len(parts)
    found = [f'<svg class="chart sizes" role="img" aria-labelledby="size-chart" width="100%" height="{height}">']
    found.append('<title id="size-chart">Bytes of each part of the artifact</title>')
    left = 0.0
    for place, part in enumerate(parts):
        share = 100 * part.stored / total
        text = f"{part.name}: {fmt.size(part.stored)}, {fmt.percent(part.stored / total)}"
        found.append(
            f'<rect class="p{place}" x="{left:.2f}%" y="{_TOP}" width="{max(share - 0.25, 0.1):.2f}%" height="{_BAR}">'
            f"<title>{escape(text)}</title></rect>"
        )
        if share >= _LEAST_LABEL and place < _DARK:
            middle, y = left + share / 2, _TOP + _BAR / 2 + 5
            found.append(f'<text class="on" x="{middle:.2f}%" y="{y:.0f}" text-anchor="middle">{place + 1}</text>')
        left += share
        top = _TOP + _BAR + 16 + _ROW * place
        found.append(f'<rect class="p{place}" x="0" y="{top}" width="12" height="12"/>')
        found.append(f'<text class="label" x="20" y="{top + 11}">{place + 1}. {escape(_short(part.name))}</text>')
        found.append(f'<text class="value" x="100%" y="{top + 11}" text-anchor="end">{fmt.size(part.stored)}</text>')
    return "\n".join([*found, "</svg>"])


def _short(name: str) -> str:
    """Its end, which tells a layer from the others."""
    return name if len(name) <= 34 else f"...{name[-31:]}"
