"""Reports to compare, and what a comparison says of them."""

from __future__ import annotations

from typing import Any, Literal

from compress.comparison import compare
from compress.comparison.conditions import judge, parse
from compress.comparison.records import Change, Comparison
from compress.records import Footprint, Interval, Metric, Quality, Report, Speed, Timing
from helpers.reports import around, report_of, timing_of


def metric(
    value: float,
    half: float | None = None,
    unit: str = "1",
    better: Literal["lower", "higher"] = "lower",
    protocol: str = "ppl/disjoint-512",
) -> Metric:
    interval = None if half is None else Interval(low=value - half, high=value + half)
    return Metric(value=value, interval=interval, samples=64, unit=unit, protocol=protocol, better=better)


def timing(speedup: float = 1.5, half: float = 0.01, base_s: float = 0.01, **changes: Any) -> Timing:
    return timing_of(speedup, half, base_s, **{"control": around(1.0, 0.001), **changes})


def speed(*timings: Timing, cpu: str = "Xeon", threads: int = 2, memory: int | None = 50_000_000) -> Speed:
    arm = Footprint(disk_bytes=1000, load_s=0.1, peak_memory_bytes=memory)
    machine = {"cpu": cpu, "cores": "2", "isa": "avx2", "memory_gb": str(len(timings))}
    return Speed(runtime="onnxruntime", threads=threads, machine=machine, timings=timings, baseline=arm, variant=arm)


def quality(digest: str = "data", **metrics: Metric) -> Quality:
    return Quality(subject="compressed", where="onnxruntime", metrics=metrics, data_digest=digest)


def metrics(perplexity: float = 21.8, nll_change: float = 0.02, kl: float = 0.005) -> dict[str, Metric]:
    return {
        "perplexity": metric(perplexity, 0.7),
        "nll_change": metric(nll_change, 0.001, "nats/token"),
        "kl": metric(kl, 0.0004, "nats/token"),
        "top1_agreement": metric(0.962, 0.004, "fraction", "higher"),
    }


def report(**changes: Any) -> Report:
    given: dict[str, Any] = {
        "source_bytes": 10_000,
        "artifact_bytes": 5_000,
        "speed": speed(timing(), timing(1.2, phase="prefill")),
        "artifact_quality": quality(**metrics()),
    }
    return report_of(**{**given, **changes})


def change(found: Comparison, name: str) -> Change:
    return next(each for each in found.changes if each.name == name)


def failed(text: str, before: Report, after: Report, **options: Any) -> bool:
    judged = judge(parse(text), compare(before, after, **options))
    return any(each.failed for each in judged)
