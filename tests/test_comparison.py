"""`compress compare`: what changed between two reports, with intervals, and the conditions held against it."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from compress.__main__ import main
from compress.comparison import compare
from compress.comparison.conditions import judge, parse
from compress.comparison.figures import Figure, difference, ends, ratio
from compress.comparison.page import comparison_page
from compress.errors import UsageError
from compress.records import Asked, Interval, Report
from compress.report.markdown import page_markdown
from compress.report.terminal import print_page
from helpers.compared import change, failed, metric, metrics, quality, report, speed, timing

HOSTILE = "<img src=x onerror=alert(1)>|`\x1b[31m\u202e"


def test_the_change_of_two_estimates_has_the_width_of_both() -> None:
    one = Figure(value=10.0, interval=Interval(low=9.0, high=13.0))
    two = Figure(value=12.0, interval=Interval(low=8.0, high=13.0))
    found = difference(one, two)
    assert found.value == 2.0
    assert ends(found) == pytest.approx((2 - math.hypot(4, 3), 2 + math.hypot(1, 1)))
    assert difference(one, Figure(value=12.0)).interval == Interval(low=-1.0, high=3.0)
    assert difference(Figure(value=1.0), Figure(value=3.0)) == Figure(value=2.0)


def test_the_interval_of_a_change_covers_the_true_one() -> None:
    """Against a simulation: 95 % intervals of two independent normal estimates."""
    import numpy as np

    random, half = np.random.default_rng(0), 1.96
    hits = 0
    for a, b in random.standard_normal((2000, 2)) * (1.0, 0.5) + (10.0, 11.0):
        one = Figure(value=a, interval=Interval(low=a - half, high=a + half))
        two = Figure(value=b, interval=Interval(low=b - half / 2, high=b + half / 2))
        low, high = ends(difference(one, two))
        hits += low <= 1.0 <= high
    assert 0.94 <= hits / 2000 <= 0.96


def test_a_ratio_is_a_difference_of_logarithms_and_reaches_infinity_where_zero_is_possible() -> None:
    one = Figure(value=2.0, interval=Interval(low=1.0, high=4.0))
    two = Figure(value=4.0, interval=Interval(low=2.0, high=8.0))
    found = ratio(one, two)
    assert found is not None and found.value == pytest.approx(2.0)
    assert ends(found) == pytest.approx((2 / 2**2**0.5, 2 * 2**2**0.5))
    reaching = ratio(Figure(value=1.0, interval=Interval(low=-0.1, high=2.0)), one)
    assert reaching is not None and ends(reaching)[1] == math.inf
    assert ratio(Figure(value=0.0), one) is None and ratio(Figure(value=math.nan), one) is None


def test_perplexity_is_compared_through_the_original_where_the_samples_are_the_same() -> None:
    a, b = report(), report(artifact_quality=quality(**metrics(21.9, 0.024)))
    found = change(compare(a, b), "perplexity")
    assert found.ratio is not None and found.word == "worse"
    # of the perplexities alone, 21.8 (21.1 to 22.5) and 21.9 (21.2 to 22.6), nothing could be said
    assert ends(found.ratio) == pytest.approx([math.exp(0.004 + sign * 0.001 * 2**0.5) for sign in (-1, 1)])
    other = change(compare(a, b.model_copy(update={"source_digest": "11"})), "perplexity")
    assert other.word == "no clear change" and "independent" in other.note


def test_a_share_is_compared_through_its_change_in_points() -> None:
    def of(accuracy: float, points: float) -> Report:
        return report(
            artifact_quality=quality(
                accuracy=metric(accuracy, 0.03, "fraction", "higher"),
                accuracy_change=metric(points, 0.3, "percentage points", "higher"),
            )
        )

    found = change(compare(of(0.90, -0.2), of(0.89, -1.2)), "accuracy")
    assert found.difference is not None and found.word == "worse"
    assert ends(found.difference) == pytest.approx((-0.01 - 0.003 * 2**0.5, -0.01 + 0.003 * 2**0.5))


def test_quality_on_other_data_or_by_another_protocol_is_not_compared_and_a_condition_on_its_change_is_refused() -> (
    None
):
    a = report()
    other = report(artifact_quality=quality("other", **metrics()))
    found = compare(a, other)
    assert {each.word for each in found.changes if each.kind == "quality"} == {"not compared"}
    assert any("other data" in note for note in found.notes)
    with pytest.raises(UsageError, match="change of 'kl' is not known: other data"):
        failed("kl>+10%", a, other)
    assert not failed("kl>0.05", a, other)  # B's own value needs no A
    moved = {**metrics(), "kl": metric(0.005, 0.0004, "nats/token", protocol="ppl/disjoint-64")}
    assert change(compare(a, report(artifact_quality=quality(**moved))), "kl").note == "another protocol"


def test_latency_is_compared_through_the_baseline_so_a_busy_machine_is_no_change() -> None:
    a = report(speed=speed(timing(1.5, base_s=0.010)))
    b = report(speed=speed(timing(1.5, base_s=0.013)))
    found = compare(a, b)
    latency = change(found, "latency:decode batch 1 prompt 128")
    assert latency.before is not None and latency.after is not None and latency.ratio is not None
    assert latency.after.value / latency.before.value == pytest.approx(1.3)
    assert latency.ratio.value == pytest.approx(1.0) and latency.word == "no clear change"
    assert any("baseline itself took another time" in note and "30.0% longer" in note for note in found.notes)


def test_a_difference_within_the_noise_floor_is_no_change() -> None:
    noisy = timing(1.45, 0.001).model_copy(update={"control": Interval(low=0.9, high=1.1)})
    assert change(compare(report(), report(speed=speed(noisy))), "speedup:decode batch 1 prompt 128").word == (
        "no clear change"
    )
    assert change(
        compare(report(), report(speed=speed(timing(1.45, 0.001)))), "speedup:decode batch 1 prompt 128"
    ).word == ("worse")


def test_latencies_of_other_sources_are_compared_as_they_are() -> None:
    found = compare(report(), report(source_digest="11"))
    latency = change(found, "latency:decode batch 1 prompt 128")
    assert latency.ratio is not None and latency.ratio.interval is None and "without an interval" in latency.note
    assert any("two source models" in note for note in found.notes)


@pytest.mark.parametrize(
    ("changes", "words"), [({"cpu": "Other"}, "cpu Xeon against Other"), ({"threads": 4}, "threads 2 against 4")]
)
def test_latencies_of_unlike_machines_are_refused_and_can_be_told_by_their_speed_ups(
    changes: dict[str, Any], words: str
) -> None:
    a, b = report(), report(speed=speed(timing(1.2, base_s=0.1), **changes))
    with pytest.raises(UsageError, match=f"{words}.*--allow-cross-machine"):
        compare(a, b)
    found = compare(a, b, allow_cross_machine=True)
    latency = change(found, "latency:decode batch 1 prompt 128")
    assert latency.ratio is not None and latency.ratio.value == pytest.approx(1.5 / 1.2)
    assert latency.difference is None and change(found, "load_time").word == "not compared"
    assert failed("latency:decode>+3%", a, b, allow_cross_machine=True)
    with pytest.raises(UsageError, match="by its ratio only"):
        failed("latency:decode>+1ms", a, b, allow_cross_machine=True)


def test_memory_that_is_free_at_the_moment_makes_no_other_machine() -> None:
    assert compare(report(), report(speed=speed(timing())))


def test_the_worse_end_of_the_interval_decides() -> None:
    a = report()
    assert not failed("kl>0.0055", a, a)  # 0.005, at most 0.0054
    assert failed("kl>0.0053", a, a)
    assert not failed("top1_agreement<95.7%", a, a) and failed("top1_agreement<96%", a, a)
    assert not failed("speedup:decode<1.48", a, a) and failed("speedup:decode<1.495", a, a)
    assert not failed("size>+1%", a, a) and failed("size>+1%", a, report(artifact_bytes=5_051))
    [judged] = judge(parse("kl>0.0053"), compare(a, a))
    assert judged.end == "upper end" and judged.found == pytest.approx(0.0054)


def test_a_change_is_held_against_the_intervals_of_both() -> None:
    a, b = report(), report(artifact_quality=quality(**metrics(kl=0.0051)))
    half = 0.0004 * 2**0.5
    assert failed(f"kl>+{0.0001 + half - 1e-6}", a, b) and not failed(f"kl>+{0.0001 + half + 1e-6}", a, b)
    assert failed("perplexity>+0.1%", a, a) and not failed("perplexity>+0.2%", a, a)


def test_the_same_files_with_the_same_figures_have_not_changed_at_all() -> None:
    a = report(files={"onnx/model.onnx": "aa"})
    assert failed("perplexity>+0%", report(), report()) and not failed("perplexity>+0%", a, a)


def test_a_condition_without_a_setting_is_held_against_every_one() -> None:
    found = compare(report(), report())
    assert [each.figure for each in judge(parse("latency>+3%"), found)] == [
        "latency:decode batch 1 prompt 128",
        "latency:prefill batch 1 prompt 128",
    ]
    assert len(judge(parse("speedup : prefill  batch 1 < 1.1"), found)) == 1
    twelve = compare(report(), report(speed=speed(timing(), timing(batch=12))))
    assert len(judge(parse("speedup:decode batch 1<1"), twelve)) == 1


def test_units_are_those_of_the_figure() -> None:
    a = report()
    assert failed("latency>6ms", a, a) and not failed("latency>9ms", a, a)
    assert failed("peak_memory>49MB", a, a) and not failed("peak_memory>0.051GB", a, a)
    assert not failed("latency:decode>+0.2ms", a, a) and failed("size>+1B", a, report(artifact_bytes=5_002))
    assert failed("nll_change>(-0.5)", a, a) and not failed("nll_change<-0.5", a, a)  # own value, and change


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kl", "is no condition"),
        ("kl=3", "is no condition"),
        ("kl>", "is no condition"),
        ("kl>(3", "is no condition"),
        ("kl>1e999", "too large"),
        ("perplexitty>3", "neither report has 'perplexitty'. Did you mean 'perplexity'"),
        ("latency:encode>3", "neither report has 'latency:encode'"),
        ("latency:dcode>+3%", "Did you mean 'latency:decode'"),
        ("kl>3ms", "has no unit 'ms'. Allowed: none but %"),
        ("size>3ms", "has no unit 'ms'. Allowed: B, kB, MB, GB"),
        ("latency>3%", "Put . or - before a change in percent"),
        ("zero>+1%", "not above zero in A"),
    ],
)
def test_a_wrong_condition_is_refused_by_name(text: str, words: str) -> None:
    given = report(artifact_quality=quality(**metrics(), zero=metric(0.0)))
    with pytest.raises(UsageError, match=words):
        failed(text, given, given)


def test_what_is_no_number_fails_every_condition() -> None:
    broken = report(artifact_quality=quality(**{**metrics(), "kl": metric(math.nan)}))
    for text in ("kl>0.05", "kl<0.05", "kl>=0.05", "kl<=0.05"):
        assert failed(text, report(), broken), text
    given = report(artifact_quality=quality(**{**metrics(), "kl": metric(math.nan, unit="nats/token")}))
    assert failed("kl>+10", report(), given)


def test_what_was_not_measured_is_said_and_no_condition_passes_for_it() -> None:
    nothing = report(speed=None, artifact_quality=None)
    found = compare(nothing, nothing)
    assert [each.name for each in found.changes] == ["size"]
    half = compare(report(), nothing)
    assert {each.word for each in half.changes if each.name != "size"} == {"not compared"}
    with pytest.raises(UsageError, match="it was not measured"):
        failed("kl>0.05", report(), nothing)
    with pytest.raises(UsageError, match=r"change of .* is not known: not timed in both"):
        failed("latency>+3%", report(), nothing)


def test_a_figure_without_an_interval_is_said_to_have_none_and_no_verdict() -> None:
    a, b = report(), report(speed=speed(timing(), memory=60_000_000))
    memory = change(compare(a, b), "peak_memory")
    assert memory.word == "higher" and "no interval" in memory.note
    [judged] = judge(parse("peak_memory>+5%"), compare(a, b))
    assert judged.failed and judged.end == "value without an interval"


def of_kind(task: str, **changes: Any) -> Report:
    asked = Asked(task=task, is_local=True, recipe={}, profile={}, options={}, threads=1, code_digest="00")
    return report(request=asked, source_digest=task, **changes)


def test_models_of_two_kinds_are_compared_only_where_they_have_a_figure_in_common() -> None:
    images = speed(timing(1.2, phase="infer"))
    accuracy = quality("other data", accuracy=metric(0.9, 0.03, "fraction", "higher"))
    with pytest.raises(UsageError, match="kind causal-lm, B of kind image-classifier"):
        compare(of_kind("causal-lm"), of_kind("image-classifier", speed=images, artifact_quality=accuracy))
    compare(of_kind("causal-lm"), of_kind("causal-lm", speed=images, artifact_quality=accuracy))
    compare(of_kind("encoder"), of_kind("classifier"))


def test_a_note_names_few_figures_and_parts_them_by_more_than_a_comma() -> None:
    names = ("brier_change", "ece_change", "entropy_change", "kl_max", "kl_p90", "kl_p99")
    many = quality("a", **{name: metric(0.1, 0.01) for name in names})
    text = page(report(artifact_quality=many), report(artifact_quality=many.model_copy(update={"data_digest": "b"})))
    assert "Brier score, change; calibration error, change; entropy, change; KL, largest and 2 more: other data" in text


def page(before: Report, after: Report, *conditions: str) -> str:
    found = compare(before, after)
    judged = tuple(each for text in conditions for each in judge(parse(text), found))
    return page_markdown(comparison_page(found.model_copy(update={"conditions": judged})))


def test_the_page_shows_the_figures_and_the_conditions() -> None:
    b = report(artifact_bytes=5_100, artifact_quality=quality(**metrics(kl=0.008)))
    text = page(report(), b, "size>+1%", "kl>0.05")
    assert "1 condition FAILED: size&gt;+1%" in text and "B is worse at artifact size, KL" in text
    assert "| size&gt;+1% | change of artifact size | +2% | +1% | value without an interval | FAILED |" in text
    assert "0.0050 (0.0046 to 0.0054) | 0.0080 (0.0076 to 0.0084) | +0.0030 (+0.0024 to +0.0036) | worse |" in text
    assert "| artifact size | 5 kB | 5.1 kB | +2.00% | worse |" in text


def test_hostile_names_are_text_on_every_page() -> None:
    named = quality(**{HOSTILE: metric(1.0, 0.1, HOSTILE)})
    given = report(title=HOSTILE, recipe=HOSTILE, source=HOSTILE, artifact_quality=named)
    text = page(given, given)
    assert "<img" not in text and not {"\x1b", "\u202e"} & set(text)
    found = comparison_page(compare(given, report(recipe="[bold]x", artifact_quality=named)))
    stream = io.StringIO()
    print_page(found, Console(file=stream, width=200), full=True)
    assert not {"\x1b", "\u202e"} & set(stream.getvalue())
    with pytest.raises(UsageError) as error:
        judge(parse("nothing>1"), compare(given, given))
    assert not {"\x1b", "\u202e"} & set(str(error.value))


def write(folder: Path, name: str, given: Report) -> str:
    (folder / name).write_text(given.model_dump_json(), encoding="utf8")
    return str(folder / name)


def test_the_command_exits_with_3_where_a_condition_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path, "a.json", report())
    b = write(tmp_path, "b.json", report(artifact_bytes=6_000))
    assert main(["compare", a, b]) == 0
    assert "artifact size" in capsys.readouterr().out
    out = tmp_path / "change.md"
    arguments = ["compare", a, b, "--fail-if", "kl>0.05", "--fail-if", "size>+1%", "-o", str(out)]
    assert main([*arguments, "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert [each["failed"] for each in found["conditions"]] == [False, True]
    assert out.read_text().startswith("# compress compare")
    assert main(arguments) == 2 and "exists" in capsys.readouterr().err
    assert main(["compare", a, b, "--fail-if", "size>+50%", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("# compress compare")
    assert main(["compare", a, str(tmp_path / "none")]) == 2
