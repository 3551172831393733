"""A report with everything in it, some of its names hostile, and what its three pages show."""

from __future__ import annotations

import io
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

from rich.console import Console

from compress.records import (
    Footprint,
    Gate,
    Interval,
    LayerResult,
    Metric,
    PassResult,
    Plan,
    PlannedLayer,
    Quality,
    Report,
    RunCost,
    Speed,
    SpeedVerdict,
    Timing,
    Verification,
)
from compress.report import to_terminal, verdict_sentence
from compress.report.rows import build_page
from helpers.reports import timing_of

HOSTILE = "<img src=x onerror=alert(1)>"
HOSTILE_LAYER = 'a|b</script><!-- "q" [x](javascript:1) `c` \x1b[31m\u202ered'
VOID = {"meta", "br", "hr", "img", "input", "link"}


def metric(value: float, low: float, high: float, unit: str = "1", better: Any = "lower") -> Metric:
    interval = Interval(low=low, high=high)
    return Metric(value=value, interval=interval, samples=64, unit=unit, protocol="ppl/disjoint-512", better=better)


def quality(subject: Any, where: str, perplexity: float, kl: float | None = None) -> Quality:
    metrics = {"perplexity": metric(perplexity, perplexity - 0.7, perplexity + 0.7)}
    if kl is not None:
        metrics["kl"] = metric(kl, kl - 0.0004, kl + 0.0004, "nats/token")
        metrics["top1_agreement"] = metric(0.962, 0.958, 0.966, "fraction", "higher")
        metrics["nll_change"] = metric(0.0185, 0.0151, 0.0219, "nats/token")
    return Quality(subject=subject, where=where, metrics=metrics, data_digest="sha256:77aa")


def timing(
    phase: Any = "decode", batch: int = 1, speedup: float = 1.62, half: float = 0.07, verdict: SpeedVerdict = "faster"
) -> Timing:
    tokens_per_s = 81.3 * batch
    return timing_of(
        speedup, half, 0.0123, phase=phase, batch=batch, verdict=verdict, control=Interval(low=0.987, high=1.012),
        baseline_tokens_per_s=tokens_per_s, variant_tokens_per_s=tokens_per_s * speedup,
    )  # fmt: skip


def speed(*timings: Timing) -> Speed:
    return Speed(
        runtime="onnxruntime",
        threads=2,
        machine={"cpu": "Xeon (2 cores)", "os": "Linux 6.1"},
        timings=timings,
        baseline=Footprint(disk_bytes=14_800_000, load_s=0.21, peak_memory_bytes=96_000_000),
        variant=Footprint(disk_bytes=4_710_000, load_s=0.0932),
    )


def layers(pass_text: str, count: int = 6) -> tuple[LayerResult, ...]:
    changed = [
        LayerResult(
            layer=f"model.layers.{index}.mlp.down_proj",
            users=(f"model.layers.{index}.mlp.down_proj",),
            pass_text=pass_text,
            changed=True,
            format="int4(group=128)",
            bits_per_weight=4.156,
            error_before=0.0,
            error_after=0.0012 + 0.0001 * index,
            output_error=0.0007 + 0.0001 * index,
        )
        for index in range(count)
    ]
    hostile = LayerResult(
        layer=HOSTILE_LAYER,
        users=(HOSTILE_LAYER,),
        pass_text=pass_text,
        changed=False,
        reason="group does not divide 65",
    )
    return (*changed, hostile)


def verification(agrees: bool = True, level: Any = "ran") -> Verification:
    return Verification(
        level=level,
        runtime="onnxruntime",
        agrees=agrees,
        positions=512,
        max_relative_difference=0.00042 if agrees else 0.31,
        bound=0.001,
        top1_agreement=0.9941,
        decided_positions=488,
        decided_agreement=1.0,
        greedy_tokens=(1, 44, 7),
    )


