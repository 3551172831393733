"""docs/support.md, pass by format by target by reader, is what these tests ran.

    COMPRESS_WRITE_DOCS=1 scripts/test tests/test_support.py

writes it anew. A cell is filled only by a model that was compressed, written, read back and compared.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

import compress
from compress import hwprofiles
from compress.engine.part import Part
from compress.engine.quantizing import Quantizing
from compress.errors import CompressError
from compress.export import TARGETS, find
from compress.formats import NAMES
from compress.inputs.datasets import Calibration, calibrate
from compress.models.model import Model
from compress.passes import PASSES
from compress.passes import find as find_pass
from compress.pipeline import Pipeline
from compress.profiles import as_profile
from compress.quality import verification
from compress.target import Refusal, plan_layers
from helpers.formats import SAMPLES, name_of

DOCS = Path(__file__).resolve().parents[1] / "docs" / "support.md"
LEVEL = re.compile(r" \((?:ran|checked)\)")
WRITE = bool(os.environ.get("COMPRESS_WRITE_DOCS"))

TRIED = (
    *("int8(channel)", "int8(group=32)", "int4(group=32)", "int4(group=32, asymmetric)", "int4(group=32, signed)"),
    *("int4(group=32, float_zero)", "int3(group=32)", "int2(group=32)"),
    *("fp8_e4m3(channel)", "mxfp4", "nvfp4", "mxfp8_e4m3"),
    *("nf4(block=64)", "nf4(block=64, double)", "table(bits=3, group=32)"),
    *("codebook(vector=4, entries=16, stages=2)", "codebook(vector=4, entries=16, stages=2, out)"),
    "trellis(bits=2)",
)
UNTRIED = (
    *("int5", "int6", "int7", "fp8_e5m2", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1"),
    *("mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e5m2", "fp4"),
)
"""Other widths of what is tried, left out for their time; the page says so."""


def _untold() -> tuple[str, ...]:
    """A sample of each format that neither tuple knows: a new one gets its row without being asked for."""
    known = {*map(name_of, TRIED), *UNTRIED}
    return tuple(next(text for text in SAMPLES if name_of(text) == name) for name in NAMES if name not in known)


WEIGHTS = (*TRIED, *_untold())
BOTH = (
    ("int8(channel)", "int8(tensor, asymmetric)"),
    ("int8(channel)", "int8(token)"),
    ("int8(channel)", "static int8(tensor, asymmetric)"),
    ("fp8_e4m3(channel)", "fp8_e4m3(token)"),
    ("mxfp4", "mxfp4"),
    ("nvfp4", "static nvfp4"),
)
ROWS = (*((weight, "") for weight in WEIGHTS), *BOTH)
# tensorrt takes none of these on a CPU's profile; what it takes is in tests/data/tensorrt_rtx.json
OPENVINO = importlib.util.find_spec("openvino") is not None
READ_HERE = tuple(name for name in TARGETS if name != "tensorrt" and (OPENVINO or name != "openvino"))
METHODS = tuple(
    name for name in PASSES if issubclass(find_pass(name), Quantizing) and find_pass(name).part is Part.WEIGHT
)


@dataclass(frozen=True)
class Cell:
    """What a target made of a weight format and an input grid: its operator, and what read it back."""

    operator: str
    reader: str


Fill = Callable[[str, str, str], Cell | None]
Models = Callable[[str], Model]


@pytest.fixture(scope="module")
def models(make_llama: Callable[..., Path]) -> Models:
    """The model that a weight format is tried on: trellises take whole blocks of 128 only."""
    common = {"num_hidden_layers": 1, "intermediate_size": 128, "tie_word_embeddings": False}
    small = compress.load(make_llama("support", **common))
    wide = compress.load(make_llama("wide", hidden_size=128, num_key_value_heads=4, **common))
    return lambda weight: wide if weight.startswith("trellis") else small


@pytest.fixture(scope="module")
def data(models: Models, text_file: Path) -> Calibration:
    return calibrate(models(""), text_file, samples=8, length=32)


@pytest.fixture(scope="module")
def fill(models: Models, data: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Fill:
    """(weight, inputs, target) → the cell, None where the target refuses; each is made once."""
    ids = torch.randint(0, models("").vocabulary, (4, 128), generator=torch.Generator().manual_seed(0))
    found = hwprofiles.load("cpu-x86-avx512-vnni")
    assert found.cpu is not None
    profile = found.model_copy(update={"cpu": found.cpu.model_copy(update={"threads": 1})})

    @cache
    def made(weight: str, inputs: str) -> Model:
        return Pipeline.parse(", ".join([f"rtn(format={weight})", *_act(inputs)])).run(models(weight), data).model

    @cache
    def cell(weight: str, inputs: str, name: str) -> Cell | None:
        one, target, chosen = made(weight, inputs), find(name), as_profile(profile, name)
        answers = plan_layers(target, one.structure.layers, chosen)
        if any(isinstance(answer, Refusal) for answer in answers.values()):
            return None
        lowered = target.write(one, chosen, tmp_path_factory.mktemp("support"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(verification, "GREEDY_TOKENS", 4)  # kept beside the verdict, which they are no part of
            found = verification.verify_export(one, lowered.folder, chosen, ids, lowered.bounds)
        assert found.agrees, (weight, inputs, name)
        reader = found.runtime.rpartition(" CPU")[0] or found.runtime
        return Cell(_operator(lowered.operators), f"{_unversioned(reader)} ({found.level})")

    return cell


def _act(inputs: str) -> list[str]:
    if not inputs:
        return []
    static = ", static=true" if inputs.startswith("static ") else ""
    return [f"act_quant(format={inputs.removeprefix('static ')}{static})"]


def _operator(operators: dict[str, int]) -> str:
    """What took most layers."""
    return max(operators, key=lambda name: operators[name])


def _unversioned(reader: str) -> str:
    """Without version numbers, which change from machine to machine."""
    return " ".join(word for word in reader.split() if not word[0].isdigit())


def test_every_cell_that_is_not_refused_is_read_back_and_agrees(
    fill: Fill,
) -> None:
    for weight, inputs in ROWS:
        found = [fill(weight, inputs, name) for name in READ_HERE]
        if weight != "table(bits=3, group=32)":
            assert any(found), f"no target takes {weight} with {inputs or 'float'} inputs"


@pytest.mark.skipif(not OPENVINO, reason="OpenVINO is not installed (extra openvino): its column cannot be made")
def test_the_page_is_what_was_found(fill: Fill, models: Models, data: Calibration) -> None:
    text = _page(fill, models, data)
    if WRITE:
        DOCS.write_text(text, encoding="utf8")
    written = DOCS.read_text(encoding="utf8")
    advice = "docs/support.md is out of date: run this file with COMPRESS_WRITE_DOCS=1"
    assert LEVEL.sub("", written) == LEVEL.sub("", text), advice
    # a reader that is not installed here only leaves a cell checked that the page says ran
    pairs = zip(LEVEL.findall(text), LEVEL.findall(written), strict=True)
    assert all(found == told or (found, told) == (" (checked)", " (ran)") for found, told in pairs), advice


HEAD = """# What goes where

