"""The pages around the drawings: hostile names, next steps, warnings, tables that fit."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from compress.records import Gate, Report, Verification
from compress.records.speed import LONGER, EveryRound
from compress.report import to_html, to_markdown
from compress.report.curve_chart import curve_chart
from compress.report.front_chart import Point, front_chart
from compress.report.next_steps import argument, next_steps
from compress.report.rows import build_page
from compress.report.tiles import tiles_of
from compress.report.verdict import verdict_sentence
from helpers.chart_report import (
    HOSTILE,
    Seen,
    curve,
    metric,
    passes,
    printed,
    quality,
    report,
    speed,
    table,
    timing,
    trade,
)

# fields whose values are words of a closed list, or are checked; everything else a stranger may fill
CLOSED = {"better", "bound", "kernel", "level", "output_reference", "phase", "subject", "verdict", "name"}


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
    longer = "`compress profile OUT --budget 60 --processes 3` settles the speed at decode batch 1 prompt 128"
    assert next_steps(report(speed=speed(timing("inconclusive", 1.05))))[0].startswith(longer)
    assert "no fast" in next_steps(report(speed=speed(timing("slower", 0.5))))[0].replace("without a", "no")
    assert "times it" in next_steps(report(speed=None))[0]
    broken = Verification(
        level="ran", runtime="r", agrees=False, positions=1, max_relative_difference=1.0, bound=0.1, top1_agreement=0.0,
        decided_positions=1, decided_agreement=0.0,
    )  # fmt: skip
    assert next_steps(report(verification=broken))[0].startswith("Do not use this artifact")
    assert "What to do next" in printed(report()) and "## What to do next" in to_markdown(report())


def test_a_timing_of_few_or_disturbed_rounds_is_provisional_wherever_it_is_told() -> None:
    whole = timing()
    rounds = EveryRound(
        disturbed=5, causes={}, left_out=True, rounds=18, speedup=2.5, interval=whole.interval, control=whole.control
    )
    few = whole.model_copy(update={"rounds": 13, "every_round": rounds, "warnings": (f"few. {LONGER}",)})
    found = report(speed=speed(few))
    assert few.provisional == "13 rounds, 5 disturbed" and not whole.provisional
    assert tiles_of(found)[0].detail.endswith("; provisional: 13 rounds, 5 disturbed")
    said = verdict_sentence(source_bytes=2, artifact_bytes=1, speed=found.speed)
    assert "; provisional: 13 rounds, 5 disturbed)" in said
    page = build_page(found, Path("my-out"))
    assert page.next_steps[0].startswith("`compress profile my-out --budget 60 --processes 3`")
    assert any(text.endswith("compress profile my-out --budget 60 --processes 3") for text in page.warnings)


def test_what_to_do_next_is_under_the_cards_and_many_warnings_are_folded() -> None:
    noisy = to_html(report(warnings=tuple(f"trouble with {name}" for name in "abcdef")))
    header = noisy[: noisy.index("</header>")]
    assert header.index('class="tiles"') < header.index("What to do next") < header.index('class="facts"')
    shown, _, folded = noisy[noisy.index('class="warnings"') :].partition("<details>")
    assert shown.count("trouble with") == 3 and folded.startswith("<summary>More warnings: 3</summary>")
    assert (
        "<details>"
        not in to_html(report(warnings=("a", "b", "c"))).partition('class="warnings"')[2].split("</section>")[0]
    )


def test_commands_name_the_real_folder_as_a_shell_takes_it() -> None:
    folder = Path("my out/<img src=x>'s")
    quoted = shlex.quote(str(folder))
    assert f"`compress verify {quoted}`" in next_steps(report(), folder)[-1]
    assert shlex.split(build_page(report(), folder).blocks[-1].text.splitlines()[0])[-1] == str(folder)
    assert "<img src=x>" not in to_html(report(), folder) and "&lt;img src=x&gt;" in to_html(report(), folder)
    for hostile in ("a`b", "a\x1b[31m", "a\nb", "\u202egnp"):  # no line of code can show these
        assert argument(Path(hostile)) == "OUT"
    assert argument(Path("-o")) == "./-o" and argument(None) == "OUT"


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
