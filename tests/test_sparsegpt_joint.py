"""Pruned and rounded in one solve: masks, codes, errors, and statistics that cannot be factorised."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import compress
from compress.engine.layer_stats import LayerStats
from compress.engine.part import Part
from compress.errors import UsageError
from compress.formats import parse_format
from compress.formats.base import QuantTensor
from compress.inputs.datasets import Calibration, calibrate
from compress.layer import Layer, LayerKind, LayerSpec
from compress.maths.hessian import inverse_factor, weighted_error
from compress.maths.masks import Pattern
from compress.maths.pruning import prune
from compress.models.model import Model
from compress.passes.gptq import Gptq
from compress.passes.rtn import Rtn
from compress.passes.sparsegpt import SparseGpt
from compress.pipeline import Pipeline
from compress.solve import compensate
from helpers.formats import SAMPLES
from helpers.gptq_twin import layer, moments

HOLDING = [text for text in SAMPLES if parse_format(text).holds_zero]


def correlated(seed: int, columns: int = 64, tokens: int = 400) -> torch.Tensor:
    maker = torch.Generator().manual_seed(seed)
    causes = torch.randn(columns // 2, columns, generator=maker) * torch.randn(columns, generator=maker).exp()
    return torch.randn(tokens, columns // 2, generator=maker) @ causes + torch.randn(tokens, columns, generator=maker)


def stats_of(values: torch.Tensor) -> LayerStats:
    return LayerStats(hessian=moments(values), tokens=len(values))


@pytest.mark.parametrize("text", HOLDING)
def test_every_format_that_holds_zero_keeps_the_mask_exactly(text: str) -> None:
    one, stats = layer(12, 64), stats_of(correlated(0))
    for pattern in ("2:4", "row"):
        found = SparseGpt(format=text, pattern=pattern, mismatch=0)._pruned(one, stats, {})
        assert isinstance(found.weight, QuantTensor) and str(found.format) == text
        weight = found.float_weight()
        assert Pattern.parse(pattern).held(weight, 0.5) and weight.any()
        assert "of the weights are zero" in found.notes[0]


def test_without_pruning_the_columns_are_decided_as_by_gptq() -> None:
    weight, form = layer(12, 64).float_weight(), parse_format("int3(group=16)")
    factor = inverse_factor(moments(correlated(1)), 0.05)[0]
    params, columns = form.fit(weight), torch.arange(64)
    everything = prune(weight, factor, Pattern("layer"), 0.0, rounder=form.rounder(params, columns))[0]
    codes = compensate(weight, factor, form.rounder(params, columns))
    assert torch.allclose(everything, form.pack(codes, params, (12, 64)).dequantize(), atol=1e-5)


@pytest.mark.parametrize(("form", "pattern"), [("int4(group=16)", "row"), ("int3(group=16, asymmetric)", "2:4")])
def test_one_solve_loses_less_than_rounding_or_masking_afterwards(form: str, pattern: str) -> None:
    """Pruned first and rounded to nearest, or by gptq first and masked."""
    totals = torch.zeros(3)
    for seed in range(4):
        one, stats = layer(32, 64, seed), stats_of(correlated(seed))
        assert stats.hessian is not None
        joint = SparseGpt(format=form, pattern=pattern, mismatch=0)._pruned(one, stats, {})
        first = SparseGpt(pattern=pattern, mismatch=0)._pruned(one, stats, {})
        mask = first.float_weight() != 0
        rounded = Rtn(format=form, clip=True).layer(replace(first, mask=mask), stats).float_weight()
        cut = Gptq(format=form, mismatch=0).layer(one, stats).float_weight() * mask
        for place, found in enumerate((joint.float_weight(), rounded, cut)):
            totals[place] += weighted_error(found - one.float_weight(), stats.hessian)
    assert totals[0] < 0.9 * totals[1:].min()


def test_groups_are_fitted_to_what_is_left() -> None:
    """Half of each group is large and stays; the range of an asymmetric grid does not reach to what is pruned."""
    weight = torch.full((1, 32), -0.01)
    weight[0, ::2] = torch.linspace(0.5, 1.0, 16)
    one = Layer("block.linear", LayerKind.LINEAR, weight)
    item = SparseGpt(format="int4(group=32, asymmetric)", mismatch=0, sweeps=0, clip=False)
    found = item._pruned(one, LayerStats(hessian=torch.eye(32), tokens=64), {})
    assert isinstance(found.weight, QuantTensor)
    assert float(found.weight.tensors["scale"]) == pytest.approx(1 / 15, rel=1e-3)
    assert not found.float_weight()[0, 1::2].any()


@pytest.mark.parametrize("form", [None, "int4(group=16)"])
def test_a_singular_hessian_is_damped_until_it_can_be_factorised_and_reported(form: str | None) -> None:
    values = correlated(2, tokens=5).double()
    flat = (values.T @ values / 5).float()
    flat.diagonal().sub_(0.08 * flat.diagonal().mean())  # below zero in the directions that no token has
    found = SparseGpt(format=form, mismatch=0)._pruned(layer(12, 64), LayerStats(hessian=flat, tokens=5), {})
    assert "damping raised to 0.1 to factorise the Hessian" in found.notes[1]
    assert "only 5 tokens for 64 inputs" in found.notes[2]
    assert torch.isfinite(found.float_weight()).all() and Pattern("layer").held(found.float_weight(), 0.5)
    exactly = moments(correlated(2, tokens=5))
    calm = SparseGpt(format=form, mismatch=0)._pruned(layer(12, 64), LayerStats(hessian=exactly, tokens=5), {})
    assert torch.isfinite(calm.float_weight()).all() and "only 5 tokens" in calm.notes[1]


def test_a_layer_that_no_token_reached_is_masked_and_rounded_and_says_so() -> None:
    found = SparseGpt(format="int4(group=16)")._pruned(layer(12, 64), LayerStats(), {})
    assert isinstance(found.weight, QuantTensor) and "no calibration token reached it" in found.notes[1]
    assert Pattern("layer").held(found.float_weight(), 0.5)


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Model:
    return compress.load(make_llama("joint", num_hidden_layers=1, intermediate_size=96))


@pytest.fixture(scope="module")
def calibration(model: Model, text_file: Path) -> Calibration:
    return calibrate(model, text_file, samples=8, length=32)


def test_a_run_stores_codes_and_reports_the_pattern(model: Model, calibration: Calibration) -> None:
    text = "sparsegpt(pattern=2:4, format=int4(group=32), overrides={*.o_proj: {format: null}}), act_quant"
    result = Pipeline.parse(text).run(model, calibration)
    assert result.sparsity is not None and all(each.met for each in result.sparsity.layers)
    forms = {name: str(spec.format) for name, spec in result.model.structure.layers.items() if spec.segment >= 0}
    assert {form for name, form in forms.items() if "o_proj" not in name} == {"int4(group=32)"}
    assert {form for name, form in forms.items() if "o_proj" in name} == {"None"}
    assert {row.format.split(" with ")[0] for row in result.passes[0].layers if row.changed} == {
        "int4(group=32)",
        "float32",
    }


def test_it_fills_values_and_format_so_nothing_may_round_or_prune_again(model: Model) -> None:
    assert SparseGpt(format="int4").fills() == {Part.VALUES, Part.WEIGHT} and SparseGpt().fills() == {Part.VALUES}
    for text, told in (
        ("sparsegpt(format=int4(group=32)), gptq", "both set the weight format"),
        ("magnitude, sparsegpt(format=int4(group=32))", "both set the weight values"),
        ("sparsegpt(format=int4(group=32)), autoround(steps=2)", "would not keep at zero"),
        ("sparsegpt(format=int4(float_zero))", "cannot store zero exactly"),
        ("sparsegpt(format=trellis(bits=3, block=32))", "decides several columns together"),
    ):
        with pytest.raises(UsageError, match=told):
            laid = Pipeline.parse(text).resolve(model)
            for name, passes in laid.passes.items():
                for _, item in passes:
                    item.plan(laid.structure.layers[name])


def test_convolutions_in_groups_are_refused_with_what_to_do() -> None:
    spec = LayerSpec("conv", LayerKind.CONV, (8, 36), ("conv",), kernel=(4, 3, 3), groups=2)
    with pytest.raises(UsageError, match="add gptq after it"):
        SparseGpt(format="int4(channel)").plan(spec)