def pieces(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "source_bytes": 14_700_000,
        "artifact_bytes": 4_700_000,
        "speed": speed(
            timing(), timing("prefill", 1, 0.82, 0.03, "slower"), timing("decode", 8, 1.02, 0.05, "inconclusive")
        ),
        "baseline_quality": quality("baseline", "onnxruntime", 21.4),
        "artifact_quality": quality("compressed", "onnxruntime", 21.8, 0.0052),
        "memory_quality": quality("compressed", "torch", 21.7, 0.0049),
        "verification": verification(),
        "gates": (Gate(name="kl", bound=0.05, found=0.0056, met=True),),
    }
    return {**found, **changes}


def plan() -> Plan:
    planned = PlannedLayer(
        layer="model.layers.0.mlp.down_proj",
        users=("model.layers.0.mlp.down_proj",),
        kind="linear",
        shape=(64, 172),
        passes=("gptq(bits=4)",),
        format="int4(group=128)",
        operator="MatMulNBits",
        kernel="fast",
        stored_bytes=5_900,
    )
    return Plan(
        model="stories",
        profile="cpu-x86",
        recipe="gptq(bits=4)",
        layers=(planned,),
        matches={"gptq(bits=4)": {"*": 7}},
        warnings=("2 layers have no fast kernel",),
        source_bytes=14_700_000,
        predicted_artifact_bytes=4_650_000,
        predicted_model_bytes=4_500_000,
        predicted_peak_memory_bytes=310_000_000,
        predicted_disk_bytes=21_000_000,
        predicted_seconds=42.0,
    )


def report(title: str = "stories260K, int4", layer_count: int = 6, changes: dict[str, Any] | None = None) -> Report:
    parts = pieces(**(changes or {}))
    return Report(
        title=title,
        source="shared/stories260K",
        source_digest="sha256:1f2e3d",
        recipe="gptq(bits=4, group_size=128)",
        profile="cpu-x86",
        target="onnx",
        created="2026-11-20T22:04:00Z",
        versions={"torch": "2.13.0", "onnxruntime": "1.23.2"},
        seed=0,
        calibration={"data": "calib.txt", "samples": 128, "digest": "sha256:55cc"},
        passes=(
            PassResult(
                pass_text="gptq(bits=4)", matches={"*": 7}, layers=layers("gptq(bits=4)", layer_count), seconds=12.3
            ),
        ),
        plan=plan(),
        operators={"MatMulNBits": 6},
        float_layers=("lm_head",),
        cost=RunCost(seconds=117.2, passes_peak_memory_bytes=290_000_000, peak_memory_bytes=355_000_000),
        verdict=verdict_sentence(**parts),
        warnings=("the machine was busy in 3 of 60 rounds",),
        command="compress run shared/stories260K --passes 'gptq(bits=4)' --out out",
        **parts,
    )


def bare() -> Report:
    """A run that measured nothing."""
    nothing = {"speed": None, "baseline_quality": None, "artifact_quality": None, "memory_quality": None}
    empty = report(changes={**nothing, "verification": None, "gates": ()})
    unknown: dict[str, Any] = {"plan": None, "cost": None, "passes": (), "operators": {}, "float_layers": ()}
    return empty.model_copy(update={**unknown, "warnings": ()})


def printed(show: Callable[[Console], None], width: int = 160, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    show(Console(file=stream, width=width, force_terminal=False, color_system=None, legacy_windows=False))
    stream.flush()
    return raw.getvalue().decode(encoding)


def terminal(found: Report, width: int = 160, full: bool = True, encoding: str = "utf-8") -> str:
    return printed(lambda console: to_terminal(found, console, full=full), width, encoding)


class Tags(HTMLParser):
    """Collects tags, attributes, text and the content of the JSON script; fails on unbalanced tags."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.script = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        opened = self.open.pop() if self.open else "nothing"
        assert opened == tag, f"</{tag}> closes {opened}"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.script += data
        elif self.open[-1:] != ["style"]:
            self.text += f"\n{data}"


def parsed(page: str) -> Tags:
    tags = Tags()
    tags.feed(page)
    tags.close()
    assert tags.open == []
    return tags


def environment(found: Report) -> tuple[tuple[str, ...], ...]:
    return next(table.rows for table in build_page(found).details if table.key == "environment")


def cells(found: Report) -> list[str]:
    page = build_page(found)
    return [cell for table in (*page.main, *page.details) for row in table.rows for cell in row]
