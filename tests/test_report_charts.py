"""The drawings of a report and the pages around them: marks where the figures are, nothing hidden, nothing run."""

from __future__ import annotations

import io
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
from rich.console import Console

from compress.quality_records import Curve, CurvePoint, WorstSample
from compress.records import (
    Footprint,
    Gate,
    Interval,
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
    Verification,
)
from compress.report import to_html, to_markdown, to_terminal
from compress.report.axes import Scale, decade_scale, decade_ticks, linear_scale, linear_ticks
from compress.report.curve_chart import curve_chart
from compress.report.front_chart import Point, Trade, front_chart
from compress.report.front_points import trade_of
from compress.report.heat_rows import MAX_COLUMNS, MAX_ROWS, heat_of, heat_table
from compress.report.html_page import MAX_BYTES
from compress.report.next_steps import next_steps
from compress.report.rows import build_page
from compress.report.size_rows import parts_of, size_table

HOSTILE = '<img src=x onerror="alert(1)"></script><!--'
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RECIPE = "gptq(format=int4(group=128))"
# fields whose values are words of a closed list, or are checked; everything else a stranger may fill
CLOSED = {"better", "bound", "kernel", "level", "phase", "subject", "verdict", "name"}


def around(value: float, half: float) -> Interval:
    return Interval(low=value - half, high=value + half)


def metric(value: float, half: float, unit: str = "1", better: Any = "lower", **more: Any) -> Metric:
    return Metric(value=value, interval=around(value, half), samples=8, unit=unit, protocol="p", better=better, **more)


def timing(verdict: Any = "faster", speedup: float = 2.5, half: float = 0.1, **more: Any) -> Timing:
    found: dict[str, Any] = {"phase": "decode", "batch": 1, "prompt": 128, "rounds": 60, **more}
    rates: dict[str, Any] = {"baseline_tokens_per_s": 100.0, "variant_tokens_per_s": 100.0 * speedup}
    return Timing(
        **found, **rates, baseline_s=0.01, variant_s=0.01 / speedup, speedup=speedup, interval=around(speedup, half),
        control=around(1.0, 0.01), verdict=verdict,
    )  # fmt: skip


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


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_the_better_of_two_stands_higher(better: Any) -> None:
    worse = Point("w2", 0.4, 2.6, 200, "front")
    found = heights(front_chart(trade(worse, better=better)))
    assert (found["w2"] > found["w4"]) == (better == "lower")


def test_no_loss_stands_on_top_though_losses_span_orders_of_magnitude() -> None:
    many = [Point(f"v{place}", 10.0**-place, 1.5 + place / 10, 10, "front") for place in range(1, 5)]
    found = heights(front_chart(trade(*many)))
    assert found["baseline"] < found["v4"] < found["v3"] < found["v2"] < found["v1"]
    gaps = [found[f"v{place}"] - found[f"v{place + 1}"] for place in (1, 2, 3)]
    assert max(gaps) - min(gaps) < 1  # equal ratios, equal distances


def test_ties_are_ringed_predictions_hatched_and_limits_shaded() -> None:
    plain = front_chart(trade())
    tied = front_chart(trade(Point("w3", 0.006, 2.5, 300, "dominated", tied=True)))
    predicted = front_chart(trade(Point("far", 0.006, 3.5, 300, "front", predicted=True)))
    limited = front_chart(trade(worst_quality=0.004, least_speedup=1.5))
    assert [svg.count('class="ring"') for svg in (plain, tied, predicted, limited)] == [0, 1, 0, 0]
    assert [svg.count('class="mark predicted"') for svg in (plain, tied, predicted, limited)] == [0, 0, 1, 0]
    assert [svg.count('class="beyond"') for svg in (plain, tied, predicted, limited)] == [0, 0, 0, 2]
    assert "predicted, not measured" in predicted and "dominated, tied" in tied


