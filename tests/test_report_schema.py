"""The published JSON Schema of report.json: up to date, and of one mind with the reader."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compress.records import Asked, Interval, Metric, Quality, Report
from compress.report.schema import report_schema, schema_text
from helpers.reports import report_of

ROOT = Path(__file__).resolve().parents[1]


def report(**changes: Any) -> Report:
    broken = Metric(
        value=math.nan,
        interval=Interval(low=-math.inf, high=math.inf),
        samples=1,
        unit="1",
        protocol="p",
        better="lower",
    )
    asked = Asked(
        task="causal-lm",
        is_local=True,
        recipe={"passes": "rtn", "quality": {"gates": {"kl": 0.05}}},
        profile={"id": "cpu"},
        options={"data": None, "budget_s": 20.0},
        threads=1,
        code_digest="00",
    )
    given: dict[str, Any] = {
        "calibration": {"samples": 3},
        "artifact_quality": Quality(subject="compressed", where="here", metrics={"kl": broken}, data_digest="00"),
        "request": asked,
        "files": {"onnx/model.onnx": "00"},
    }
    return report_of(**{**given, **changes})


def test_the_published_schema_is_that_of_the_records() -> None:
    path = ROOT / "docs" / "report.schema.json"
    assert path.read_text(encoding="utf8") == schema_text(), "run scripts/write_schema"


def test_an_independent_validator_accepts_what_is_written_and_refuses_what_the_reader_refuses() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = report_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    content = json.loads(report().model_dump_json())
    assert content["artifact_quality"]["metrics"]["kl"]["value"] == "NaN"
    validator.validate(content)
    wrong: tuple[dict[str, Any], ...] = (
        {**content, "seed": "x"},
        {**content, "surplus": 1},
        {**content, "verdict": None},
        {**content, "gates": [{"name": "kl"}]},
        {key: value for key, value in content.items() if key != "title"},
    )
    for each in wrong:
        assert not validator.is_valid(each)
        with pytest.raises(ValidationError):
            Report.model_validate_json(json.dumps(each))
    assert not validator.is_valid({**content, "schema_version": 2})


def test_a_report_of_before_there_were_requests_is_still_read() -> None:
    content = json.loads(report().model_dump_json())
    older = {key: value for key, value in content.items() if key not in ("request", "files")}
    found = Report.model_validate_json(json.dumps(older))
    assert found.request is None and found.files == {}
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(older, report_schema())


def test_a_request_comes_back_as_it_was_written() -> None:
    assert Report.model_validate_json(report().model_dump_json()).request == report().request