Made by `tests/test_support.py` from what it ran: each filled cell is a small Llama that was compressed, written, read
back by the tool in brackets, and agreed with the model in memory. An empty cell is refused by name before a run.
`ran`: the tool itself; `checked`: our own decoder of the layout, where the tool does not run here. `sparse` weights are
stored without their zeros by `native` alone; everywhere else they are written dense.

## Weights and inputs by target
"""
TAIL = f"""
Not tried here, other widths of these: {", ".join(f"`{name}`" for name in UNTRIED)}.

`autoround`, `adaquant` and `tune` refine what these made on integer grids; `smoothquant`, `awq_scale` and `rotate`
rescale before them, whatever the format.
"""


def _page(fill: Fill, models: Models, data: Calibration) -> str:
    lines = [HEAD, "| weights | inputs | " + " | ".join(f"`{name}`" for name in READ_HERE) + " |"]
    lines.append("|" + "---|" * (2 + len(READ_HERE)))
    for weight, inputs in ROWS:
        cells = [fill(weight, inputs, name) for name in READ_HERE]
        told = [f"{cell.operator}: {cell.reader}" if cell else "" for cell in cells]
        lines.append(f"| `{weight}` | {f'`{inputs}`' if inputs else 'float'} | " + " | ".join(told) + " |")
    lines += ["", "## Weights by pass", "", "| weights | " + " | ".join(f"`{name}`" for name in METHODS) + " |"]
    lines.append("|" + "---|" * (1 + len(METHODS)))
    for weight in WEIGHTS:
        found = [_runs(name, weight, models(weight), data) for name in METHODS]
        lines.append(f"| `{weight}` | " + " | ".join("yes" if each else "" for each in found) + " |")
    return "\n".join([*lines, TAIL])


def _runs(name: str, weight: str, model: Model, data: Calibration) -> bool:
    """Whether a pass takes a format; one that does must give finite weights, which the pipeline checks."""
    try:
        pipeline = Pipeline.parse(f"{name}(format={weight}, targets=[model.layers.0.mlp.*])")
    except CompressError:
        return False
    pipeline.run(model, data)
    return True