def test_every_mark_lies_on_the_page_and_has_its_words() -> None:
    odd = [
        Point("nan", float("nan"), 1.0, 5, "front"),
        Point("far", 1e9, 1e9, 0, "dominated", around(1e9, 1e12), Interval(low=-1.0, high=float("inf"))),
    ]
    svg = front_chart(trade(*odd))
    positions = [float(found) for found in re.findall(r'(?:\bx|x1|x2|cx)="(-?[\d.]+)%"', svg)]
    assert positions and all(0 <= position <= 100 for position in positions)
    assert "w4: 2.50x, KL 0.00500, 300 B, recommended" in svg and ">nan<" not in svg and 'x="nan' not in svg


def test_names_that_would_meet_become_numbers_with_a_key() -> None:
    few = front_chart(trade())
    assert ">w4</text>" in few and ">2</text>" not in few
    crowd = [Point(f"a long name of variant {place}", 0.005, 2.5 + place / 100, 300, "front") for place in range(9)]
    svg = front_chart(trade(*crowd))
    for place, point in enumerate(points(*crowd), 1):
        assert f">{place}. {point.name}</text>" in svg


def test_one_run_is_drawn_as_its_baseline_its_artifact_and_the_prediction() -> None:
    found = trade_of(report(gates=(Gate(name="kl", bound=0.02, found=0.0054, met=True),)))
    assert found is not None and found.worst_quality == 0.02
    assert [(point.name, point.predicted, point.tied) for point in found.points] == [
        ("baseline", False, False), ("artifact", False, False), ("predicted", True, False)
    ]  # fmt: skip
    assert found.points[2].speedup == 4.0
    open_ = trade_of(report(speed=speed(timing("inconclusive", 1.05))))
    assert open_ is not None and open_.points[1].tied


def test_what_was_not_measured_is_not_drawn() -> None:
    nothing = report(speed=None, plan=None)
    assert trade_of(nothing) is None
    assert "<svg" not in to_html(nothing.model_copy(update={"passes": (), "artifact_quality": None}))


def test_a_predicted_speed_has_a_row_of_its_own() -> None:
    rows = table(report(), "quality").rows
    assert rows[-1][:3] == ("plan, predicted", "400 kB", "4.00x at best")
    assert rows[1][2] == "2.50x (2.40 to 2.60)"
    row = table(report(), "latency").rows[0]
    assert row[-2:] == ("4.00x", "2.50x (2.40 to 2.60)")


def test_the_heat_map_has_a_cell_per_layer_and_outlines_the_worst() -> None:
    heat = heat_of(passes())
    assert heat is not None
    assert heat.columns == KINDS and heat.rows == ("0", "1", "2", "3")
    assert [cell.layer for cell in heat.worst] == [f"model.layers.{block}.down_proj" for block in (3, 2, 1)]
    assert heat.cells[3][6] == heat.worst[0] and heat.worst[0].level == 6
    levels = [cell.level for row in heat.cells for cell in row if cell]
    assert min(found for found in levels if found is not None) == 0
    svg = to_html(report()).partition('<svg class="chart heat"')[2].partition("</svg>\n<figcaption>")[0]
    assert svg.count("<title>model.layers.") == 28 and svg.count(' worst"') == 3
    assert "<title>model.layers.3.down_proj: 0.00220, 4.5 bits</title>" in svg


def test_bits_stand_in_the_header_where_a_column_shares_them() -> None:
    mixed = tuple(
        layer(block, kind, bits=8.5 if (block, kind) == (0, "q_proj") else 4.5) for block in (0, 1) for kind in KINDS
    )
    found = heat_table(heat_of((PassResult(pass_text=RECIPE, matches={}, layers=mixed, seconds=1.0),)))
    assert found.columns[:3] == ("block", "q_proj", "k_proj (4.5 bits)")
    assert found.rows[0][1:3] == ("0.000100 (8.5 bits)", "0.000400")


