"""Image classifiers of a user's own code: opening, folding, the store, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress import load
from compress.engine import store
from compress.engine.image_stream import image_logits, open_stream
from compress.engine.layer_stats import LayerStats, Stat
from compress.errors import InputError
from compress.inputs.datasets import Calibration
from compress.inputs.images import Images
from compress.layer import Layer, LayerKind
from compress.models import fold_norms
from compress.models.model import Model, Task
from compress.models.placing import whole_module
from compress.passes.gptq import Gptq
from compress.pipeline import Pipeline


@pytest.fixture(scope="module")
def model(cnn: str) -> Model:
    return load(cnn)


def images(count: int = 7, size: int = 12) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def original(cnn: str) -> nn.Module:
    found = load(cnn).image
    assert found is not None
    return found.factory.build()


def test_convolutions_and_linear_layers_are_found_with_their_geometry(model: Model) -> None:
    layers = model.structure.layers
    assert (model.task, model.image.shape, model.image.classes) == (Task.IMAGE, (3, 12, 12), 5)  # type: ignore[union-attr]
    assert {name: (spec.kind, spec.shape, spec.kernel, spec.groups) for name, spec in layers.items()} == {
        "stem.0": (LayerKind.CONV, (8, 27), (3, 3, 3), 1),
        "depth": (LayerKind.CONV, (8, 9), (1, 3, 3), 8),
        "point": (LayerKind.CONV, (16, 8), (8, 1, 1), 1),
        "grouped": (LayerKind.CONV, (16, 36), (4, 3, 3), 4),
        "twice": (LayerKind.CONV, (16, 64), (16, 2, 2), 1),
        "head": (LayerKind.LINEAR, (5, 576), None, 1),
    }
    kinds = {name: model.structure.user_kind(spec, name) for name, spec in layers.items()}
    assert kinds == {**dict.fromkeys(layers, "conv"), "head": "head"}
    products = 8 * 27 * 144 + 8 * 9 * 36 + (16 * 8 + 16 * 36 + 16 * 64) * 36 + 5 * 576
    assert model.image.multiplications == products  # type: ignore[union-attr]


def test_normalisations_right_after_a_convolution_are_folded_and_others_stay(model: Model, cnn: str) -> None:
    folded = (("stem.0", "stem.1"), ("depth", "after_depth"), ("point", "after_point"), ("grouped", "after_grouped"))
    assert model.image is not None and model.image.folded == folded
    assert {name.split(".")[0] for name in model.structure.plain[0]} == {"kept", "last"}
    assert all(spec.has_bias for spec in model.structure.layers.values())
    assert "4 BatchNorm" in model.warnings[0] and "baseline too" in model.warnings[0]
    assert "2 BatchNorm" in model.warnings[1] and "kept" in model.warnings[1]
    with torch.no_grad():
        expected = original(cnn)(images())
    (found,) = image_logits(model, [images()])
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_folding_is_what_a_twin_that_scales_each_channel_gives() -> None:
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4, affine=True)).eval()
    for tensor in (*pair[1].parameters(), pair[1].running_mean, pair[1].running_var):
        nn.init.uniform_(tensor, 0.5, 2)
    before = [tensor.clone() for tensor in (pair[0].weight, pair[0].bias)]
    norm = pair[1]
    fold_norms.fold(pair, "0", "1")
    for channel in range(4):
        factor = norm.weight[channel] / (norm.running_var[channel] + norm.eps) ** 0.5
        assert torch.allclose(pair[0].weight[channel], before[0][channel] * factor)
        shifted = (before[1][channel] - norm.running_mean[channel]) * factor + norm.bias[channel]
        assert torch.allclose(pair[0].bias[channel], shifted)


def test_a_normalisation_whose_input_is_used_elsewhere_stays(cnn: str) -> None:
    module = original(cnn)
    calls, expected = fold_norms.record(module, images())
    pairs = fold_norms.candidates(calls)
    assert ("twice", "kept") in pairs
    kept, change = fold_norms.fold_all(module, pairs, images(), expected)
    assert ("twice", "kept") not in kept and len(kept) == len(pairs) - 1 and change <= fold_norms.TOLERANCE


def test_a_store_gives_the_same_model_back(model: Model, tmp_path: Path) -> None:
    made = Pipeline.parse("rtn(format=int4(channel))").run(model, folder=tmp_path / "store").model
    again = store.open_store(tmp_path / "store")
    assert again.digest == made.digest and again.source_digest == model.digest
    assert (
        again.structure.layers["depth"].kernel == (1, 3, 3) and again.layer(again.structure.layers["depth"]).groups == 8
    )
    first, second = (next(image_logits(each, [images()])) for each in (made, again))
    assert torch.equal(first, second)
    exact = next(image_logits(model, [images()]))
    assert 0 < float((exact - first).abs().max() / exact.abs().max()) < 0.5


def copied_store(model: Model, cnn: str, folder: Path) -> tuple[Path, Path]:
    """A store in an artifact, and the file that it names, both to be damaged."""
    code = folder / "code.py"
    shutil.copy(cnn.rpartition(":")[0], code)
    own = load(f"{code}:net")
    assert own.digest != "" and own.digest == model.digest
    Pipeline.parse("rtn(format=int8(channel))").run(own, folder=folder / "artifact" / "model")
    return folder / "artifact" / "model", code


def test_a_store_whose_file_changed_or_went_is_refused_and_nothing_is_run(
    model: Model, cnn: str, tmp_path: Path
) -> None:
    kept, code = copied_store(model, cnn, tmp_path)
    mark = tmp_path / "ran"
    code.write_text(f"open({str(mark)!r}, 'w')\n" + code.read_text())
    with pytest.raises(InputError, match="is not the file that it was"):
        store.open_store(kept)
    assert not mark.exists()
    code.unlink()
    with pytest.raises(InputError, match="Put it back"):
        store.open_store(kept)


def test_code_that_came_with_an_artifact_is_not_run(model: Model, cnn: str, tmp_path: Path) -> None:
    kept, code = copied_store(model, cnn, tmp_path)
    inside = kept.parent / "code.py"
    shutil.move(code, inside)
    info = json.loads((kept / "structure.json").read_text())
    for path, words in ((str(inside), "came with the model"), ("code.py", "came with the model")):
        info["module"]["file"] = path
        (kept / "structure.json").write_text(json.dumps(info))
        with pytest.raises(InputError, match=words):
            store.open_store(kept)
    del info["module"]["sha256"]
    (kept / "structure.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match="badly"):
        store.open_store(kept)


def test_the_stream_collects_what_enters_each_convolution(model: Model) -> None:
    batches = [images(5), images(3)]
    stream = open_stream(model, batches, reference=True)
    stream.start({})
    stream.load(0, model.layers(0), model.plain(0))
    stream.look_ahead(0)
    found = stream.collect(0, ["stem.0", "grouped", "head"], {Stat.HESSIAN, Stat.ABS_MAX})
    assert {name: stats.tokens for name, stats in found.items()} == {"stem.0": 8 * 144, "grouped": 8 * 36, "head": 8}
    patches = nn.functional.unfold(torch.cat(batches), 3, padding=1).transpose(1, 2).reshape(-1, 27)
    hessian = found["stem.0"].hessian
    assert hessian is not None and torch.allclose(hessian, patches.T @ patches / len(patches), atol=1e-4)
    assert found["grouped"].hessian.shape == (144, 144)  # type: ignore[union-attr]
    runner = stream.runner(0)
    assert torch.equal(runner.reference(0), batches[0])
    assert runner.batches == 2 and torch.equal(runner.inputs(1), batches[1])
    assert torch.allclose(runner.forward(1), runner.targets(1))
    stream.advance(0)
    for output, batch in zip(stream.logits(), batches, strict=True):
        assert torch.allclose(output, whole_module(model)(batch), atol=1e-4)
    stream.release(0)
    assert {parameter.device.type for parameter in stream.module.parameters()} == {"meta"}


def test_gptq_treats_a_grouped_convolution_group_by_group() -> None:
    maker = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 9, generator=maker)
    rows = torch.randn(300, 36, generator=maker) @ torch.randn(36, 36, generator=maker)
    whole = Layer("conv", LayerKind.CONV, weight, users=("conv",), groups=4)
    item = Gptq(format="int4(channel)", refit=0)  # type: ignore[arg-type]  # groups are not refitted
    found = item.layer(whole, LayerStats(hessian=rows.T @ rows / 300, tokens=300)).float_weight()
    for group in range(4):
        own, seen = weight[2 * group :][:2], rows[:, 9 * group :][:, :9]
        one = replace(whole, weight=own, groups=1)
        expected = item.layer(one, LayerStats(hessian=seen.T @ seen / 300, tokens=300)).float_weight()
        assert torch.equal(found[2 * group :][:2], expected)


def test_gptq_loses_less_on_convolutions_than_rounding(model: Model) -> None:
    pixels = (images(200) * 50 + 128).clamp(0, 255).to(torch.uint8)
    assert model.image is not None
    calibration = Images.of(pixels, torch.zeros(200, dtype=torch.int64), model.image.preprocess)
    lost = {}
    for name in ("rtn", "gptq"):
        pipeline = Pipeline.parse(f"{name}(format=int3(channel), ignore=[kind:head], clip=true)")
        made = pipeline.run(model, Calibration(calibration, 0, "random")).model
        inputs = calibration.batches()
        outputs = zip(image_logits(made, inputs), image_logits(model, inputs), strict=True)
        lost[name] = sum(float((changed - exact).square().sum()) for changed, exact in outputs)
    assert lost["gptq"] < 0.8 * lost["rtn"]


def test_sparsegpt_loses_less_on_convolutions_than_magnitude_and_keeps_its_zeros(model: Model) -> None:
    pixels = (images(200) * 50 + 128).clamp(0, 255).to(torch.uint8)
    assert model.image is not None
    calibration = Images.of(pixels, torch.zeros(200, dtype=torch.int64), model.image.preprocess)
    lost, zeros = [], []
    ours = "sparsegpt(ignore=[kind:head])"
    for text in ("magnitude(ignore=[kind:head])", ours, f"{ours}, gptq(format=int8(channel), ignore=[kind:head])"):
        made = Pipeline.parse(text).run(model, Calibration(calibration, 0, "random")).model
        inputs = calibration.batches()
        outputs = zip(image_logits(made, inputs), image_logits(model, inputs), strict=True)
        lost.append(sum(float((changed - exact).square().sum()) for changed, exact in outputs))
        zeros.append({name: made.layer(spec).float_weight() == 0 for name, spec in made.structure.layers.items()})
    assert lost[1] < 0.8 * lost[0]
    assert all(bool(zeros[2][name][found].all()) for name, found in zeros[1].items())
    assert int(zeros[1]["grouped"].sum()) == 16 * 36 // 2


def test_a_model_that_puts_out_nan_stops_the_walk(model: Model) -> None:
    stream = open_stream(model, [images()])
    layers = model.layers(0)
    layers["head"] = replace(layers["head"], bias=torch.full((5,), torch.nan))
    stream.load(0, layers, model.plain(0))
    with pytest.raises(InputError, match="NaN"):
        stream.advance(0)


def test_resnet20_keeps_its_accuracy_when_its_normalisations_are_folded(assets: Path) -> None:
    from compress.inputs.datasets import quality_windows

    model = load(f"{assets / 'cifar10' / 'resnet_cifar.py'}:resnet20")
    assert model.image is not None and len(model.image.folded) == 19 and not model.structure.plain[0]
    data = quality_windows(model, assets / "cifar10" / "cifar10_test_exact_even.npz")
    assert isinstance(data, Images)
    right = torch.cat([logits.argmax(-1) for logits in image_logits(model, data.batches())]) == data.labels
    assert (int(right.sum()), len(data)) == (350, 381)
