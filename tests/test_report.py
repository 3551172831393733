"""The report: one record in, three pages out that agree, escape everything and hide nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from compress.records import Interval, Report
from compress.report import to_html, to_markdown
from compress.report.chart import speed_chart
from compress.report.parts import show_quality, show_speed
from compress.report.rows import build_page
from compress.report.table import MAX_ROWS, Table
from helpers.full_report import (
    HOSTILE,
    bare,
    cells,
    environment,
    parsed,
    plan,
    printed,
    quality,
    report,
    speed,
    terminal,
    timing,
)


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


def test_the_two_sizes_of_the_original_are_told_apart() -> None:
    found = report()
    assert found.speed is not None
    arm = found.speed.baseline.model_copy(update={"disk_bytes": 15_200_000})
    apart = found.model_copy(update={"speed": found.speed.model_copy(update={"baseline": arm})})
    text = to_markdown(apart)
    assert "source's own files, 14.7 MB; exported for the runtime without compression the model takes 15.2 MB" in text
    same = arm.model_copy(update={"disk_bytes": found.source_bytes})
    alike = found.model_copy(update={"speed": found.speed.model_copy(update={"baseline": same})})
    assert "source's own files" not in to_markdown(alike)


def test_a_setting_of_images_is_told_without_a_prompt_on_a_narrow_terminal() -> None:
    text = terminal(report(changes={"speed": speed(timing("infer"))}), 60)
    assert "infer, batch 1\n" in text and "prompt -" not in text


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
    ones = re.findall(r'class="one".*? y1="(\d+)" y2="(\d+)"', page)
    labels = [int(found) for found in re.findall(r'class="label" x="0" y="(\d+)"', page)]
    assert len(ones) == 3 and all(label < int(ones[row][0]) for row, label in enumerate(labels)), "below the labels"
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