def test_experts_share_the_cell_of_the_worst_of_them() -> None:
    names = [f"model.layers.{block}.mlp.experts.{expert}.up_proj" for block in (0, 1) for expert in range(8)]
    found = tuple(
        layer(0, "up_proj", error=0.001 * (1 + place)).model_copy(update={"layer": name})
        for place, name in enumerate(names)
    )
    heat = heat_of((PassResult(pass_text=RECIPE, matches={}, layers=found, seconds=1.0),))
    assert heat is not None and heat.rows == ("0", "1") and heat.columns == ("up_proj",)
    cells = [row[0] for row in heat.cells]
    assert [(cell.layer, cell.count) for cell in cells if cell] == [(names[7], 8), (names[15], 8)]


def test_too_many_blocks_and_kinds_are_gathered_and_said_to_be() -> None:
    kinds = tuple(f"part{place}" for place in range(30))
    layers = tuple(
        layer(0, "q_proj", error=1e-4 * (1 + place)).model_copy(update={"layer": f"layers.{block}.{kind}"})
        for block in range(250)
        for place, kind in enumerate(kinds)
    )
    heat = heat_of((PassResult(pass_text=RECIPE, matches={}, layers=layers, seconds=1.0),))
    assert heat is not None
    assert len(heat.rows) == 84 <= MAX_ROWS and heat.rows[0] == "0 to 2"
    assert heat.columns == kinds[-MAX_COLUMNS:]  # the worst
    assert "3 neighbouring blocks" in heat.notes[0] and "16 kinds" in heat.notes[1]


def test_a_model_without_blocks_or_errors_has_no_heat_map() -> None:
    assert heat_of(passes(blocks=1)) is None
    bare = tuple(each.model_copy(update={"output_error": None, "error_after": None}) for each in passes()[0].layers)
    assert heat_of((PassResult(pass_text=RECIPE, matches={}, layers=bare, seconds=1.0),)) is None
    assert heat_of((passes()[0].model_copy(update={"layers": tuple(
        each.model_copy(update={"output_error": float("nan")}) for each in passes()[0].layers)}),)) is None  # fmt: skip


def test_the_parts_are_all_of_the_bytes() -> None:
    found = parts_of(report())
    assert sum(part.stored for part in found) == 410_000
    assert (found[0].name, found[-1].name) == ("lm_head", "all else")
    row = size_table(report()).rows[1]
    assert row == ("model.layers.*.q_proj", "4", "32.8k", "int4(group=128)", "4.5", "18.4 kB", "4.5%")


def test_a_curve_has_a_step_and_a_band_per_part() -> None:
    svg = curve_chart(curve())
    assert svg.count('class="band"') == svg.count('class="line"') == 6
    assert "0 to 8: 0.004 (0.001 to 0.009) nats" not in svg and "<title>0 to 8: 0.004" in svg
    negative = curve().model_copy(update={"points": tuple(
        point.model_copy(update={"value": -point.value}) for point in curve().points)})  # fmt: skip
    assert curve_chart(negative).count('class="line"') == 6
    assert curve_chart(curve().model_copy(update={"points": ()})) == ""
    assert 'class="one"' in curve_chart(curve("reliability", "fraction"))


def test_worst_samples_show_their_blanks_and_line_ends() -> None:
    row = table(report(), "worst").rows[0]
    assert row == ("3, 7", '... "if not x:\\n return"', '" None"', '" None"', "90.0%", '" x"', "20.0%", "1.50")


def test_a_page_of_eighty_blocks_is_under_its_limit_and_whole() -> None:
    curves = (curve(), curve("kl_by_confidence"), curve("reliability", "fraction"))
    found = report(
        passes=passes(80), plan=plan(80), artifact_quality=quality(curves=curves, worst=quality().worst * 20)
    )
    page = to_html(found)
    assert len(page.encode()) < MAX_BYTES == 300_000
    assert len(re.findall(r"<title>model\.layers\.\d", page)) == 560


