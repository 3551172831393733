"""Which drawing stands over which table of a run's report."""

from __future__ import annotations

from compress.records import Report
from compress.report import chart, curve_chart, front_chart, heat_map, operator_rows, size_chart, span_chart
from compress.report.format import clean
from compress.report.front_points import trade_of
from compress.report.heat_rows import heat_of
from compress.report.html_page import Drawing
from compress.report.quality_rows import curve_key
from compress.report.size_rows import parts_of
from compress.report.speed_rows import spans


def drawings_of(report: Report) -> dict[str, Drawing]:
    """By the key of the table under it; none where there is nothing to draw."""
    trade, speed, quality = trade_of(report), report.speed, report.artifact_quality
    found = {
        "speed": Drawing(chart.speed_chart(speed.timings) if speed else "", chart.CAPTION),
        "spans": Drawing(span_chart.span_chart(spans(speed)) if speed else "", span_chart.CAPTION),
        operator_rows.KEY: Drawing(
            operator_rows.operator_chart(speed.operators) if speed else "", operator_rows.CAPTION
        ),
        "parts": Drawing(size_chart.size_chart(parts_of(report)), size_chart.CAPTION),
        "heat": Drawing(heat_map.heat_map(heat_of(report.passes)), heat_map.CAPTION),
    }
    if trade:
        found["quality"] = Drawing(front_chart.front_chart(trade), front_chart.front_caption(trade))
    if speed and (whole := speed.end_to_end):
        timed = [(clean(span.what), span.baseline_s, span.variant_s) for span in whole.spans]
        svg = span_chart.span_chart([*timed, ("whole request", whole.baseline_s, whole.variant_s)], "end-to-end-chart")
        found["end-to-end"] = Drawing(svg, span_chart.CAPTION)
    if speed and len(speed.timings) > chart.MAX_BARS:
        caption = f"{chart.CAPTION} The chart shows the first {chart.MAX_BARS} settings."
        found["speed"] = Drawing(found["speed"].svg, caption)
    for curve in quality.curves if quality else ():
        found[curve_key(curve)] = Drawing(curve_chart.curve_chart(curve), curve_chart.curve_caption(curve), half=True)
    return {key: drawing for key, drawing in found.items() if drawing.svg}
