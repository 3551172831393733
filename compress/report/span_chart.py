"""What each part of a request takes in both arms, as pairs of dots on one log axis of seconds."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from compress.report import format as fmt
from compress.report.axes import Scale, decade_scale, decade_ticks

CAPTION = "Hollow: baseline; filled: variant. Log scale."
MAX_SPANS = 24
_ROW, _AXIS = 40, 34  # pixels
_LEFT, _RIGHT = 3.0, 97.0  # percent of the width


def span_chart(spans: Sequence[tuple[str, float, float]], key: str = "span-chart") -> str:
    """Name, and seconds of the baseline and of the variant; empty for none. key: id of its title, one per page."""
    shown = [span for span in spans if min(span[1:]) > 0][:MAX_SPANS]
    if not shown:
        return ""
    scale = decade_scale([seconds for span in shown for seconds in span[1:]], _LEFT, _RIGHT)
    bottom = _ROW * len(shown) + 4
    parts = [f'<svg class="chart spans" role="img" aria-labelledby="{key}" width="100%" height="{bottom + _AXIS}">']
    parts.append(f'<title id="{key}">Seconds of each part of a request, baseline and variant</title>')
    for value in decade_ticks(scale, most=5):
        x = scale.at(value)
        anchor = "middle" if 8 < x < 92 else "start" if x <= 8 else "end"
        parts.append(f'<line class="tick" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="{bottom}"/>')
        text = fmt.short(value * 1e6) + " us" if value < 1e-3 else _round(value)
        parts.append(f'<text class="axis" x="{x:.2f}%" y="{bottom + 18}" text-anchor="{anchor}">{text}</text>')
    parts += [_row(span, _ROW * place, scale) for place, span in enumerate(shown)]
    return "\n".join([*parts, "</svg>"])


def _row(span: tuple[str, float, float], top: int, scale: Scale) -> str:
    name, before, after = span
    y, old, new = top + 29, scale.at(before), scale.at(after)
    figures = f"{fmt.duration(before)} to {fmt.duration(after)}"
    kind = "slower" if after > before * 1.005 else "faster" if after < before * 0.995 else "same"
    return (
        f"<g><title>{escape(f'{name}: {figures}')}</title>"
        f'<text class="label" x="0" y="{top + 14}">{escape(name)}</text>'
        f'<text class="value" x="100%" y="{top + 14}" text-anchor="end">{escape(figures)}</text>'
        f'<g class="{kind}"><line x1="{old:.2f}%" x2="{new:.2f}%" y1="{y}" y2="{y}"/>'
        f'<circle class="before" cx="{old:.2f}%" cy="{y}" r="5"/>'
        f'<circle class="after" cx="{new:.2f}%" cy="{y}" r="5"/></g></g>'
    )


def _round(value: float) -> str:
    return f"{fmt.short(value * 1e3)} ms" if value < 1 else f"{fmt.short(value)} s"
