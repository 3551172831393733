"""Sparsity shared out among layers by their outliers: the sums, the survey, what a stopped run keeps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.engine import survey
from compress.engine.allocating import Allocating
from compress.engine.journal import Journal
from compress.engine.walk import Walk
from compress.errors import UsageError
from compress.inputs.datasets import Calibration, calibrate
from compress.maths.allocation import outlier_share, spread, whole_counts
from compress.models.model import Model
from compress.models.placing import whole_module
from compress.pipeline import Pipeline, Result, planned


def test_outliers_are_counted_against_the_mean_of_all_parts_together() -> None:
    parts = [torch.tensor([[1.0, 1.0], [0.0, 10.0]]), torch.tensor([4.0, 2.0])]  # mean 3
    assert outlier_share(lambda: parts, 3) == pytest.approx(1 / 6)
    assert outlier_share(lambda: parts, 1) == pytest.approx(2 / 6)
    assert outlier_share(lambda: parts, 4) == 0.0


def test_layers_with_more_outliers_lose_less_and_the_mean_is_the_wish() -> None:
    outliers, sizes = [0.01, 0.02, 0.09, None], [100, 300, 200, 500]
    found = spread(0.7, outliers, sizes, 0.1)
    assert found[0] > found[1] > found[3] == 0.7 > found[2]
    assert sum(share * size for share, size in zip(found, sizes, strict=True)) == pytest.approx(0.7 * sum(sizes))
    assert max(abs(share - 0.7) for share in found) == pytest.approx(0.1)
    apart = [(0.7 - share) / (found_ - 25 / 600) for share, found_ in zip(found[:2], (0.01, 0.02), strict=True)]
    assert apart[0] == pytest.approx(apart[1])  # in proportion


def test_layers_alike_or_unknown_all_get_the_wish() -> None:
    assert spread(0.5, [0.3, 0.3, None], [1, 2, 3], 0.1) == [0.5] * 3
    assert spread(0.5, [None, None], [1, 2], 0.1) == [0.5] * 2


def test_what_rounding_to_whole_units_leaves_over_goes_to_the_next_layer() -> None:
    shares, units, sizes = [0.523, 0.477, 0.5, 0.4999], [10, 12, 7, 9], [1000, 1200, 700, 900]
    counts = whole_counts(shares, units, sizes)
    wanted = sum(share * size for share, size in zip(shares, sizes, strict=True))
    assert abs(sum(counts) * 100 - wanted) <= 50
    assert whole_counts([0.999, 0.001], [4, 4], [4, 4]) == [3, 1]  # never all, never nothing


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Model:
    return compress.load(make_llama("allocation", num_hidden_layers=3, intermediate_size=96))


@pytest.fixture(scope="module")
def calibration(model: Model, text_file: Path) -> Calibration:
    return calibrate(model, text_file, samples=8, length=32)


def zeros(result: Result) -> dict[str, tuple[int, int]]:
    """Of the layers inside the blocks, with their weights."""
    assert result.sparsity is not None
    return {layer.layer: (layer.zeros, layer.weights) for layer in result.sparsity.layers}


def shares_of_blocks(result: Result) -> list[float]:
    by_block: dict[str, list[tuple[int, int]]] = {}
    for name, each in zeros(result).items():
        by_block.setdefault(name.split(".")[2], []).append(each)
    return [sum(each[0] for each in found) / sum(each[1] for each in found) for found in by_block.values()]


@pytest.mark.parametrize(
    "text",
    [
        "magnitude(sparsity=0.6, allocate=owl, owl_m=3)",
        "wanda(sparsity=0.6, allocate=owl, owl_m=3, owl_per=layer)",
        "ria(sparsity=0.6, pattern=8x8, allocate=owl, owl_m=3)",
        "sparsegpt(sparsity=0.6, allocate=owl, owl_m=3, owl_lambda=0.2)",
    ],
)
def test_the_whole_model_loses_what_was_asked_and_no_layer_is_farther_away_than_lambda(
    text: str, model: Model, calibration: Calibration
) -> None:
    result = Pipeline.parse(text).run(model, calibration)
    found, item = zeros(result), result.pipeline.passes[0]
    assert isinstance(item, Allocating)
    unit = 96 if item.pattern in ("row", "8x8") else 1  # the largest step of a layer's count
    pruned, whole = (sum(each[place] for each in found.values()) for place in (0, 1))
    assert abs(pruned - 0.6 * whole) <= unit / 2
    away = [abs(count / size - 0.6) for count, size in found.values()]
    assert 0.5 * item.owl_lambda < max(away) <= item.owl_lambda + 0.04  # a unit is as much of the smallest layers
    assert result.sparsity is not None and all(each.met for each in result.sparsity.layers)
    assert any("allocate=owl" in note for row in result.passes[0].layers for note in row.notes)


def test_blocks_are_ordered_by_their_outliers_as_a_hook_on_the_whole_model_counts_them(
    model: Model, calibration: Calibration
) -> None:
    module, sums = whole_module(model), dict[str, Tensor]()

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def add(_module: nn.Module, inputs: tuple[Tensor]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1])
            sums[name] = sums.get(name, 0) + rows.square().sum(0)

        return add

    linear = {name: one for name, one in module.named_modules() if name.endswith("_proj")}
    for name, one in linear.items():
        one.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for batch in calibration.batches():
            module(input_ids=batch)
    expected = []
    for block in range(3):
        scores = [
            (one.weight.abs() * sums[name].sqrt()).flatten()
            for name, one in linear.items()
            if f"layers.{block}." in name
        ]
        # the inputs of layers differ in size: each is scored by its own
        together = torch.cat(scores)
        expected.append(float((together > 3 * together.mean()).float().mean()))
    shares = shares_of_blocks(Pipeline.parse("wanda(allocate=owl, owl_m=3, pattern=layer)").run(model, calibration))
    first, second = ((shares[0] - shares[k]) / (expected[k] - expected[0]) for k in (1, 2))
    assert first == pytest.approx(second, rel=0.01) and first > 0


def test_layers_with_settings_of_their_own_are_shared_out_among_themselves(
    model: Model, calibration: Calibration
) -> None:
    text = (
        "magnitude(sparsity=0.6, allocate=owl, owl_m=3, overrides={*.mlp.*: {sparsity: 0.4}, "
        "*.k_proj: {allocate: uniform}})"
    )
    found = zeros(Pipeline.parse(text).run(model, calibration))
    mlp = [each for name, each in found.items() if ".mlp." in name]
    rest = [each for name, each in found.items() if ".mlp." not in name and "k_proj" not in name]
    for group, wish in ((mlp, 0.4), (rest, 0.6)):
        assert sum(each[0] for each in group) == round(wish * sum(each[1] for each in group))
    assert {round(count / size, 3) for name, (count, size) in found.items() if "k_proj" in name} == {0.6}


def test_what_was_shared_out_can_be_stored_without_its_zeros(model: Model, calibration: Calibration) -> None:
    """The plan knows the mean alone; every layer is stored by what it has."""
    pipeline = Pipeline.parse("wanda(sparsity=0.6, allocate=owl, owl_m=3), pack_sparse")
    result = pipeline.run(model, calibration)
    plan = {name: spec for name, spec in planned(pipeline.resolve(model)).items() if spec.format is not None}
    stored = [result.model.layer(result.model.structure.layers[name]).weight for name in plan]
    wanted = sum(spec.format.stored_bytes(spec.shape) for spec in plan.values() if spec.format is not None)
    assert sum(weight.nbytes for weight in stored) == pytest.approx(wanted, rel=0.03)  # rows of 64 round
    assert len({str(result.model.structure.layers[name].format) for name in plan}) > 1


def test_a_layer_that_is_pruned_twice_is_held_to_the_last_share(model: Model, calibration: Calibration) -> None:
    text = "magnitude(sparsity=0.3), heal(tokens=256), magnitude(sparsity=0.6)"
    found = Pipeline.parse(text).run(model, calibration).sparsity
    assert found is not None
    assert {(each.asked, each.met) for each in found.layers} == {(0.6, True)}


class StoppedError(Exception):
    """Stands for a kill."""


def test_a_stopped_run_goes_on_with_the_same_survey_to_the_same_bytes(
    model: Model, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline.parse("wanda(allocate=owl, owl_m=3)")
    whole = pipeline.run(model, calibration, folder=tmp_path / "whole").model.digest
    block = Walk._block

    def stopping(walk: Walk, index: int) -> None:
        if index == 1:
            raise StoppedError
        block(walk, index)

    (tmp_path / "part").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Walk, "_block", stopping)
        with pytest.raises(StoppedError):
            pipeline.run(model, calibration, folder=tmp_path / "part", journal=Journal(tmp_path / "journal"))
    journal = Journal(tmp_path / "journal")
    assert survey.STEP in journal

    def surveyed(*_args: object) -> survey.Gauged:
        raise AssertionError("the survey was made before")

    monkeypatch.setattr(survey, "gauged", surveyed)
    assert pipeline.run(model, calibration, folder=tmp_path / "part", journal=journal).model.digest == whole


def test_an_image_model_and_a_head_can_be_surveyed(
    cnn: str, images_file: Path, model: Model, calibration: Calibration
) -> None:
    image = compress.load(cnn)
    found = zeros(Pipeline.parse("magnitude(allocate=owl, owl_m=3, owl_per=layer)").run(image, images_file))
    assert sum(count for count, _ in found.values()) == round(0.5 * sum(size for _, size in found.values()))
    text = "magnitude(allocate=owl, owl_m=3, targets=[kind:head, *.q_proj, kind:embedding])"
    found = zeros(Pipeline.parse(text).run(model, calibration))
    assert sum(count for count, _ in found.values()) == round(0.5 * sum(size for _, size in found.values()))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("wanda(pattern=2:4, allocate=owl)", "prunes as much of every layer"),
        ("wanda(sparsity=0.95, allocate=owl)", "could prune 87 to 103 %.*Set owl_lambda below 0.05"),
        ("wanda(owl_m=3)", "owl_m does nothing without allocate=owl"),
        ("wanda(allocate=evenly)", "uniform"),
        ("gradual_magnitude(allocate=owl)", "unknown setting.*allocate"),
        ("magnitude(sparsity=0.05, pattern=32x32, allocate=owl, owl_lambda=0.04)", "rounds to nothing"),
        ("magnitude(allocate=owl)", "needs calibration data"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_in_words(text: str, told: str, model: Model) -> None:
    with pytest.raises(UsageError, match=told):
        pipeline = Pipeline.parse(text)
        planned(pipeline.resolve(model))
        pipeline.run(model)
