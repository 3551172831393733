"""PV-Tuning: codes follow a continuous weight, a few at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import compress
from compress.formats import parse_format
from compress.formats.base import QuantTensor
from compress.formats.int_grid import IntGrid
from compress.inputs.datasets import Calibration, calibrate
from compress.layer import Layer, LayerKind
from compress.models.model import Model
from compress.pipeline import Pipeline, Result
from compress.training import distill
from compress.training.code_step import CodeStep
from compress.training.soft import SoftRounding
from compress.training.soft_codebook import SoftCodebook, soft_codebooks

START = "rtn(format=codebook(vector=4, entries=16, stages=2))"
NAME = "model.layers.1.mlp.up_proj"


def coded(text: str) -> Layer:
    form = parse_format(text)
    weight = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    params = form.fit(weight)
    codes, _ = form.quantize(weight, params, torch.arange(16))
    return Layer("l", LayerKind.LINEAR, form.pack(codes, params, (12, 16)), users=("l",))


def soft_of(text: str) -> SoftRounding | SoftCodebook:
    layer = coded(text)
    return SoftRounding(layer, None) if isinstance(layer.format, IntGrid) else soft_codebooks([layer])["l"]


TEXTS = [
    "int3(group=8)",
    "codebook(vector=4, entries=8, stages=2)",
    "codebook(vector=5, entries=8, stages=1, out, groups=2)",
]


@pytest.mark.parametrize("text", TEXTS)
def test_at_most_a_share_of_the_units_change_and_those_that_do_come_nearer(text: str) -> None:
    soft = soft_of(text)
    before, held = soft.weight().detach(), soft.held.clone()  # type: ignore[union-attr]
    wish = before + 0.7 * torch.randn(12, 16, generator=torch.Generator().manual_seed(1))
    soft.reencode(wish, 0.1, 8)
    after = soft.weight().detach()
    assert soft.held is not None
    changed = (soft.held != held).flatten(2).any(-1) if soft.held.ndim == 3 else soft.held != held
    assert 0 < int(changed.sum()) <= max(1, int(0.1 * changed.numel()))
    assert float((wish - after).square().sum()) < float((wish - before).square().sum())
    assert torch.equal(after == before, ~_weights(soft, changed) | (after == before))


def _weights(soft: SoftRounding | SoftCodebook, changed: torch.Tensor) -> torch.Tensor:
    """The weights (out, in) of units."""
    if isinstance(soft, SoftRounding):
        return changed
    form = soft.form
    return form.weights(changed[..., None].float().expand(-1, -1, form.vector).contiguous(), 12).bool()


@pytest.mark.parametrize("text", TEXTS)
def test_a_wish_that_is_what_the_codes_decode_to_changes_nothing(text: str) -> None:
    soft = soft_of(text)
    held = soft.held.clone()  # type: ignore[union-attr]
    soft.reencode(soft.weight().detach(), 1.0, 8)
    assert soft.held is not None and torch.equal(soft.held, held)


@pytest.mark.parametrize("text", TEXTS)
def test_codes_that_were_chosen_again_are_stored(text: str) -> None:
    soft = soft_of(text)
    soft.reencode(soft.weight().detach() + 1.0, 1.0, 8)
    assert torch.equal(soft.rounded().float_weight(), soft.weight().detach())


@pytest.mark.parametrize("text", TEXTS)
def test_a_step_of_the_codes_is_no_longer_than_it_may_be(text: str) -> None:
    lengths = []
    for trust in (0.0, 0.3):
        soft = soft_of(text)
        step = CodeStep(soft, 0.5, 8, 0.0, trust)
        before = soft.weight().detach()
        step.wish += 0.7 * torch.randn(12, 16, generator=torch.Generator().manual_seed(1))
        step.follow()
        lengths.append(float((soft.weight() - before).norm() / before.norm()))
    assert 0 < lengths[1] <= 0.3 < lengths[0]


def test_a_layer_of_zeros_is_stepped_over_where_steps_have_a_longest_length() -> None:
    form = parse_format(TEXTS[1])
    weight = torch.zeros(12, 16)
    params = form.fit(weight)
    codes, _ = form.quantize(weight, params, torch.arange(16))
    soft = soft_codebooks([Layer("l", LayerKind.LINEAR, form.pack(codes, params, (12, 16)), users=("l",))])["l"]
    CodeStep(soft, 0.5, 8, 0.0, 0.3).follow()
    assert not soft.weight().any()


def test_the_loop_keeps_the_codes_of_its_best_iterate() -> None:
    """The loss rises at once, since its target is where the codes already are; what is kept is the start."""
    soft = soft_of(TEXTS[1])
    target, held = soft.weight().detach(), soft.held.clone()  # type: ignore[union-attr]
    step = CodeStep(soft, 0.5, 8, 0.0)
    step.wish += 1.0
    outcome = distill.fit(
        [step.group(0.01)],
        lambda _: (step.weight() - target).square().mean(),
        [0],
        [0],
        distill.Budget(4, check=2),
    )
    assert outcome.best == 0
    assert soft.held is not None and torch.equal(soft.held, held)


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    return compress.load(llama)


@pytest.fixture(scope="module")
def calibration(model: Model, text_file: Path) -> Calibration:
    return calibrate(model, text_file, samples=64, length=64)


def held_out(result: Result) -> tuple[float, float]:
    row = next(row for row in result.passes[1].layers if row.layer == NAME)
    start, end = row.notes[0].partition("loss ")[2].split(" → ")
    return float(start), float(end.partition(",")[0])


@pytest.mark.parametrize("start", [START, "rtn(format=int2(group=32))"])
def test_codes_move_and_the_loss_on_held_out_text_falls(model: Model, calibration: Calibration, start: str) -> None:
    before = Pipeline.parse(start).run(model)
    tuned = Pipeline.parse(f"{start}, pv_tuning(steps=25, lr=0.01, code_lr=0.1)").run(model, calibration)
    first, second = (one.model.layer(one.model.structure.layers[NAME]).weight for one in (before, tuned))
    assert isinstance(first, QuantTensor) and isinstance(second, QuantTensor)
    moved = (first.tensors["codes"] != second.tensors["codes"]).float().mean()
    assert 0 < float(moved) < 0.5
    loss, better = held_out(tuned)
    assert better < 0.9 * loss


def test_a_model_without_codes_is_refused(model: Model, calibration: Calibration) -> None:
    with pytest.raises(compress.CompressError, match="pv_tuning"):
        Pipeline.parse("pv_tuning(steps=2)").run(model, calibration)


def test_without_scales_nothing_is_learned_that_is_not_stored(model: Model, calibration: Calibration) -> None:
    """The loss that was held out is that of the stored weights."""
    start = "rtn(format=codebook(vector=4, entries=16, stages=2, scale=none))"
    one = Pipeline.parse(f"{start}, tune(steps=10, lr=0.01, parts=[codebooks])").run(model, calibration)
    again = Pipeline.parse(f"{start}, tune(steps=10, lr=0.01, parts=[codebooks, scales])").run(model, calibration)
    assert held_out(one) == held_out(again)


def test_parts_without_codes_are_refused(model: Model, calibration: Calibration) -> None:
    with pytest.raises(compress.CompressError, match=r"no layer .* has codes"):
        Pipeline.parse(f"{START}, pv_tuning(steps=2, parts=[norms])").run(model, calibration)


def test_a_codebook_is_not_trained_for_some_of_its_holders_only(model: Model, calibration: Calibration) -> None:
    start = "vptq(format=codebook(vector=4, entries=16, stages=1), share=block, refit=0)"
    before = Pipeline.parse(start).run(model, calibration)
    tuned = Pipeline.parse(f"{start}, tune(steps=2, lr=0.01, targets=[*.up_proj])").run(model, calibration)
    first, second = (one.model.layer(one.model.structure.layers[NAME]).weight for one in (before, tuned))
    assert isinstance(first, QuantTensor) and isinstance(second, QuantTensor)
    assert torch.equal(first.tensors["codebook"], second.tensors["codebook"])
    row = next(row for row in tuned.passes[1].layers if row.layer == NAME)
    assert any("entries of its codebook stayed" in note for note in row.notes)
