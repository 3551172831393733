"""Bias correction: channel means of what the layers put out, before and after."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import compress
from compress.errors import UsageError
from compress.inputs.datasets import Calibration, calibrate
from compress.models.model import Model
from compress.models.placing import whole_module
from compress.pipeline import Pipeline

ROUNDED = "rtn(format=int3(channel)), act_quant(static=true, format=int4(tensor, asymmetric))"


@pytest.fixture(scope="module")
def model(cnn: str) -> Model:
    return compress.load(cnn)


@pytest.fixture(scope="module")
def calibration(model: Model, images_file: Path) -> Calibration:
    return calibrate(model, images_file, samples=64)


def outputs(model: Model, calibration: Calibration) -> dict[str, torch.Tensor]:
    """Mean output of every layer, one image batch after the other, by nothing but torch."""
    module, found = whole_module(model), {}
    for name in model.structure.layers:
        seen: list[torch.Tensor] = []
        child = module.get_submodule(name)
        handle = child.register_forward_hook(lambda _m, _i, output, seen=seen: seen.append(output.detach()))
        with torch.no_grad():
            for images in calibration.batches():
                module(images)
        handle.remove()
        whole = torch.cat(seen)
        found[name] = whole.mean((0, 2, 3)) if whole.ndim == 4 else whole.mean(0)
    return found


def test_every_layer_puts_out_the_mean_of_the_original(model: Model, calibration: Calibration) -> None:
    wanted = outputs(model, calibration)
    before = outputs(Pipeline.parse(ROUNDED).run(model, calibration).model, calibration)
    made = Pipeline.parse(f"{ROUNDED}, bias_correct").run(model, calibration)
    after = outputs(made.model, calibration)
    for name, mean in wanted.items():
        assert float((before[name] - mean).abs().max()) > 1e-3, name
        assert torch.allclose(after[name], mean, atol=1e-4), name
    assert all("mean output was off by" in row.notes[0] for row in made.passes[-1].layers if row.changed)


def test_weights_and_inputs_stay_as_they_were(model: Model, calibration: Calibration) -> None:
    first = Pipeline.parse(ROUNDED).run(model, calibration).model
    second = Pipeline.parse(f"{ROUNDED}, bias_correct").run(model, calibration).model
    for name, spec in second.structure.layers.items():
        old, new = first.layer(first.structure.layers[name]), second.layer(spec)
        assert torch.equal(old.float_weight(), new.float_weight()) and old.act == new.act
        assert old.bias is not None and new.bias is not None and old.bias.dtype == new.bias.dtype


def test_blocks_are_corrected_against_the_uncompressed_prefix(make_llama: Callable[..., Path], text_file: Path) -> None:
    source = compress.load(make_llama("biased", num_hidden_layers=2, attention_bias=True))
    data = calibrate(source, text_file, samples=8, length=64)
    made = Pipeline.parse("rtn(format=int3(channel)), bias_correct").run(source, data)
    rows = {row.layer: row for row in made.passes[-1].layers}
    assert rows["model.layers.1.self_attn.q_proj"].changed
    assert rows["model.layers.1.mlp.up_proj"].reason == "it has no bias; add=true gives it one"
    plain = Pipeline.parse("rtn(format=int3(channel))").run(source, data).model
    errors = []
    for one in (source, plain, made.model):
        module = whole_module(one)
        seen: list[torch.Tensor] = []
        child = module.get_submodule("model.layers.1.self_attn.o_proj")
        handle = child.register_forward_hook(lambda _m, _i, output, seen=seen: seen.append(output))
        with torch.no_grad():
            for batch in data.batches():
                module(input_ids=batch)
        handle.remove()
        errors.append(torch.cat(seen).mean((0, 1)))
    assert float((errors[2] - errors[0]).abs().max()) < 1e-4 < 1e-3 < float((errors[1] - errors[0]).abs().max())


def test_a_layer_without_a_bias_gets_one_where_that_is_asked_for(llama: Path, text_file: Path) -> None:
    model = compress.load(llama)
    data = calibrate(model, text_file, samples=8, length=64)
    made = Pipeline.parse("rtn(format=int3(channel)), bias_correct(add=true, targets=[*.down_proj])").run(model, data)
    for name, spec in made.model.structure.layers.items():
        assert spec.has_bias is name.endswith("down_proj")
        if spec.has_bias:
            bias = made.model.layer(spec).bias
            assert bias is not None and float(bias.abs().max()) > 0


def test_there_is_nothing_to_correct_before_weights_are_rounded(model: Model, calibration: Calibration) -> None:
    with pytest.raises(UsageError, match="bias_correct"):
        Pipeline.parse("bias_correct").run(model, calibration)