def test_every_drawing_is_named_and_stands_over_its_table() -> None:
    seen = Seen(to_html(report())).tags
    ids = Counter(attributes["id"] for _, attributes in seen if "id" in attributes)
    assert set(ids.values()) == {1}
    charts = [attributes for tag, attributes in seen if tag == "svg" and attributes.get("role") == "img"]
    assert len(charts) == 6 and {attributes["aria-labelledby"] for attributes in charts} <= ids.keys()
    tables = [attributes for tag, attributes in seen if tag == "table"]
    assert {attributes["aria-labelledby"] for attributes in tables} <= ids.keys()
    heads = [attributes.get("scope") for tag, attributes in seen if tag == "th"]
    assert set(heads) == {"col", "row"}
    links = [attributes["href"] for tag, attributes in seen if tag == "a"]
    assert links and {str(link).removeprefix("#") for link in links} <= ids.keys()
    levels = [int(tag[1]) for tag, _ in seen if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in pairwise(levels))


def infected(value: Any, key: str = "") -> Any:
    """Every text and every name of a field that a stranger may fill, made hostile."""
    if isinstance(value, dict):
        fixed = {"metrics", "matches", "versions", "calibration", "machine", "operators", "files"}
        return {(f"{HOSTILE}{at}" if key in fixed else name): infected(each, "" if key in fixed else name)
                for at, (name, each) in enumerate(value.items())}  # fmt: skip
    if isinstance(value, list):
        return [infected(each, key) for each in value]
    return HOSTILE if isinstance(value, str) and key not in CLOSED else value


def test_a_report_that_is_hostile_everywhere_executes_nothing() -> None:
    full = report(
        gates=(Gate(name=HOSTILE, bound=0.1, found=0.2, met=False),), operators={"a": 1}, float_layers=("x", "y"),
        warnings=("w",), command="c", files={"a": "b"},
        speed=speed(timing().model_copy(update={"warnings": ("noisy",)})),
    )  # fmt: skip
    content = infected(full.model_dump(mode="json"))
    for each in content["artifact_quality"]["curves"]:
        each["name"] = HOSTILE
    found = Report.model_validate(content)
    assert found.title == found.passes[0].layers[0].layer == HOSTILE
    page = to_html(found)
    assert "<img" not in page and page.count("<script") == page.count("</script>") == 1 and page.count("<!--") == 0
    tags = {tag for tag, _ in Seen(page).tags}
    assert not tags & {"img", "iframe", "object", "link", "form", "foreignobject", "image", "use", "animate"}
    for _, attributes in Seen(page).tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src")]
    outside_code = to_markdown(found).split("```")[::2]
    assert "<img" not in "".join(outside_code)
    assert HOSTILE in printed(found, width=400)


def test_hostile_names_in_a_drawing_are_text() -> None:
    point = Point(HOSTILE, 0.005, 2.0, 10, "front", reason=HOSTILE)
    for svg in (
        front_chart(trade(point, metric=HOSTILE, setting=HOSTILE, unit=HOSTILE)),
        curve_chart(curve(HOSTILE, HOSTILE)),
    ):
        assert "<img" not in svg and "<!--" not in svg


def test_a_missed_gate_names_the_layers_to_leave_out() -> None:
    missed = (Gate(name="kl", bound=0.004, found=0.0054, met=False),)
    step = next_steps(report(gates=missed))[0]
    assert "KL is 0.0054 where 0.004 was asked for" in step
    assert "ignore=[model.layers.3.down_proj, model.layers.2.down_proj, model.layers.1.down_proj]" in step
    odd = tuple(each.model_copy(update={"layer": f"{each.layer}`; rm -rf"}) for each in passes()[0].layers)
    named = report(gates=missed, passes=(passes()[0].model_copy(update={"layers": odd}),))
    assert "rm" not in next_steps(named)[0]


