"""The points of one run for the chart of loss against speed: baseline, artifact, and what the plan predicted."""

from __future__ import annotations

from compress.records import Report
from compress.report import format as fmt
from compress.report.front_chart import Point, State, Trade
from compress.report.metric_names import is_relative, metric_name
from compress.report.predicted_rows import predicted_speedup, ratio, setting
from compress.report.verdict import headline_metric, headline_timing

_PERFECT = ("cosine", "agreement", "overlap", "recall", "spearman")  # 1 where nothing is lost, 0 otherwise


def trade_of(report: Report) -> Trade | None:
    """None where quality or speed is known of neither the artifact nor the plan."""
    found = headline_metric(report.artifact_quality or report.memory_quality)
    timing = headline_timing(report.speed)
    predicted = predicted_speedup(report.plan, timing)
    if found is None or not is_relative(found[0]) or (timing is None and predicted is None):
        return None
    key, metric = found
    nothing_lost = 1.0 if key.startswith(_PERFECT) or key.endswith(_PERFECT) else 0.0
    control = timing.control if timing else None
    points = [Point("baseline", nothing_lost, 1.0, report.source_bytes, "baseline", speedup_interval=control)]
    if timing is not None:
        tied = timing.verdict in ("same", "inconclusive")
        state: State = (
            "dominated" if timing.verdict == "slower" and report.artifact_bytes >= report.source_bytes else "front"
        )
        points.append(
            Point(
                "artifact", metric.value, timing.speedup, report.artifact_bytes, state,
                metric.interval, timing.interval, tied=tied,
            )
        )  # fmt: skip
    if predicted is not None and report.plan is not None:
        size = report.plan.predicted_artifact_bytes
        points.append(Point("predicted", metric.value, ratio(predicted), size, "front", predicted=True))
    gate = next((gate for gate in report.gates if gate.name == key), None)
    return Trade(
        metric=metric_name(key),
        setting=timing.name if timing else setting(predicted) if predicted else "",
        better=metric.better,
        points=tuple(points),
        worst_quality=gate.bound if gate else None,
        unit=fmt.unit_text(metric.unit),
    )
