"""The published JSON Schema of a sweep's report.json: up to date, and of one mind with the reader."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compress.records import Footprint, Interval, Timing
from compress.sweep.records import Difference, Figure, Limits, Picked, Sweep, Variant
from compress.sweep.schema import schema_text, sweep_schema

PATH = Path(__file__).resolve().parents[1] / "docs" / "sweep.schema.json"


def sweep() -> Sweep:
    interval = Interval(low=-math.inf, high=math.inf)
    timing = Timing(
        phase="decode", batch=1, prompt=16, rounds=30, baseline_s=1.0, variant_s=1.0, baseline_tokens_per_s=1.0,
        variant_tokens_per_s=1.0, speedup=math.nan, interval=interval, control=interval, verdict="same", loads=5,
        load_spread=0.01,
    )  # fmt: skip
    done = Variant(
        name="int8",
        recipe="rtn(format=int8(channel))",
        state="done",
        folder="variants/int8",
        timings=(timing,),
        footprint=Footprint(disk_bytes=1),
        figures={"size": Figure(value=1.0, low=1.0, high=1.0, unit="bytes")},
    )
    failed = Variant(name="int2", recipe="rtn", state="failed", reason="no", exit_code=4)
    return Sweep(
        title="t",
        source="s",
        source_digest="00",
        source_bytes=1,
        profile="cpu",
        target="onnx",
        created="now",
        versions={},
        seed=0,
        variants=(done, failed),
        differences=(Difference(axis="loss", first="int8", second="int2", value=0.0, interval=interval),),
        limits=Limits(loss=0.1, prefer=("size",)),
        choice=Picked(front=("int8",), recommended="int8", sentence="int8."),
    )


def test_the_published_schema_is_that_of_the_records() -> None:
    assert PATH.read_text(encoding="utf8") == schema_text(), "run scripts/write_schema"


def test_an_independent_validator_accepts_what_is_written_and_refuses_what_the_reader_refuses() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(sweep_schema())
    validator = jsonschema.Draft202012Validator(sweep_schema())
    content: dict[str, Any] = json.loads(sweep().model_dump_json())
    assert content["variants"][0]["timings"][0]["speedup"] == "NaN"
    validator.validate(content)
    wrong = (
        {**content, "seed": "x"},
        {**content, "surplus": 1},
        {**content, "kind": "run"},
        {**content, "variants": [{"name": "int8"}]},
        {key: value for key, value in content.items() if key != "choice"},
    )
    for each in wrong:
        assert not validator.is_valid(each)
        with pytest.raises(ValidationError):
            Sweep.model_validate_json(json.dumps(each))
    assert not validator.is_valid({**content, "schema_version": 2})


def test_a_report_of_one_run_is_no_sweep() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    content = json.loads(sweep().model_dump_json())
    unnamed = {key: value for key, value in content.items() if key != "kind"}
    assert not jsonschema.Draft202012Validator(sweep_schema()).is_valid(unnamed)
