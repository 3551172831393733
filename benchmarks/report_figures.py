"""What a result file keeps of a report."""

from __future__ import annotations

from typing import Any

from compress.records import Metric, Speed


def figure(metric: Metric) -> dict[str, Any]:
    """Value, interval, samples."""
    interval = metric.interval and [metric.interval.low, metric.interval.high]
    return {"value": metric.value, "interval": interval, "samples": metric.samples}


def speeds(speed: Speed) -> list[dict[str, Any]]:
    """Of each setting."""
    return [
        {
            "setting": each.name,
            "speedup": each.speedup,
            "interval": [each.interval.low, each.interval.high],
            "verdict": each.verdict,
        }
        for each in speed.timings
    ]
