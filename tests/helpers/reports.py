"""The least report there is, and what most tests put into one."""

from __future__ import annotations

from typing import Any

from compress.records import Footprint, Interval, Report, Speed, Timing


def around(value: float, half: float) -> Interval:
    return Interval(low=value - half, high=value + half)


def report_of(**changes: Any) -> Report:
    """Of a run that measured nothing; what is given changes it."""
    given: dict[str, Any] = {
        "title": "small",
        "source": "small",
        "source_digest": "00",
        "recipe": "rtn",
        "profile": "cpu",
        "target": "onnx",
        "created": "2026-11-20",
        "versions": {},
        "seed": 0,
        "calibration": {},
        "source_bytes": 1000,
        "artifact_bytes": 500,
        "passes": (),
        "verdict": "fine.",
    }
    return Report(**{**given, **changes})


def timing_of(speedup: float = 1.5, half: float = 0.01, baseline_s: float = 0.01, **changes: Any) -> Timing:
    """Of decoding, the interval half as wide as told."""
    given: dict[str, Any] = {
        "phase": "decode",
        "batch": 1,
        "prompt": 128,
        "rounds": 60,
        "baseline_s": baseline_s,
        "variant_s": baseline_s / speedup,
        "baseline_tokens_per_s": 100.0,
        "variant_tokens_per_s": 100.0 * speedup,
        "speedup": speedup,
        "interval": around(speedup, half),
        "control": around(1.0, 0.01),
        "verdict": "faster",
    }
    return Timing(**{**given, **changes})


def speed_of(*timings: Timing, **changes: Any) -> Speed:
    """Two arms of a thousand bytes."""
    arm = Footprint(disk_bytes=1000)
    given: dict[str, Any] = {"runtime": "onnxruntime", "threads": 1, "machine": {}, "baseline": arm, "variant": arm}
    return Speed(timings=timings or (timing_of(),), **{**given, **changes})