def test_the_next_steps_follow_what_was_found() -> None:
    assert "--budget" in next_steps(report(speed=speed(timing("inconclusive", 1.05))))[0]
    assert "no fast" in next_steps(report(speed=speed(timing("slower", 0.5))))[0].replace("without a", "no")
    assert "times it" in next_steps(report(speed=None))[0]
    broken = Verification(
        level="ran", runtime="r", agrees=False, positions=1, max_relative_difference=1.0, bound=0.1, top1_agreement=0.0,
        decided_positions=1, decided_agreement=0.0,
    )  # fmt: skip
    assert next_steps(report(verification=broken))[0].startswith("Do not use this artifact")
    assert "What to do next" in printed(report()) and "## What to do next" in to_markdown(report())


def test_the_short_page_shows_few_warnings_and_counts_the_others() -> None:
    noisy = report(warnings=tuple(f"trouble with {name}" for name in ("a", "b", "c", "d", "e", "f")))
    short = printed(noisy)
    assert short.count("trouble with") == 4 and "2 more warnings in the report." in short
    assert printed(noisy, full=True).count("trouble with") == 6


def test_one_warning_of_several_settings_is_told_once() -> None:
    said = tuple(
        timing(batch=batch).model_copy(update={"warnings": (f"budget spent after {batch}.5 s (of {batch})",)})
        for batch in (1, 4, 16)
    )
    warnings = build_page(report(speed=speed(*said))).warnings
    assert warnings == ("decode batch 1 prompt 128: budget spent after 1.5 s (of 1); likewise at 2 other settings",)


def test_a_table_too_wide_for_a_terminal_is_turned_on_its_side() -> None:
    names = ("perplexity", "kl", "top1_agreement", "nll_change")
    many = quality(metrics={name: metric(0.123456, 0.000123) for name in names})
    lines = printed(report(artifact_quality=many), width=90).splitlines()
    assert any(re.match(r"loss change\s+reference", line) for line in lines)
    assert max(map(len, lines)) <= 90


def test_the_words_for_speed_that_occur_are_explained() -> None:
    notes = " ".join(table(report(speed=speed(timing("same", 1.0, 0.005), timing(batch=4))), "speed").notes)
    assert "same: the whole interval lies within 1% of 1" in notes and "faster: the whole" in notes
    assert "slower:" not in notes and "inconclusive:" not in notes
    assert "noise floor is the interval of the baseline timed against itself" in notes


def test_a_grid_of_batches_and_prompts_is_a_matrix() -> None:
    grid = [timing(batch=batch, prompt=prompt) for batch in (1, 4) for prompt in (32, 128)]
    found = table(report(speed=speed(*grid)), "grid-decode")
    assert found.columns == ("batch", "prompt 32", "prompt 128")
    assert [row[0] for row in found.rows] == ["1", "4"] and found.rows[0][1] == "2.50x (2.40 to 2.60) faster"
    assert table(report(speed=speed(*grid[:2])), "grid-decode") is None


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 7.0), (1e-5, 3e-5), (0.0, 1e9), (2.0, 2.1)])
def test_ticks_lie_inside_their_scale(low: float, high: float) -> None:
    scale = linear_scale([low, high], 0.0, 100.0)
    ticks = linear_ticks(scale)
    assert 2 <= len(ticks) <= 5 and all(0 < scale.at(tick) < 100 for tick in ticks)
    assert len({round(after - before, 12) for before, after in pairwise(ticks)}) == 1


@pytest.mark.parametrize(("low", "high"), [(1e-6, 2e-6), (3e-4, 5.0), (1.0, 1.0), (1e-9, 1e9)])
def test_decades_hold_their_values(low: float, high: float) -> None:
    scale = decade_scale([low, high], 0.0, 100.0)
    assert scale.low <= low and high <= scale.high * 1.000001
    assert 1 <= len(decade_ticks(scale)) <= 6


def test_a_scale_draws_what_it_cannot_hold_at_its_edge() -> None:
    scale = Scale(1.0, 10.0, 0.0, 50.0, log=True)
    assert [scale.at(value) for value in (float("nan"), -5.0, 0.5, 1e9, float("inf"))] == [0.0, 0.0, 0.0, 50.0, 50.0]
    assert scale.at(10**0.5) == pytest.approx(25.0)
