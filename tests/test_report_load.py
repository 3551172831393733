"""Reading a report back: what was written is found again, what is malformed is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from compress.errors import InputError, UsageError
from compress.records import Interval, Metric, Quality, Report
from compress.report import load, to_markdown
from helpers.reports import report_of, speed_of, timing_of


def report() -> Report:
    timing = timing_of(1.0, phase="encode", prompt=1, rounds=30, verdict="same")
    return report_of(source_digest="sha256:00", speed=speed_of(timing), verdict="as fast as the baseline.")


def test_a_written_report_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(report().model_dump_json(), encoding="utf-8")
    assert load(tmp_path / "report.json") == report()
    assert load(tmp_path) == report()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_figure_that_is_no_number_is_read_back(tmp_path: Path, value: float) -> None:
    interval = Interval(low=20.0, high=value)
    broken = Metric(value=value, interval=interval, samples=8, unit="1", protocol="ppl/disjoint-512", better="lower")
    quality = Quality(subject="compressed", where="onnxruntime", metrics={"perplexity": broken}, data_digest="00")
    written = report().model_copy(update={"artifact_quality": quality})
    (tmp_path / "report.json").write_text(written.model_dump_json(indent=1), encoding="utf-8")
    found = load(tmp_path)
    assert found.artifact_quality
    metric = found.artifact_quality.metrics["perplexity"]
    assert metric.interval
    for number in (metric.value, metric.interval.high):
        assert number == value or (math.isnan(number) and math.isnan(value))
    assert to_markdown(found) == to_markdown(written)
    assert math.isnan(value) or found == written


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON: .* at line 1, column 2"),
        ("[" * 100_000, "not JSON"),
        ("\udcff".encode("utf-8", "surrogateescape").decode("latin-1"), "not JSON"),
        ("[]", "found a JSON list"),
        ("{}", "schema_version found: none; allowed: 1"),
        ('{"schema_version": 99}', "schema_version found: 99; allowed: 1.*newer release"),
        ('{"schema_version": true}', "schema_version found: True; allowed: 1"),
        ('{"schema_version": "1"}', "schema_version found: '1'; allowed: 1"),
        ('{"schema_version": 1}', "title: Field required.* more"),
    ],
)
def test_a_malformed_report_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "broken.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"broken.json: .*{words}"):
        load(file)


def test_a_wrong_value_in_a_report_is_shown(tmp_path: Path) -> None:
    content = json.loads(report().model_dump_json())
    content["speed"]["timings"][0]["verdict"] = "fastest"
    (tmp_path / "report.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=r"speed\.timings\.0\.verdict: .*'faster'.*found 'fastest'"):
        load(tmp_path)


def test_a_report_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no report at .*nothing\.json"):
        load(tmp_path / "nothing.json")
