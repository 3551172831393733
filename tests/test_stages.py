"""Whole-model passes stand between streamed stages, each stage starting from what the one before wrote."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import compress
from compress.collect import LayerStats
from compress.data import Calibration, calibrate
from compress.errors import Interrupted
from compress.layer import LayerSpec
from compress.layerpass import Pass
from compress.model import Model
from compress.modelpass import ModelPass, Stage
from compress.passes import Gptq, Rtn
from compress.pipeline import Pipeline
from compress.stages import cut
from compress.workspace import Journal


class Double(ModelPass):
    """Doubles every chosen weight."""

    name: ClassVar[str] = "double"
    part: ClassVar[str] = ""

    def plan(self, spec: LayerSpec) -> LayerSpec:
        return spec

    def apply(self, stage: Stage) -> None:
        model = stage.model
        for segment in model.structure.segments:
            layers = model.layers(segment)
            for name in layers.keys() & stage.chosen.keys():
                layers[name] = layers[name].with_weight(layers[name].float_weight() * 2)
            stage.write(segment, layers, model.plain(segment))
        stage.config["note"] = "doubled"


class Stop(Double):
    """Is interrupted before it does anything."""

    name: ClassVar[str] = "stop"

    def apply(self, stage: Stage) -> None:
        raise Interrupted("stopped here")


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    return compress.load(llama)


@pytest.fixture(scope="module")
def calibration(model: Model, text_file: Path) -> Calibration:
    return calibrate(model, text_file, samples=4, length=32)


def test_neighbouring_layer_passes_walk_together_and_a_whole_model_pass_alone() -> None:
    passes: Sequence[Pass] = [Rtn(), Gptq(), Double(), Double(), Rtn()]
    assert cut(passes) == [[0, 1], [2], [3], [4]]


def test_a_stage_starts_from_what_the_one_before_wrote(model: Model, tmp_path: Path) -> None:
    rtn = Rtn(bits=8, group_size=32)
    result = Pipeline(Double(), rtn).run(model, folder=tmp_path / "model")
    name = "model.layers.0.mlp.up_proj"
    doubled = replace(model.layer(model.structure.layers[name]), weight=2 * weight(model, name))
    expected = rtn.layer(doubled, LayerStats())
    assert torch.equal(weight(result.model, name), expected.float_weight())
    assert [row.changed for row in result.passes[0].layers if row.layer == name] == [True]
    assert json.loads((tmp_path / "model" / "config.json").read_text())["note"] == "doubled"
    assert not list((tmp_path / "model").glob("stage-*"))
    assert result.model.source_digest == model.digest


def test_a_stage_that_is_done_is_not_repeated_after_a_stop(
    model: Model, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gptq = Gptq(format="int4(group=32)")
    clean = Pipeline(gptq, Double()).run(model, calibration, folder=tmp_path / "clean")
    journal = Journal(tmp_path / "journal")
    with pytest.raises(Interrupted):
        Pipeline(gptq, Stop()).run(model, calibration, folder=tmp_path / "again", journal=journal)
    monkeypatch.setattr(Gptq, "layer", None)
    resumed = Pipeline(gptq, Double())
    result = resumed.run(model, calibration, folder=tmp_path / "again", journal=Journal(tmp_path / "journal"))
    assert result.model.digest == clean.model.digest
    assert [len(item.layers) for item in result.passes] == [len(item.layers) for item in clean.passes]


def weight(model: Model, name: str) -> torch.Tensor:
    return model.layer(model.structure.layers[name]).float_weight()
