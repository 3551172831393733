"""Recipes: what is refused, presets, and the two ways to write the same passes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compress import recipe
from compress.errors import UsageError
from compress.pipeline import Pipeline


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("passes: [rtn]\ncalibrashun: {}", "Did you mean 'calibration'"),
        ("passes: [rtn]\ncalibration: {sample: 3}", "Did you mean 'samples'"),
        ("passes: [rtn]\ncalibration: {samples: 0}", "calibration.samples"),
        ("passes: []", "missing or empty"),
        ("calibration: {}", "missing or empty"),
        ("passes: {rtn: 1}", "a list or the one-line text"),
        ("passes: [{rtn: {}, gptq: {}}]", "one name with its settings"),
        ("passes: [{rtn: 4}]", "are a mapping"),
        ("- rtn", "is a mapping with 'passes'"),
        ("passes: [rtn", "is not YAML"),
        ("passes: [rtn]\nalso: [rtn]", "'also' maps export targets to passes"),
        ("passes: [rtn]\nalso: {onnxx: [rtn]}", "Did you mean 'onnx'"),
        ("passes: [!!python/object/apply:os.system [echo]]", "is not YAML"),
    ],
)
def test_a_recipe_with_a_mistake_names_the_place(tmp_path: Path, content: str, told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        recipe.load(str(write(tmp_path / "r.yaml", content)))


def test_an_unknown_preset_offers_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'w4a16'"):
        recipe.load("w4a61")


def test_every_preset_parses_and_says_what_it_is_for() -> None:
    for name in recipe.presets():
        found = recipe.load(name)
        assert found.summary
        for target in ("", *found.also):
            text = found.for_target(target).passes
            assert str(Pipeline.parse(text)) == text


def test_a_target_gets_the_passes_that_a_recipe_has_for_it(tmp_path: Path) -> None:
    found = recipe.load(str(write(tmp_path / "r.yaml", "passes: [gptq]\nalso: {onnx: [act_quant, 'tune(steps=2)']}")))
    assert found.for_target("checkpoint").passes == "gptq"
    assert found.for_target("onnx").passes == "gptq, act_quant, tune(steps=2)"
    assert found.for_target("onnx").for_target("onnx").passes == "gptq, act_quant, tune(steps=2)"


def test_yaml_and_one_line_passes_are_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "passes:\n - gptq: {format: 'int4(group=32)', damp: 0.02}\n - act_quant")
    assert recipe.load(str(path)).passes == recipe.of_passes("gptq(format=int4(group=32), damp=0.02), act_quant").passes
