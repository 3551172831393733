"""Passes and profiles as text: read off their fields, complete, and with examples that parse."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from compress import hwprofiles
from compress.describe import describe_pass, describe_profile, example_of, pass_settings
from compress.engine.layer_stats import LayerStats
from compress.engine.layerpass import LayerPass
from compress.layer import Layer, LayerSpec
from compress.passes import find, table
from compress.pipeline import Pipeline

ROOT = Path(__file__).resolve().parents[1]
PASSES, PROFILES = sorted(table()), sorted(hwprofiles.names())


class Side(StrEnum):
    LEFT = "left"
    RIGHT = "right"


class Own(LayerPass):
    """A pass with every kind of setting."""

    name = "own"

    ratio: float = Field(ge=0.5, lt=2, examples=[0.75])
    mode: Literal["fast", "exact"] = "fast"
    side: Side = Side.LEFT
    steps: int | Literal["auto"] = Field(default="auto", description="how often")
    weights: tuple[float, ...] = ()

    def layer(self, layer: Layer, stats: LayerStats) -> Layer:
        return layer

    def plan(self, spec: LayerSpec) -> LayerSpec:
        return spec


class Strict(Own):
    """A pass whose setting has no value to show."""

    name = "strict"

    level: int


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")


@pytest.mark.parametrize("name", PASSES)
def test_every_setting_of_a_pass_is_told_with_its_default(name: str) -> None:
    cls = find(name)
    found = pass_settings(cls)
    assert set(found) == set(cls.model_fields)
    assert list(found)[-3:] == ["targets", "ignore", "overrides"]
    lines = describe_pass(cls).splitlines()
    for setting, facts in found.items():
        assert {"type", "default"} <= facts.keys()
        row = next(line for line in lines if re.match(rf"{setting} +\w", line))
        assert facts["type"] in row
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("name", PASSES)
def test_the_example_of_a_pass_parses_to_its_defaults(name: str) -> None:
    cls = find(name)
    example = example_of(cls)
    assert f"example:  {example}" in describe_pass(cls)
    (made,) = Pipeline.parse(example).passes
    assert type(made) is cls
    assert str(made) == example
    assert made == cls()


def test_the_defaults_are_those_of_the_fields() -> None:
    found = pass_settings(find("gptq"))
    assert found["format"]["default"] == "int4(group=128)"
    assert found["damp"] == {"type": "number", "default": 0.05, "allowed": "more than 0, at most 1"}
    assert found["order"] == {"type": "string", "default": "static", "allowed": "static, given"}
    assert found["bits"] == {"type": "integer or null", "default": None}
    assert "int4" in found["format"]["allowed"]


def test_a_pass_says_what_it_needs_and_treats() -> None:
    text = describe_pass(find("gptq"))
    assert text.startswith("gptq\n\nGPTQ (Frantar et al. 2023")
    assert "needs:    hessian, so calibration data" in text
    assert "treats:   conv, expert, linear layers" in text
    assert "`targets` layer patterns" in text
    assert "needs:    no data" in describe_pass(find("rtn"))


def test_settings_of_any_kind_are_told() -> None:
    found = pass_settings(Own)
    assert found["ratio"] == {"type": "number", "allowed": "at least 0.5, less than 2"}
    assert found["mode"] == {"type": "string", "default": "fast", "allowed": "fast, exact"}
    assert found["side"] == {"type": "string", "default": "left", "allowed": "left, right"}
    assert found["steps"] == {
        "type": "integer or string", "default": "auto", "allowed": "auto", "help": "how often",
    }  # fmt: skip
    assert found["weights"] == {"type": "list of number", "default": []}
    text = describe_pass(Own)
    assert re.search(r"ratio +number +must be given +at least 0.5, less than 2", text)
    assert re.search(r"steps +integer or string +auto +auto +how often", text)


def test_an_example_is_given_where_one_can_be() -> None:
    assert example_of(Own) == "own(ratio=0.75, mode=fast, side=left, steps=auto, weights=[])"
    assert example_of(Strict) == ""
    assert "example:" not in describe_pass(Strict)


def figures(value: Any, path: str = "") -> dict[str, dict[str, Any]]:
    """Every number with a source in a profile's plain data."""
    if not isinstance(value, dict):
        return {}
    if {"value", "state", "source"} <= value.keys():
        return {path: value}
    inner = [figures(item, f"{path}.{name}".strip(".")) for name, item in value.items()]
    return {key: figure for found in inner for key, figure in found.items()}


@pytest.mark.parametrize("name", PROFILES)
def test_every_figure_of_a_profile_has_its_state_and_source(name: str) -> None:
    profile = hwprofiles.load(name)
    text = describe_profile(profile)
    flat = re.sub(r"\s+", " ", text)
    found = figures(profile.model_dump(mode="json"))
    assert len(found) >= 3
    for path, figure in found.items():
        row = next(line for line in text.splitlines() if line.startswith(f"{path} "))
        assert f"{figure['value']:g}" in row.split()
        assert figure["state"] in row.split()
        assert " ".join(figure["source"].split()[:3]) in flat


@pytest.mark.parametrize("name", PROFILES)
def test_every_format_of_a_profile_has_a_row(name: str) -> None:
    profile = hwprofiles.load(name)
    text = describe_profile(profile)
    assert text.startswith(f"{profile.name}\n")
    for runtime in profile.runtimes.values():
        for entry in runtime.formats:
            few, first, last = len(entry.bits) < 5, min(entry.bits), max(entry.bits)
            is_run = not few and set(range(first, last + 1)) == set(entry.bits)
            bits = f"{first} to {last}" if is_run else ", ".join(map(str, entry.bits))
            rows = [line for line in text.splitlines() if re.match(rf"{entry.use} +{bits}  ", line)]
            assert any(f"{entry.state} ({entry.evidence})" in row and entry.kernel in row for row in rows)


def test_identity_and_what_is_left_open_are_told() -> None:
    text = describe_profile(hwprofiles.load("cpu-x86-avx512-vnni"))
    assert re.search(r"^id +cpu-x86-avx512-vnni$", text, re.MULTILINE)
    assert re.search(r"^memory\.capacity_bytes +not set$", text, re.MULTILINE)
    assert re.search(r"^isa +avx2, .*avx512_vnni$", text, re.MULTILINE)


@pytest.mark.parametrize("width", [80, 40])
def test_a_narrow_terminal_gets_paragraphs(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = describe_profile(hwprofiles.load("cpu-x86-avx512-vnni"))
    assert max(map(len, text.splitlines())) <= width
    assert "weight_only, bits 4" in text
    assert not [line for line in text.splitlines() if line != line.rstrip()]


def test_describing_a_profile_loads_no_torch() -> None:
    code = (
        "import sys; from compress import describe, hwprofiles; "
        "describe.describe_profile(hwprofiles.load('cpu-x86-avx2')); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"
