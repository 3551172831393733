"""Tuning the whole model: closer to the original, codes held unless asked, and written as it was trained."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import compress
from compress.errors import UsageError
from compress.formats.base import QuantTensor
from compress.inputs.datasets import Calibration, calibrate
from compress.inputs.windows import Windows
from compress.layer import ActSpec
from compress.models.model import Model
from compress.passes.act_quant import ActQuant
from compress.pipeline import Pipeline, Result
from compress.training.soft import SoftInput
from helpers.divergence import kl_between

START = "rtn(format=int3(group=32))"


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    return compress.load(llama)


@pytest.fixture(scope="module")
def calibration(model: Model, text_file: Path) -> Calibration:
    return calibrate(model, text_file, samples=96, length=64)


@pytest.fixture(scope="module")
def tuned(model: Model, calibration: Calibration) -> Result:
    return Pipeline.parse(f"{START}, tune(steps=25, lr=0.01)").run(model, calibration)


def test_the_tuned_model_is_nearer_to_the_original_on_windows_it_did_not_see(
    model: Model, calibration: Calibration, tuned: Result
) -> None:
    ids = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(5))
    before = Pipeline.parse(START).run(model)
    assert kl_between(model, tuned.model, ids) < 0.95 * kl_between(model, before.model, ids)
    assert all("tuned with the whole model" in row.notes[0] for row in tuned.passes[1].layers if row.changed)


def test_codes_are_held_and_scales_and_norms_move(model: Model, tuned: Result) -> None:
    before = Pipeline.parse(START).run(model)
    name = "model.layers.1.mlp.up_proj"
    first = before.model.layer(before.model.structure.layers[name]).weight
    second = tuned.model.layer(tuned.model.structure.layers[name]).weight
    assert isinstance(first, QuantTensor) and isinstance(second, QuantTensor)
    assert torch.equal(first.tensors["codes"], second.tensors["codes"])
    assert not torch.equal(first.tensors["scale"], second.tensors["scale"])
    norm = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(tuned.model.plain(1)[norm], model.plain(1)[norm])
    assert tuned.model.plain(1)[norm].dtype == torch.float32


def test_static_input_grids_are_trained_with_the_rest(model: Model, calibration: Calibration) -> None:
    start = "rtn(format=int4(channel)), act_quant(static=true, format=int4(tensor, asymmetric))"
    before = Pipeline.parse(start).run(model, calibration)
    after = Pipeline.parse(f"{start}, tune(steps=10, parts=[inputs, scales], lr=0.02)").run(model, calibration)
    name = "model.layers.0.mlp.down_proj"
    first = before.model.layer(before.model.structure.layers[name]).act
    second = after.model.layer(after.model.structure.layers[name]).act
    assert first is not None and second is not None and first.params is not None and second.params is not None
    assert not torch.equal(first.params["scale"], second.params["scale"])


def test_a_soft_input_grid_rounds_as_the_stored_one_does_and_passes_gradients(calibration: Calibration) -> None:
    values = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    form = ActQuant(format="int4(tensor, asymmetric)").format
    params = form.fit_activation(torch.tensor(-1.0), torch.tensor(1.5))  # type: ignore[attr-defined]
    soft = SoftInput(ActSpec(form, True, params))
    torch.testing.assert_close(soft.round(values), ActSpec(form, True, params).round(values))
    soft.log_scale.requires_grad_(True)
    inputs = values.clone().requires_grad_(True)
    (soft.round(inputs) ** 2).sum().backward()
    assert soft.log_scale.grad is not None and float(soft.log_scale.grad.abs()) > 0
    assert inputs.grad is not None and float(inputs.grad[values < -1.2].abs().sum()) == 0


def test_an_encoder_is_tuned_on_its_hidden_states(save_random: Callable[..., Path]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = save_random("bert", transformers.BertConfig(vocab_size=256, **sizes), "AutoModel")
    ids = torch.randint(0, 256, (64, 32), generator=torch.Generator().manual_seed(0))
    data = Calibration(Windows(ids, tuple(range(64)), "random", "random"), 0, "random")
    result = Pipeline.parse(f"{START}, tune(steps=8)").run(compress.load(folder), data)
    note = next(row.notes[0] for row in result.passes[1].layers if row.changed)
    before, after = (float(word) for word in note.split("loss ")[1].split(",")[0].split(" → "))
    assert after < before


def test_the_same_seed_gives_the_same_bytes(model: Model, calibration: Calibration) -> None:
    texts = [f"{START}, tune(steps=3)"] * 2
    first, second = (Pipeline.parse(text).run(model, calibration).model.digest for text in texts)
    assert first == second


def test_what_there_is_nothing_of_to_train_is_said(model: Model, calibration: Calibration) -> None:
    with pytest.raises(UsageError, match="nothing of biases to train"):
        Pipeline.parse(f"{START}, tune(parts=[biases])").run(model, calibration)
    with pytest.raises(UsageError, match="must come after"):
        Pipeline.parse("tune").resolve(model)
