"""AdaQuant: layer by layer nearer to the float model, on classifiers and on language models."""

from pathlib import Path

import pytest
import torch

import compress
from compress.engine.image_stream import image_logits
from compress.errors import UsageError
from compress.inputs.datasets import Calibration, calibrate
from compress.models.model import Model
from compress.pipeline import Pipeline, Result

CNN_START = "rtn(format=int4(channel)), act_quant(static=true, format=int4(tensor, asymmetric))"
LLM_START = "rtn(format=int3(group=32))"


@pytest.fixture(scope="module")
def classifier(cnn: str) -> Model:
    return compress.load(cnn)


@pytest.fixture(scope="module")
def images(classifier: Model, images_file: Path) -> Calibration:
    return calibrate(classifier, images_file, samples=64)


def run(text: str, model: Model, data: Calibration) -> Result:
    return Pipeline.parse(text).run(model, data)


def losses(result: Result) -> list[tuple[float, float]]:
    """Held-out loss before and after, per changed layer."""
    notes = [note for row in result.passes[-1].layers if row.changed for note in row.notes]
    pairs = [note.split("loss ")[1].split(",")[0].split(" → ") for note in notes]
    return [(float(before), float(after)) for before, after in pairs]


def test_every_layer_ends_no_worse_on_held_out_images_and_the_logits_come_nearer(
    classifier: Model, images: Calibration
) -> None:
    learning = "adaquant(steps=60, lr=0.03, lr_scale=0.01, lr_bias=0.01)"
    before, after = run(CNN_START, classifier, images), run(f"{CNN_START}, {learning}", classifier, images)
    found = losses(after)
    assert len(found) == len([row for row in before.passes[0].layers if row.changed])
    assert all(second <= first for first, second in found) and any(second < 0.9 * first for first, second in found)
    batches = images.batches()
    wanted = torch.cat(list(image_logits(classifier, batches)))
    errors = [(torch.cat(list(image_logits(each.model, batches))) - wanted).square().mean() for each in (before, after)]
    assert errors[1] < errors[0]


def test_static_input_grids_and_biases_are_learned_and_stored(classifier: Model, images: Calibration) -> None:
    before, after = run(CNN_START, classifier, images), run(f"{CNN_START}, adaquant(steps=10)", classifier, images)
    moved = 0
    for name, spec in after.model.structure.layers.items():
        first, second = before.model.layer(before.model.structure.layers[name]), after.model.layer(spec)
        assert spec.has_bias and second.bias is not None
        assert first.act is not None and second.act is not None and first.act.params and second.act.params
        moved += not torch.equal(first.act.params["scale"], second.act.params["scale"])
    assert moved


def test_layers_without_a_bias_stay_so_where_biases_are_not_learned(llama: Path, text_file: Path) -> None:
    model = compress.load(llama)
    data = calibrate(model, text_file, samples=16, length=32)
    result = run(f"{LLM_START}, adaquant(steps=2, bias=false)", model, data)
    assert not any(spec.has_bias for spec in result.model.structure.layers.values())


def test_a_language_model_is_treated_block_by_block(llama: Path, text_file: Path) -> None:
    model = compress.load(llama)
    data = calibrate(model, text_file, samples=64, length=32)
    found = losses(run(f"{LLM_START}, adaquant(steps=30)", model, data))
    assert len(found) == 21 and sum(second for _, second in found) < 0.9 * sum(first for first, _ in found)


def test_the_same_seed_gives_the_same_bytes(classifier: Model, images: Calibration) -> None:
    text = f"{CNN_START}, adaquant(steps=3, seed=1)"
    assert run(text, classifier, images).model.digest == run(text, classifier, images).model.digest


def test_it_is_refused_where_there_is_no_integer_grid(classifier: Model) -> None:
    with pytest.raises(UsageError, match="must come after a pass that sets the weight"):
        Pipeline.parse("adaquant").resolve(classifier)
