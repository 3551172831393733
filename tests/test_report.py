"""The report: one record in, three pages out that agree, escape everything and hide nothing."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
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
from compress.report import to_html, to_markdown, to_terminal, verdict_sentence
from compress.report.chart import speed_chart
from compress.report.parts import show_quality, show_speed
from compress.report.rows import build_page
from compress.report.table import MAX_ROWS, Table

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
    return Timing(
        phase=phase,
        batch=batch,
        prompt=128,
        rounds=60,
        baseline_s=0.0123,
        variant_s=0.0123 / speedup,
        baseline_tokens_per_s=81.3 * batch,
        variant_tokens_per_s=81.3 * batch * speedup,
        speedup=speedup,
        interval=Interval(low=speedup - half, high=speedup + half),
        control=Interval(low=0.987, high=1.012),
        verdict=verdict,
    )


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


def test_the_three_pages_show_the_same_figures() -> None:
    found = report()
    markup = re.compile(r"[\\\s]")
    pages = [terminal(found, width=400), to_markdown(found), parsed(to_html(found)).text]
    bare_pages = [markup.sub("", page) for page in pages]
    figures = [
        markup.sub("", cell) for cell in cells(found) if re.search(r"\d", cell) and cell.isascii() and "<" not in cell
    ]
    assert len(figures) > 60
    for figure in figures:
        assert [figure in page for page in bare_pages] == [True, True, True], figure


def test_the_figures_are_those_of_the_record() -> None:
    text = to_markdown(report())
    for figure in ("14.7 MB", "4.7 MB", "0.0052 (0.0048 to 0.0056)", "21.8 (21.1 to 22.5)", "96.2% (95.8 to 96.6)"):
        assert figure in text
    for figure in ("| 12.3 |", "| 7.59 |", "1.62x (1.55 to 1.69)", "0.99 to 1.01", "93.2 ms", "4.16", "3.13x smaller"):
        assert figure in text


def test_the_same_report_gives_the_same_bytes() -> None:
    assert to_html(report()) == to_html(Report.model_validate_json(report().model_dump_json()))
    assert to_markdown(report()) == to_markdown(report())


def test_the_baseline_is_the_first_row() -> None:
    by_key = {table.key: table for table in build_page(report()).main}
    assert by_key["quality"].rows[0][0] == "baseline (onnxruntime)"
    assert [row[0].split(" (")[0] for row in by_key["quality"].rows[1:]] == ["artifact in runtime", "in memory"]
    assert by_key["quality"].rows[0][2] == by_key["quality"].rows[0][4] == "reference"
    assert by_key["footprint"].rows[0][0] == "baseline"


def test_the_place_of_the_model_in_memory_is_said_once() -> None:
    found = report(changes={"memory_quality": quality("compressed", "torch, in memory", 21.7, 0.0049)})
    table = next(table for table in build_page(found).main if table.key == "quality")
    assert table.rows[2][0] == "in memory (torch)"


def test_predicted_and_measured_are_labelled() -> None:
    table = next(table for table in build_page(report()).details if table.key == "plan")
    assert table.columns == ("quantity", "predicted", "measured")
    assert table.rows == (
        ("artifact size", "4.65 MB", "4.7 MB"),
        ("compressed model size", "4.5 MB", "not recorded"),
        ("peak memory of the run", "310 MB", "355 MB (290 MB in the passes)"),
        ("disk needed by the run", "21 MB", "not recorded"),
        ("time", "42.0 s", "117 s (12.3 s in the passes)"),
    )


def test_a_cost_that_was_not_recorded_is_not_made_up() -> None:
    found = report().model_copy(update={"cost": None})
    table = next(table for table in build_page(found).details if table.key == "plan")
    assert ("peak memory of the run", "310 MB", "not recorded") in table.rows
    assert ("time", "42.0 s", "12.3 s in the passes alone") in table.rows


def test_layers_are_grouped_and_the_worst_is_named() -> None:
    table = next(table for table in build_page(report()).details if table.key == "layers")
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["layer"] == "model.layers.*.mlp.down_proj"
    assert row["count"] == "6"
    assert row["error after"] == "0.0012 to 0.0017"
    assert row["worst layer"] == "model.layers.5.mlp.down_proj"


def test_skipped_and_float_layers_are_named() -> None:
    page = build_page(report())
    by_key = {table.key: table for table in (*page.main, *page.details)}
    assert by_key["skipped"].rows[0][1:3] == ("group does not divide 65", "1")
    assert by_key["operators"].rows == (("MatMulNBits", "6"),)
    assert by_key["operators"].notes == ("1 layer left in float: lm_head.",)


def test_layers_in_float_take_one_line_and_none_where_there_are_none() -> None:
    names = (*(f"model.layers.{index}.mlp.gate" for index in range(8)), "lm_head")
    text = terminal(report().model_copy(update={"float_layers": names}), full=False)
    assert "9 layers left in float: model.layers.*.mlp.gate (8), lm_head." in text.splitlines()
    assert "left in float" not in terminal(report().model_copy(update={"float_layers": ()}), full=False)


def test_a_warning_of_the_plan_is_shown_once() -> None:
    planned = plan().model_copy(update={"warnings": ("no fast kernel", "no fast kernel"), "refusals": ("int3",)})
    found = report().model_copy(update={"plan": planned, "warnings": ("busy", "no fast kernel")})
    assert build_page(found).warnings == ("busy", "plan: no fast kernel", "plan: int3")
    for page in (terminal(found), to_markdown(found), parsed(to_html(found)).text):
        assert page.count("no fast kernel") == 1


def test_a_digest_that_all_figures_share_is_shown_once() -> None:
    assert ("quality data digest", "sha256:77aa") in environment(report())
    other = quality("compressed", "torch", 21.7, 0.0049).model_copy(update={"data_digest": "sha256:other"})
    found = environment(report(changes={"memory_quality": other}))
    assert ("data digest, compressed in torch", "sha256:other") in found


def test_what_was_not_measured_is_said_on_every_page() -> None:
    for page in (terminal(bare()), to_markdown(bare()), parsed(to_html(bare())).text):
        assert page.count("not measured") >= 6
    assert "<svg" not in to_html(bare())
    partly = report(changes={"artifact_quality": None})
    artifact = next(table for table in build_page(partly).main if table.key == "quality").rows[1]
    assert artifact == ("artifact in runtime", "4.7 MB", "1.62x (1.55 to 1.69)", *["not measured"] * 4)


def test_quality_on_different_data_is_pointed_out() -> None:
    other = quality("compressed", "onnxruntime", 21.8, 0.0052).model_copy(update={"data_digest": "sha256:other"})
    assert "not computed on the same data" in to_markdown(report(changes={"artifact_quality": other}))


def test_hostile_names_are_text_in_html() -> None:
    page = to_html(report(title=HOSTILE))
    tags = parsed(page)
    assert {tag for tag, _ in tags.seen} & {"img", "iframe", "object", "link", "form"} == set()
    assert HOSTILE in tags.text
    assert "a|b</script><!--" in tags.text
    assert not {"\x1b", "\u202e"} & set(page)
    assert json.loads(tags.script)["title"] == HOSTILE
    assert [tag for tag, _ in tags.seen].count("script") == 1


def test_hostile_names_are_text_in_markdown() -> None:
    text = to_markdown(report(title=HOSTILE))
    assert "<" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert r"a\|b&lt;/script&gt;&lt;!-- " in text
    assert r"\[x\](javascript:1) \`c\`" in text
    assert not {"\x1b", "\u202e"} & set(text)
    row = next(line for line in text.splitlines() if r"a\|b" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 5


def test_a_recipe_cannot_close_its_fence() -> None:
    text = to_markdown(report().model_copy(update={"recipe": "a\n```\n<b>\n````"}))
    assert "`````text\na\n```\n<b>\n````\n`````" in text


def test_hostile_names_do_not_drive_the_terminal() -> None:
    found = report(title="[bold red]x[/] \x1b]0;owned\x07").model_copy(update={"float_layers": ("[link=x]y[/link]",)})
    for width in (160, 40):
        text = terminal(found, width)
        assert not {"\x1b", "\x07"} & set(text)
        assert "[bold red]x[/] \\x1b]0;owned\\x07" in text
        assert "[link=x]y[/link]" in text


def test_a_narrow_terminal_shows_every_figure_within_its_width() -> None:
    for width in (110, 60, 40):
        text = terminal(report(), width)
        assert max(len(line) for line in text.splitlines()) <= width
        flat = re.sub(r"\s+", " ", text)
        for figure in ("1.62x", "(1.55 to 1.69)", "0.0052", "(0.0048 to 0.0056)", "0.99 to 1.01", "inconclusive"):
            assert figure in flat, (width, figure)


def test_an_ascii_terminal_is_served() -> None:
    text = terminal(report(title="modèle"), encoding="ascii")
    assert "mod\\xe8le" in text


def test_the_first_screen_leaves_the_layers_to_the_full_page() -> None:
    first, whole = terminal(report(), full=False), terminal(report(), width=200)
    for words in ("worst layer", "Skipped layers", "group does not divide 65"):
        assert words not in first
        assert words in whole
        assert words in to_markdown(report())
        assert words in parsed(to_html(report())).text


@pytest.mark.parametrize("width", [160, 60])
def test_the_parts_show_the_figures_of_the_report(width: int) -> None:
    found = report()
    whole = terminal(found, width)
    assert found.baseline_quality and found.artifact_quality and found.speed
    arms = found.baseline_quality, found.artifact_quality, found.memory_quality
    shown = printed(lambda console: show_quality(*arms, console), width)
    assert {"baseline", "artifact", "memory", "21.8", "0.0052", "96.2%"} <= set(re.split(r"[\s()]+", shown))
    assert "size" not in shown
    timed = printed(lambda console: show_speed(found.speed or speed(), console), width)
    assert timed.strip() in whole


def test_the_speed_part_shows_the_warnings_of_its_settings() -> None:
    noisy = timing().model_copy(update={"warnings": ("the machine was busy",)})
    text = printed(lambda console: show_speed(speed(noisy), console))
    assert "warning: decode batch 1 prompt 128: the machine was busy" in text


def test_a_model_that_was_not_evaluated_in_memory_is_said_to_be_so() -> None:
    base, artifact = quality("baseline", "onnxruntime", 21.4), quality("compressed", "onnxruntime", 21.8, 0.0052)
    text = printed(lambda console: show_quality(base, artifact, None, console))
    assert text.count("not measured") == 4


def test_the_html_page_asks_for_nothing() -> None:
    page = to_html(report())
    tags = parsed(page)
    assert not [way for way in ("http://", "https://", "url(", "@import") if way in page]
    for tag, attributes in tags.seen:
        assert not {"src", "style", "srcset", "action"} & attributes.keys(), tag
        assert str(attributes.get("href", "#")).startswith("#"), tag  # only to another place of the page
        assert not [name for name in attributes if name.startswith("on")], tag
        assert tag != "script" or attributes == {"type": "application/json", "id": "report"}
    policy = next(found["content"] for _, found in tags.seen if found.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'; style-src 'sha256-")


def test_the_html_page_embeds_the_report() -> None:
    found = report()
    assert Report.model_validate_json(parsed(to_html(found)).script) == found


def test_the_chart_has_a_bar_per_setting_and_the_line_at_one() -> None:
    page = speed_chart([timing(), timing("prefill", 1, 0.82, 0.03, "slower"), timing("decode", 8, 1.02, 0.05)])
    assert page.count('class="noise"') == 3
    assert page.count('class="one"') == 1
    assert page.count(">1x</text>") == 1
    positions = [float(found) for found in re.findall(r'(?:x|x1|x2)="(-?[\d.]+)%"', page)]
    assert all(0 <= position <= 100 for position in positions)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 0.0, -3.0, 1e-300, 1e300])
def test_a_figure_that_is_no_number_breaks_no_page(broken: float) -> None:
    odd = timing().model_copy(
        update={"speedup": broken, "interval": Interval(low=broken, high=broken), "baseline_s": abs(broken)}
    )
    bad = quality("compressed", "onnxruntime", broken, broken)
    found = report(changes={"speed": speed(odd, timing()), "artifact_quality": bad, "source_bytes": 0})
    parsed(to_html(found))
    assert "decode batch 1" in terminal(found) + to_markdown(found)


def test_a_large_model_still_makes_a_small_page() -> None:
    found = report(layer_count=3000)
    page = to_html(found)
    assert len(page.encode()) < 300_000
    assert "without its lists of layers" in page
    many = tuple(f"layer_{index}_of_a_kind" for index in range(3000))
    assert "and 2988 more" in to_markdown(found.model_copy(update={"float_layers": many}))


def test_a_long_grid_is_cut_with_a_note() -> None:
    found = report(changes={"speed": speed(*[timing("prefill", index + 1) for index in range(MAX_ROWS + 5)])})
    assert "5 more rows are in report.json" in to_markdown(found)
    assert len(to_html(found).encode()) < 300_000
    assert "The chart shows the first 40 settings." in to_html(found)


def test_the_sentence_says_it_all() -> None:
    only_faster = pieces(speed=speed(timing()))
    assert verdict_sentence(**only_faster) == (
        "decode batch 1 prompt 128 is 1.62x faster (95% 1.55 to 1.69), 3.13x smaller (4.7 MB from 14.7 MB), "
        "KL 0.0052 nats/token (95% 0.0048 to 0.0056), perplexity 21.8 against 21.4; "
        "the artifact ran in onnxruntime and agreed."
    )


def test_the_headline_is_the_decode_setting_of_the_smallest_batch() -> None:
    mixed = speed(timing("prefill"), timing("decode", 8), timing("decode", 2))
    assert verdict_sentence(**pieces(speed=mixed)).startswith("decode batch 2 ")
    assert verdict_sentence(**pieces(speed=speed(timing("encode", 4)))).startswith("encode batch 4 ")


def test_slower_and_open_settings_are_named_beside_a_faster_headline() -> None:
    sentence = verdict_sentence(**pieces())
    assert "slower at prefill batch 1 prompt 128 (0.82x), inconclusive at 1 other setting" in sentence


@pytest.mark.parametrize(
    ("verdict", "ratio", "words"),
    [
        ("slower", 0.8, "is slower, 0.80x the baseline's speed (95% 0.77 to 0.83), no setting was faster"),
        ("inconclusive", 1.03, "is inconclusive, 1.03x (95% 1.00 to 1.06), no setting was faster"),
        ("same", 1.0, "is as fast as the baseline, 1.00x (95% 0.97 to 1.03), no setting was faster"),
    ],
)
def test_no_speed_up_is_said(verdict: SpeedVerdict, ratio: float, words: str) -> None:
    sentence = verdict_sentence(**pieces(speed=speed(timing(speedup=ratio, half=0.032, verdict=verdict))))
    assert words in sentence


def test_a_slower_headline_does_not_hide_a_faster_setting() -> None:
    found = speed(timing(speedup=0.8, half=0.03, verdict="slower"), timing("prefill", 4, 1.2, 0.03))
    sentence = verdict_sentence(**pieces(speed=found))
    assert "faster at prefill batch 4 prompt 128 (1.20x)" in sentence
    assert "no setting was faster" not in sentence


def test_failed_gates_come_before_the_good_news() -> None:
    failed = (
        Gate(name="kl", bound=0.005, found=0.0056, met=False),
        Gate(name="accuracy", bound=0.9, found=0.95, met=True),
    )
    sentence = verdict_sentence(**pieces(gates=failed))
    assert sentence.startswith("gate FAILED: KL (found 0.0056, bound 0.005); decode")
    assert build_page(report(changes={"gates": failed})).failed


def test_a_gate_missed_by_a_hair_shows_the_hair() -> None:
    failed = (Gate(name="top1_agreement", bound=0.98, found=0.9799996, met=False),)
    assert "found 0.9799996, bound 0.98)" in verdict_sentence(**pieces(gates=failed))


def test_disagreement_comes_first() -> None:
    sentence = verdict_sentence(**pieces(verification=verification(agrees=False)))
    assert sentence.startswith("the artifact ran in onnxruntime and did NOT agree with the model (largest relative")
    assert "0.31, bound 0.001, same top token at 99.4% of 512 positions" in sentence
    assert "and agreed" not in sentence


@pytest.mark.parametrize(
    ("level", "words"),
    [("built", "was built for onnxruntime but not run there"), ("checked", "was only checked against the rules")],
)
def test_a_weaker_check_is_not_called_a_run(level: str, words: str) -> None:
    sentence = verdict_sentence(**pieces(verification=verification(level=level)))
    assert words in sentence
    assert "ran in onnxruntime" not in sentence


def test_parts_that_were_not_measured_are_said_in_the_sentence() -> None:
    assert verdict_sentence(source_bytes=0, artifact_bytes=5) == (
        "speed not measured, size not measured, quality not measured; "
        "agreement of the artifact with the model not measured."
    )
    in_memory = verdict_sentence(**pieces(artifact_quality=None, baseline_quality=None))
    assert "in memory before lowering KL 0.0049 nats/token" in in_memory
    assert "perplexity 21.7 against a baseline not measured, quality of the artifact not measured" in in_memory


def test_a_larger_artifact_is_called_larger() -> None:
    assert "1.5x larger (15 MB from 10 MB)" in verdict_sentence(source_bytes=10_000_000, artifact_bytes=15_000_000)
    assert "the same size (10 MB from 10 MB)" in verdict_sentence(source_bytes=10_000_000, artifact_bytes=10_010_000)


def test_every_table_is_as_wide_as_its_header() -> None:
    page = build_page(report())
    tables: tuple[Table, ...] = (*page.main, *page.details)
    for table in tables:
        assert len(table.align) == len(table.columns), table.key
        assert {len(row) for row in table.rows} <= {len(table.columns)}, table.key


def test_importing_the_report_loads_neither_torch_nor_rich() -> None:
    code = "import sys, compress.report; print([name for name in ('torch', 'rich', 'numpy') if name in sys.modules])"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"
