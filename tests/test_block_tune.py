"""The pass `block_tune`: blocks come nearer to what they should put out, and only what is named moves."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import compress
from compress.errors import UsageError
from compress.formats.base import QuantTensor
from compress.inputs.datasets import Calibration, calibrate
from compress.layer import Layer
from compress.models.model import Model
from compress.pipeline import Pipeline, Result, planned
from helpers.divergence import kl_between

START = "rtn(format=codebook(vector=4, entries=256, stages=1))"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def model(two_blocks: Path) -> Model:
    return compress.load(two_blocks)


@pytest.fixture(scope="module")
def calibration(model: Model, text_file: Path) -> Calibration:
    return calibrate(model, text_file, samples=64, length=32)


def run(model: Model, calibration: Calibration, text: str) -> Result:
    return Pipeline.parse(text).run(model, calibration)


@pytest.fixture(scope="module")
def before(model: Model, calibration: Calibration) -> Result:
    return run(model, calibration, START)


@pytest.fixture(scope="module")
def tuned(model: Model, calibration: Calibration) -> Result:
    return run(model, calibration, f"{START}, block_tune(steps=25, batch=1, lr=0.01)")


def layer(result: Result, name: str = "model.layers.1.mlp.up_proj") -> Layer:
    return result.model.layer(result.model.structure.layers[name])


def tensors(result: Result) -> dict[str, Tensor]:
    weight = layer(result).weight
    assert isinstance(weight, QuantTensor)
    return weight.tensors


def test_the_model_comes_nearer_to_the_original_on_text_it_did_not_see(
    model: Model, before: Result, tuned: Result, text_file: Path
) -> None:
    other = torch.cat(list(calibrate(model, text_file, samples=64, length=32, seed=9).batches()))[:16]
    assert kl_between(model, tuned.model, other) < 0.7 * kl_between(model, before.model, other)
    assert all("tuned with its block: training loss" in row.notes[0] for row in tuned.passes[1].layers if row.changed)


def test_codes_are_held_and_entries_scales_and_norms_move(before: Result, tuned: Result) -> None:
    first, second = tensors(before), tensors(tuned)
    assert torch.equal(first["codes"], second["codes"])
    assert not torch.equal(first["codebook"], second["codebook"]) and not torch.equal(first["scale"], second["scale"])
    norms = [result.model.plain(result.model.structure.segments[2])[NORM] for result in (before, tuned)]
    assert not torch.equal(norms[0], norms[1])


def test_the_same_seed_gives_the_same_bytes(model: Model, calibration: Calibration) -> None:
    text = f"{START}, block_tune(steps=3)"
    first, second = (tensors(run(model, calibration, text)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_what_is_named_is_trained(model: Model, calibration: Calibration, before: Result) -> None:
    found = run(model, calibration, f"{START}, block_tune(steps=3, parts=[norms])")
    assert all(torch.equal(tensors(before)[name], tensors(found)[name]) for name in tensors(before))
    assert not any(row.changed for row in found.passes[1].layers)
    norms = [result.model.plain(result.model.structure.segments[2])[NORM] for result in (before, found)]
    assert not torch.equal(norms[0], norms[1])


def test_a_layer_without_what_is_trained_is_refused_before_any_work(model: Model) -> None:
    mixed = "rtn(format=fp8_e4m3(channel), targets=[*layers.1.*]), rtn(format=codebook, ignore=[*layers.1.*])"
    with pytest.raises(UsageError, match=r"layers\.1\.\S+ \(fp8_e4m3\(channel\)\) has nothing of codebooks to train"):
        planned(Pipeline.parse(f"{mixed}, block_tune(parts=[codebooks])").resolve(model))
    planned(Pipeline.parse(f"{mixed}, block_tune").resolve(model))


def test_running_means_that_a_model_keeps_are_no_part_of_what_is_trained(cnn: str, images_file: Path) -> None:
    model = compress.load(cnn)
    calibration = calibrate(model, images_file, samples=16)
    found = Pipeline.parse("rtn(format=int4(channel)), block_tune(steps=2, batch=1)").run(model, calibration)
    assert any("tuned with its block" in " ".join(row.notes) for row in found.passes[1].layers)


def test_it_comes_after_a_pass_that_quantizes(model: Model, calibration: Calibration) -> None:
    with pytest.raises(UsageError, match="block_tune must come after a pass that sets the weight format"):
        run(model, calibration, "block_tune")


def test_the_scales_of_a_trellis_are_trained_and_its_codes_held(model: Model, calibration: Calibration) -> None:
    text = "rtn(format=trellis(bits=2, block=32))"
    first, second = (tensors(run(model, calibration, text + more)) for more in ("", ", block_tune(steps=25, batch=1)"))
    assert torch.equal(first["trellis"], second["trellis"])
    assert not torch.equal(first["suh"], second["suh"]) and not torch.equal(first["svh"], second["svh"])
