"""The pass `vptq`: what each repair gains, budgets of bits, shared codebooks, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.engine.blockpass import Block
from compress.engine.layer_stats import LayerStats
from compress.errors import InputError, UsageError
from compress.formats.base import QuantTensor
from compress.formats.codebook import Codebook
from compress.formats.codebook_choice import choose, counted, expected_error
from compress.inputs.datasets import Calibration, calibrate
from compress.layer import Layer, LayerKind, LayerSpec
from compress.maths.hessian import weighted_error
from compress.models.model import Model
from compress.passes.vptq import Vptq
from compress.pipeline import Pipeline, planned
from helpers import coded
from helpers.coded import IN, OUT, WIDE, layer, proxy, stats
from helpers.gptq_twin import inputs, moments


def solved(layers: list[Layer], known: LayerStats, **settings: Any) -> list[Layer]:
    return coded.solved(Vptq.build(settings), layers, known)


def mean_proxy(**settings: Any) -> float:
    errors = []
    for seed in range(4):
        source, known = layer(seed=seed), stats(seed)
        (found,) = solved([source], known, mismatch=0, **settings)
        errors.append(proxy(source, found, known))
    return sum(errors) / len(errors)


@pytest.mark.parametrize(
    ("form", "repair", "off"),
    [
        (IN, {"beam": 8}, {"beam": 1}),
        (IN, {"beam": 8, "metric": True}, {"beam": 8, "metric": False}),
        (IN, {"refit": 4}, {"refit": 0}),
        (OUT, {"beam": 8}, {"beam": 1}),
        (OUT, {"rescale": True}, {"rescale": False}),
        (OUT, {"refit": 4}, {"refit": 0}),
    ],
)
def test_the_error_of_the_output_falls_with_each_repair(form: str, repair: dict[str, Any], off: dict[str, Any]) -> None:
    others = {"beam": 1, "metric": False, "refit": 0}
    assert mean_proxy(format=form, **{**others, **repair}) < 0.98 * mean_proxy(format=form, **{**others, **off})


@pytest.mark.parametrize("form", [IN, OUT])
def test_all_repairs_together_beat_the_authors_settings_by_far(form: str) -> None:
    reference = mean_proxy(format=form, beam=1, metric=False, rescale=False, refit=0)
    assert mean_proxy(format=form) < 0.7 * reference


def test_layers_of_a_block_share_one_tensor_that_counts_once() -> None:
    layers = [layer("block.a"), layer("block.b", rows=16, seed=2)]
    found = solved(layers, stats(), format=IN, share="block")
    weights = [each.weight for each in found]
    assert all(isinstance(weight, QuantTensor) for weight in weights)
    first, second = (weight for weight in weights if isinstance(weight, QuantTensor))
    assert first.tensors["codebook"] is second.tensors["codebook"]
    assert str(first.format) == str(second.format) == IN.replace(")", ", share=2)")
    alone = solved(layers, stats(), format=IN)
    spared = sum(each.bits_per_weight * prod(each.shape) for each in alone) - sum(
        each.bits_per_weight * prod(each.shape) for each in found
    )
    assert spared == 2 * 16 * 4 * 16
    assert all(proxy(source, each, stats()) < 0.2 for source, each in zip(layers, found, strict=True))


def test_layers_in_turn_keep_the_codebook_that_was_learned_from_all_of_them() -> None:
    layers = {name: layer(name, seed=seed) for seed, name in enumerate(("block.a", "block.b"))}
    known = dict.fromkeys(layers, stats())
    item = Vptq.build({"format": IN, "share": "block", "mismatch": 0})
    specs = {name: LayerSpec(name, each.kind, each.shape, each.users, segment=0) for name, each in layers.items()}
    passes = item.settle({name: (item, spec) for name, spec in specs.items()})
    assert item.in_turn and item.surveys
    turns = ({"block.a": passes["block.a"]}, {"block.b": passes["block.b"]})
    first = item.block(Block("block", layers, layers, turns[0], {}, known, ahead=turns[1])).layers
    second = item.block(Block("block", {**layers, **first}, layers, turns[1], {}, known)).layers
    alone = item.block(Block("block", layers, layers, turns[0], {}, known)).layers
    held, kept, other = (each.weight for each in (first["block.a"], second["block.b"], alone["block.a"]))
    assert isinstance(held, QuantTensor) and isinstance(kept, QuantTensor) and isinstance(other, QuantTensor)
    assert kept.tensors["codebook"] is held.tensors["codebook"]
    assert not torch.equal(held.tensors["codebook"], other.tensors["codebook"]), "block.b was not learned from"
    assert proxy(layers["block.b"], second["block.b"], known["block.b"]) < 0.1


def test_layers_of_other_formats_share_with_their_like_only() -> None:
    item = Vptq.build({"format": IN, "share": "block", "overrides": {"c": {"format": OUT}}})
    other = item.with_settings({"format": OUT})
    specs = {name: LayerSpec(name, LayerKind.LINEAR, (48, WIDE), (name,), segment=0) for name in "abc"}
    found = item.settle({"a": (item, specs["a"]), "b": (item, specs["b"]), "c": (other, specs["c"])})
    shares = {name: one.codebook.share for name, one in found.items() if isinstance(one, Vptq)}
    assert shares == {"a": 2, "b": 2, "c": 1}


@pytest.mark.parametrize("bits", [1.5, 2.0, 2.3, 3.0, 4.0])
@pytest.mark.parametrize("shapes", [[(256, 256)], [(256, 256), (128, 256), (768, 256), (256, 768)], [(4096, 4096)]])
def test_a_budget_of_bits_is_kept_and_used(bits: float, shapes: list[tuple[int, int]]) -> None:
    form = choose(shapes, bits, Codebook())
    assert 0.8 * bits < counted(form, shapes) <= bits * 1.005
    assert form.share == len(shapes)


def test_the_larger_the_layer_the_less_the_error_that_is_expected_for_a_budget() -> None:
    errors = [expected_error(choose([(size, size)], 2.0, Codebook())) for size in (128, 256, 1024, 4096)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


def test_a_budget_that_no_codebook_fits_is_refused() -> None:
    with pytest.raises(UsageError, match=r"No codebook fits 0\.2 bits"):
        choose([(64, 64)], 0.2, Codebook())


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    return compress.load(llama)


@pytest.fixture(scope="module")
def calibration(model: Model, text_file: Path) -> Calibration:
    return calibrate(model, text_file, samples=8, length=64)


def _book(model: Model, name: str) -> torch.Tensor:
    weight = model.layer(model.structure.layers[name]).weight
    assert isinstance(weight, QuantTensor)
    return weight.tensors["codebook"]


@pytest.mark.parametrize(
    "settings", ["bits=2.5, share=block", "bits=2.5", f"format={IN}, share=block, sequential=false"]
)
def test_a_model_is_stored_as_it_was_planned(settings: str, model: Model, calibration: Calibration) -> None:
    pipeline = Pipeline.parse(f"vptq({settings})")
    expected = planned(pipeline.resolve(model))
    result = pipeline.run(model, calibration)
    rows = [row for row in result.passes[0].layers if row.changed]
    weights = {row.layer: prod(expected[row.layer].shape) for row in rows}
    for row in rows:
        spec = result.model.structure.layers[row.layer]
        assert spec.format == expected[row.layer].format
        assert ("bits=2.5: codebook(" in " ".join(row.notes)) == ("bits" in settings)
    books = {_book(result.model, row.layer).numpy().tobytes() for row in rows}
    assert len(books) == (len(model.structure.blocks) if "share" in settings else len(rows))
    bits = sum(float(row.bits_per_weight or 0) * weights[row.layer] for row in rows) / sum(weights.values())
    assert "bits" not in settings or 2.0 < bits <= 2.5 * 1.005


def test_more_entries_than_vectors_are_told() -> None:
    source, known = layer(rows=8), stats()
    (found,) = solved([source], known, format="codebook(vector=8, entries=64, stages=1)", mismatch=0)
    assert "64 entries for 32 vectors: 32 of them stand for nothing" in found.notes
    assert proxy(source, found, known) < 1e-5


def test_a_width_that_no_vector_divides_is_refused(model: Model) -> None:
    with pytest.raises(UsageError, match="decides 5 input columns together"):
        planned(Pipeline.parse("vptq(format=codebook(vector=5, entries=16, stages=1))").resolve(model))


def test_a_hessian_of_too_few_tokens_is_damped_and_told() -> None:
    known = LayerStats(hessian=moments(inputs(3, WIDE)), tokens=3)
    source = layer()
    (found,) = solved([source], known, format=IN, mismatch=0)
    assert f"only 3 tokens for {WIDE} inputs: the Hessian is not full rank" in found.notes
    assert proxy(source, found, known) < 0.05


def test_a_layer_that_no_token_reached_is_solved_and_told() -> None:
    source = layer()
    (found,) = solved([source], LayerStats(), format=IN)
    assert any("identity Hessian" in note for note in found.notes)
    assert float((source.float_weight() - found.float_weight()).square().sum()) > 0


@pytest.mark.parametrize("broken", ["weight", "hessian"])
def test_nan_stops_the_run(broken: str) -> None:
    source, known = layer(), stats()
    assert known.hessian is not None and isinstance(source.weight, torch.Tensor)
    if broken == "weight":
        source = replace(source, weight=source.weight.clone().index_fill_(0, torch.tensor([3]), float("nan")))
    else:
        known.hessian[2, 2] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        solved([source], known, format=IN, mismatch=0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"format": "int4(group=32)"}, "is no codebook"),
        ({"format": "codebook(vector=4, entries=16, stages=1, out, scale=row)"}, "Give scale=column"),
        ({"format": IN, "bits": 2}, "contradict each other"),
        ({"group_size": 32}, "group_size is for integer formats"),
        ({"sequential": False, "mismatch": 0.5}, "needs sequential=true"),
        ({"overrides": {"*q_proj": {"share": "block"}}}, "may not set share"),
        ({"share": "model"}, "share='model'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Vptq.build(settings)


def test_an_override_replaces_a_budget_by_a_format_and_the_other_way_round() -> None:
    assert str(Vptq.build({"bits": 2}).with_settings({"format": IN}).format) == IN
    assert Vptq.build({"format": IN}).with_settings({"bits": 3}).bits == 3


def test_a_guided_layer_has_its_rows_solved_with_hessians_of_their_own_and_one_codebook() -> None:
    source, known = layer(), stats()
    assert known.hessian is not None
    plain = solved([source], known, format=IN, mismatch=0)[0].float_weight()
    alike = replace(known, guided=known.hessian.repeat(3, 1, 1) * 7)
    same = solved([source], alike, format=IN, mismatch=0, guided=3)[0]
    assert proxy(source, same, known) == pytest.approx(proxy(source, replace(source, weight=plain), known), rel=0.1)
    groups = torch.stack([moments(inputs(400, WIDE, 20 + group)) for group in range(3)])
    guided = solved([source], replace(known, guided=groups), format=IN, mismatch=0, guided=3)[0].float_weight()
    rows = torch.arange(48).tensor_split(3)
    errors = [
        sum(weighted_error((found - source.float_weight())[part], own) for own, part in zip(groups, rows, strict=True))
        for found in (guided, plain)
    ]
    assert errors[0] < 0.9 * errors[1]


def test_a_layer_without_gradients_is_told_and_codebooks_across_rows_cannot_be_guided() -> None:
    (found,) = solved([layer()], stats(), format=IN, mismatch=0, guided=2)
    assert any("not guided" in note for note in found.notes)
    with pytest.raises(UsageError, match="decides groups of output rows apart"):
        Vptq.build({"format": OUT, "guided": 2})


def test_a_layer_that_no_token_reached_counts_little_in_a_codebook_that_others_hold_too() -> None:
    layers, known = [layer("block.a"), layer("block.b", rows=96, seed=2)], stats()
    item = Vptq.build({"format": IN, "mismatch": 0})
    specs = {each.name: LayerSpec(each.name, each.kind, each.shape, each.users, segment=0) for each in layers}
    shared = Vptq.build({"format": IN, "mismatch": 0, "share": "block"})
    passes = shared.settle({name: (shared, spec) for name, spec in specs.items()})
    by_name = {each.name: each for each in layers}
    found = shared.block(Block("block", by_name, by_name, passes, {}, {"block.a": known})).layers["block.a"]
    alone = item.block(Block("block", by_name, by_name, {"block.a": item}, {}, {"block.a": known})).layers["block.a"]
    assert proxy(layers[0], found, known) < 1.3 * proxy(layers[0], alone, known)
