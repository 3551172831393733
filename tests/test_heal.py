"""Healing: what pruning lost comes back in part, what it took away stays zero, and later errors start from it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import compress
from compress.engine.image_stream import image_logits
from compress.engine.journal import Journal
from compress.engine.training_cost import saved_bytes
from compress.errors import Interrupted, UsageError
from compress.inputs.batches import Batches
from compress.inputs.datasets import Calibration, Samples, split
from compress.inputs.images import Images
from compress.inputs.windows import Windows
from compress.layer import Layer, LayerKind
from compress.models.model import Model, Task
from compress.models.user_module import Preprocess
from compress.pipeline import Pipeline, Result
from compress.progress import Progress
from compress.training.checkpoint import STATE
from compress.training.objective import divergence, hidden_error
from compress.training.plain import FullWeight, LowRank
from helpers.divergence import kl_between

PRUNED = "magnitude(sparsity=0.5)"
HEALED = f"{PRUNED}, heal(tokens=20480)"
NAME = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    return compress.load(llama)


@pytest.fixture(scope="module")
def data(model: Model, text_file: Path) -> tuple[Calibration, Samples]:
    return split(model, text_file, samples=8, quality_samples=8, length=64, seed=0, rest=True)


@pytest.fixture(scope="module")
def calibration(data: tuple[Calibration, Samples]) -> Calibration:
    return data[0]


@pytest.fixture(scope="module")
def pruned(model: Model) -> Result:
    return Pipeline.parse(PRUNED).run(model)


@pytest.fixture(scope="module")
def healed(model: Model, calibration: Calibration) -> Result:
    return Pipeline.parse(HEALED).run(model, calibration)


def weight(model: Model, name: str = NAME) -> Tensor:
    return model.layer(model.structure.layers[name]).float_weight()


def test_a_pruned_model_comes_nearer_to_the_original_on_text_it_did_not_see(
    model: Model, data: tuple[Calibration, Samples], pruned: Result, healed: Result
) -> None:
    assert isinstance(data[1], Windows)
    ids = data[1].ids
    assert kl_between(model, healed.model, ids) < 0.7 * kl_between(model, pruned.model, ids)
    note = next(row.notes[0] for row in healed.passes[1].layers if row.changed)
    assert "tokens of data that calibration left over" in note and "% regained" in note


@pytest.mark.parametrize("mode", ["full", "lora, rank=2"])
def test_what_was_pruned_stays_zero_and_the_rest_is_trained(
    model: Model, calibration: Calibration, pruned: Result, mode: str
) -> None:
    result = Pipeline.parse(f"{PRUNED}, heal(mode={mode}, tokens=2048)").run(model, calibration)
    before, after = weight(pruned.model), weight(result.model)
    assert torch.equal(before == 0, after == 0) and not torch.equal(before, after)
    norm = "model.layers.1.input_layernorm.weight"
    assert not torch.equal(result.model.plain(1)[norm], model.plain(1)[norm])
    embedding = "model.embed_tokens"
    assert torch.equal(weight(result.model, embedding), weight(model, embedding))
    trained = [row for row in result.passes[1].layers if row.changed]
    assert len(trained) == 21 and all(row.error_after == 0 for row in trained)


def test_it_may_come_again_and_pruning_too_until_weights_have_a_format(model: Model, calibration: Calibration) -> None:
    text = "magnitude(sparsity=0.3), heal(tokens=2048), magnitude(sparsity=0.6), heal(tokens=2048), rtn(bits=8)"
    result = Pipeline.parse(text).run(model, calibration)
    assert float((weight(result.model) == 0).float().mean()) == pytest.approx(0.6, abs=0.001)
    with pytest.raises(UsageError, match="both set the weight values"):
        Pipeline.parse("magnitude(sparsity=0.3), magnitude(sparsity=0.6)").resolve(model)
    with pytest.raises(UsageError, match="heal must come before rtn, which sets the weight format"):
        Pipeline.parse(f"{PRUNED}, rtn(bits=8), heal").resolve(model)
    with pytest.raises(UsageError, match="must come before magnitude"):
        Pipeline.parse(f"{PRUNED}, heal, rotate").resolve(model)


def test_later_errors_are_taken_against_what_healing_made(model: Model, calibration: Calibration) -> None:
    short = f"{PRUNED}, heal(tokens=2048)"
    start = weight(Pipeline.parse(short).run(model, calibration).model)
    made = Pipeline.parse(f"{short}, magnitude(sparsity=0.6), rtn(format=int8(channel)), tune(steps=1)")
    result = made.run(model, calibration)  # in three stages, so the healed weights are kept for the last
    row, now = next(row for row in result.passes[4].layers if row.layer == NAME), weight(result.model)
    assert row.error_after == pytest.approx(float((now - start).square().sum() / start.square().sum()), rel=1e-3)


def test_a_tied_weight_stays_tied_and_is_trained_where_targets_name_a_user(
    model: Model, calibration: Calibration
) -> None:
    result = Pipeline.parse("heal(targets=[kind:head], tokens=2048, hidden=0.1)").run(model, calibration)
    assert result.model.structure.layers.keys() == model.structure.layers.keys() and not result.untied
    assert [row.layer for row in result.passes[0].layers if row.changed] == ["model.embed_tokens"]


def test_weights_come_back_in_the_type_of_the_source(make_llama: Callable[..., Path], calibration: Calibration) -> None:
    source = compress.load(make_llama("bfloat16-llama", dtype="bfloat16"))
    result = Pipeline.parse(f"{PRUNED}, heal(tokens=2048)").run(source, calibration)
    assert result.model.layer(result.model.structure.layers[NAME]).weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert {tensor.dtype for tensor in result.model.plain(1).values()} == {torch.bfloat16}


def test_a_model_that_lost_a_block_is_healed_by_the_blocks_that_its_own_were(
    model: Model, data: tuple[Calibration, Samples]
) -> None:
    assert isinstance(data[1], Windows)
    dropped = Pipeline.parse("drop_blocks(blocks=[1])").run(model)
    result = Pipeline.parse("drop_blocks(blocks=[1]), heal(tokens=16000), rtn(bits=8)").run(model, data[0])
    assert result.model.origins == (0, 2)
    assert kl_between(model, result.model, data[1].ids) < 0.9 * kl_between(model, dropped.model, data[1].ids)


def test_an_encoder_is_healed_on_its_hidden_states(save_random: Callable[..., Path]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = save_random("bert", transformers.BertConfig(vocab_size=256, **sizes), "AutoModel")
    ids = torch.randint(0, 256, (64, 32), generator=torch.Generator().manual_seed(0))
    data = Calibration(Windows(ids, tuple(range(64)), "random", "random"), 0, "random")
    result = Pipeline.parse(f"{PRUNED}, heal(tokens=20000, hidden=0.1)").run(compress.load(folder), data)
    note = next(row.notes[0] for row in result.passes[1].layers if row.changed)
    before, after = (float(word) for word in note.split("original ")[1].split(",")[0].split(" → "))
    assert after < before and "of the calibration data" in note


def test_an_image_classifier_is_healed_on_images_without_their_labels(cnn: str, images_file: Path) -> None:
    source = compress.load(cnn)
    calibration, unseen = split(source, images_file, samples=16, quality_samples=None, length=0, seed=0, rest=True)
    assert isinstance(unseen, Images) and isinstance(calibration.rest, Images) and len(calibration.rest) == 48
    made = {text: Pipeline.parse(text).run(source, calibration) for text in (PRUNED, f"{PRUNED}, heal(tokens=640)")}
    exact = torch.cat(list(image_logits(source, unseen.batches())))
    first, second = (torch.cat(list(image_logits(each.model, unseen.batches()))) for each in made.values())
    assert divergence(Task.IMAGE, exact, second) < 0.9 * divergence(Task.IMAGE, exact, first)
    assert "healed on 640 images of data that calibration left over (48 there are)" in str(made)
    with pytest.raises(UsageError, match="an image model has no like blocks"):
        Pipeline.parse("heal(hidden=1, tokens=32)").resolve(source)


def test_the_update_of_low_rank_is_what_is_folded(model: Model) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 8, generator=generator).half()
    mask = torch.rand(6, 8, generator=generator) > 0.5
    layer = Layer("layer", LayerKind.LINEAR, values * mask, users=("layer",))
    soft = LowRank(layer, mask, 3, generator)
    assert torch.equal(soft.weight(), layer.float_weight())  # nothing is changed before it is trained
    soft.up += torch.randn(6, 3, generator=generator)
    twin = torch.zeros(6, 8)
    for row, column in mask.nonzero().tolist():
        change = sum(float(soft.up[row, k] * soft.down[k, column]) for k in range(3)) * soft.factor
        twin[row, column] = float(values[row, column]) + change
    torch.testing.assert_close(soft.weight(), twin)
    stored = soft.store()
    assert stored.dtype == torch.float16 and torch.equal(soft.weight(), stored.float())
    full = FullWeight(layer, mask)
    full.master += 1
    project = full.group(0.1).project
    assert project is not None
    project()
    assert torch.equal(full.weight() != 0, mask)


def test_the_losses_are_what_they_are_by_hand() -> None:
    wanted, found = (torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    p, q = (wanted / 2).softmax(-1), (found / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(divergence(Task.CAUSAL_LM, wanted, found, 2.0), expected)
    shares = [
        float((a - b).square().sum() / a.square().sum())
        for a, b in zip(wanted.view(-1, 5), found.view(-1, 5), strict=True)
    ]
    assert float(hidden_error([wanted, wanted], [found, wanted])) == pytest.approx(sum(shares) / 6 / 2)


def test_a_run_that_the_user_stops_loses_no_step_and_ends_in_the_same_bytes(
    model: Model, calibration: Calibration, tmp_path: Path
) -> None:
    pipeline = Pipeline.parse(f"{PRUNED}, heal(tokens=12000)")
    whole = pipeline.run(model, calibration, folder=tmp_path / "whole").model.digest
    seen: list[int] = []

    class Stopped(Progress):
        def tick(self, text: str, done: int, count: int) -> None:
            seen.extend([done] if text == "Healing steps" else [])
            if len(seen) == 4 and done == 3:
                raise Interrupted("stopped")

    folder, journal = tmp_path / "stopped", tmp_path / "journal"
    with pytest.raises(Interrupted):
        pipeline.run(model, calibration, folder=folder, journal=Journal(journal), progress=Stopped(quiet=True))
    predicted = saved_bytes(model.structure.layers.values(), pipeline.passes)
    assert predicted == pytest.approx((folder / STATE).stat().st_size, rel=0.05) and seen[-1] == 3
    (folder / f"{STATE}.tmp").write_bytes(b"what a kill leaves of a write")
    result = pipeline.run(model, calibration, folder=folder, journal=Journal(journal), progress=Stopped(quiet=True))
    assert seen[4] == 3 and result.model.digest == whole
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_batches_are_shuffled_windows_or_images_each_once() -> None:
    ids = torch.arange(40).view(10, 4)
    made = Batches(Windows(ids, (0,) * 10, "", ""), 0)
    rows = torch.cat([made[place] for place in range(len(made))])
    assert made.total == 40 and not torch.equal(rows, ids) and torch.equal(rows[rows[:, 0].argsort()], ids)
    pixels = torch.arange(70.0).view(70, 1, 1, 1)
    images = Batches(Images.of(pixels, torch.zeros(70, dtype=torch.int64), Preprocess("none")), 0)
    assert [images.rows(place) for place in range(len(images))] == [32, 32, 6] and images.total == 70
    assert torch.cat([images[place] for place in range(3)]).flatten().sort().values.tolist() == list(range(70))


def test_a_single_batch_is_not_told_as_held_out(model: Model) -> None:
    one = Windows(torch.arange(64)[None], (0,), "one", "one")
    result = Pipeline.parse("magnitude, heal(tokens=64)").run(model, Calibration(one, 0, "one"))
    note = next(row.notes[0] for row in result.passes[1].layers if row.changed)
    assert "held-out" not in note and "training divergence from the original" in note
    assert "nothing could be held out of a single batch" in note


def test_what_the_model_has_not_is_refused_before_the_work(model: Model) -> None:
    with pytest.raises(UsageError, match="no layer of the model has one"):
        Pipeline.parse("heal(parts=[biases])").resolve(model)


def test_settings_that_contradict_each_other_are_refused() -> None:
    for text, match in {
        "heal(rank=4)": "rank=4 is of mode=lora",
        "heal(mode=lora, parts=[norms])": "mode and rank are of weights",
        "heal(tokens=0)": "tokens",
        "heal(overrides={'*': {'lr': 0.1}})": "treats its layers together",
    }.items():
        with pytest.raises(UsageError, match=match):
            Pipeline.parse(text)
