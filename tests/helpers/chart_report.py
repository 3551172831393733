"""A report of many layers, drawn, and what was drawn."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from typing import Any

from rich.console import Console

from compress.records import (
    Footprint,
    LayerResult,
    Metric,
    PassResult,
    Plan,
    PlannedLayer,
    PredictedLatency,
    Quality,
    Report,
    Speed,
    Timing,
)
from compress.records.quality import Curve, CurvePoint, WorstSample
from compress.report import to_terminal
from compress.report.front_chart import Point, Trade
from compress.report.rows import build_page
from helpers.reports import around, timing_of

HOSTILE = '<img src=x onerror="alert(1)"></script><!--'
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RECIPE = "gptq(format=int4(group=128))"


def metric(value: float, half: float, unit: str = "1", better: Any = "lower", **more: Any) -> Metric:
    return Metric(value=value, interval=around(value, half), samples=8, unit=unit, protocol="p", better=better, **more)


def timing(verdict: Any = "faster", speedup: float = 2.5, half: float = 0.1, **more: Any) -> Timing:
    return timing_of(speedup, half, verdict=verdict, **more)


def layer(block: int, kind: str, error: float | None = None, bits: float = 4.5) -> LayerResult:
    name = f"model.layers.{block}.{kind}"
    error = 1e-4 * (1 + block + KINDS.index(kind) * 3) if error is None else error
    return LayerResult(
        layer=name, users=(name,), pass_text=RECIPE, changed=True, format="int4(group=128)", bits_per_weight=bits,
        error_before=0.0, error_after=4 * error, output_error=error,
    )  # fmt: skip


def passes(blocks: int = 4, kinds: tuple[str, ...] = KINDS) -> tuple[PassResult, ...]:
    layers = tuple(layer(block, kind) for block in range(blocks) for kind in kinds)
    return (PassResult(pass_text=RECIPE, matches={"default": len(layers)}, layers=layers, seconds=3.0),)


def plan(blocks: int = 4) -> Plan:
    def planned(name: str, stored: int) -> PlannedLayer:
        return PlannedLayer(
            layer=name, users=(name,), kind="linear", shape=(64, 128), passes=(RECIPE,), format="int4(group=128)",
            operator="MatMulNBits", kernel="fast", stored_bytes=stored,
        )  # fmt: skip

    layers = [planned(f"model.layers.{block}.{kind}", 4608) for block in range(blocks) for kind in KINDS]
    return Plan(
        model="m", profile="p", recipe="r", layers=(*layers, planned("lm_head", 50_000)), matches={},
        source_bytes=2_000_000, predicted_artifact_bytes=400_000, predicted_model_bytes=390_000,
        predicted_peak_memory_bytes=1, predicted_disk_bytes=1, predicted_seconds=1.0,
        predicted_latency=(
            PredictedLatency(phase="decode", batch=1, prompt=128, variant_s=0.002, baseline_s=0.008, bound="memory"),
        ),
    )  # fmt: skip


def curve(name: str = "kl_by_position", unit: str = "nats/token") -> Curve:
    points = tuple(
        CurvePoint(low=8.0 * at, high=8.0 * at + 8, value=0.004 + 0.001 * at, interval=around(0.005, 0.004), count=9)
        for at in range(6)
    )
    return Curve(name=name, x="position in the window", y="mean KL", unit=unit, protocol="p", points=points)


def quality(**more: Any) -> Quality:
    metrics = {"kl": metric(0.005, 0.0004, "nats/token"), "kl_p99": metric(0.08, 0.01, "nats/token", detail=True)}
    worst = WorstSample(
        sample=3, position=7, kl=1.5, target=5, reference=5, chosen=9, reference_probability=0.9, probability=0.2,
        context=(1, 2), context_text="if not x:\n    return", target_text=" None", reference_text=" None",
        chosen_text=" x",
    )  # fmt: skip
    found = {"metrics": metrics, "curves": (curve(),), "worst": (worst,), **more}
    return Quality(subject="compressed", where="onnxruntime", data_digest="d", **found)


def speed(*timings: Timing) -> Speed:
    arms: dict[str, Any] = {
        "baseline": Footprint(disk_bytes=2_000_000, load_s=0.2),
        "variant": Footprint(disk_bytes=5, load_s=0.1),
    }
    return Speed(runtime="onnxruntime", threads=2, machine={"cpu": "x"}, timings=timings or (timing(),), **arms)


def report(**more: Any) -> Report:
    baseline = Quality(subject="baseline", where="onnxruntime", metrics={}, data_digest="d")
    found: dict[str, Any] = {
        "title": "m, w4a16", "source": "m", "source_digest": "s", "recipe": RECIPE, "profile": "p", "target": "onnx",
        "created": "2026-11-21", "versions": {"torch": "2"}, "seed": 0, "calibration": {"data": "c"},
        "source_bytes": 2_000_000, "artifact_bytes": 410_000, "passes": passes(), "plan": plan(),
        "baseline_quality": baseline, "artifact_quality": quality(), "speed": speed(), "verdict": "It is faster.",
    }  # fmt: skip
    return Report(**{**found, **more})


def table(found: Report, key: str) -> Any:
    page = build_page(found)
    return next((each for each in (*page.main, *page.details, *page.evidence) if each.key == key), None)


def printed(found: Report, width: int = 100, full: bool = False) -> str:
    stream = io.StringIO()
    to_terminal(found, Console(file=stream, width=width, color_system=None), full=full)
    return stream.getvalue()


class Seen(HTMLParser):
    """Tags with their attributes, in order."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def points(*more: Point) -> tuple[Point, ...]:
    base = Point("baseline", 0.0, 1.0, 1000, "baseline")
    best = Point("w4", 0.005, 2.5, 300, "recommended", around(0.005, 0.001), around(2.5, 0.1))
    return (base, best, *more)


def trade(*more: Point, **given: Any) -> Trade:
    found = {"metric": "KL", "setting": "decode batch 1", "better": "lower", "points": points(*more), **given}
    return Trade(**found)


def heights(svg: str) -> dict[str, float]:
    """Pixels from the top of each mark, by the name in its tooltip."""
    return {
        name: float(y) for y, name in re.findall(r'class="mark[^"]*" x="[^"]*" y="([\d.]+)"[^>]*><title>([^:]*)', svg)
    }
