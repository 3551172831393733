"""GPTQ and its factor, against slow twins and against rounding."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from compress import solve
from compress.engine.blockpass import Block
from compress.engine.layer_stats import LayerStats
from compress.errors import InputError
from compress.formats import parse_format
from compress.maths import hessian as hessian_maths
from compress.maths.hessian import accumulate, damped, inverse_factor, weighted_error
from compress.passes.gptq import Gptq
from compress.passes.rtn import Rtn
from helpers.gptq_twin import inputs, layer, moments, slow_gptq, with_damping


def test_moments_add_up_over_batches() -> None:
    values = inputs()
    total = None
    for part in values.split(30):
        total = accumulate(total, part)
    assert torch.allclose(total, values.T @ values, rtol=1e-4, atol=1e-3)


def test_moments_of_wide_inputs_are_whole_and_symmetric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_maths, "TRIANGLE_STEP", 10)
    values = inputs()
    total = None
    for part in values.split(30):
        total = hessian_maths.accumulate_upper(total, part)
    total = hessian_maths.mirror(total)
    assert torch.allclose(total, values.T @ values, rtol=1e-4, atol=1e-3)
    assert torch.equal(total, total.T)


def test_the_factor_squares_to_the_damped_inverse() -> None:
    hessian = moments(inputs())
    factor, used, tries = inverse_factor(hessian, 0.01)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(24, dtype=torch.float64)
    assert (used, tries) == (0.01, 0)
    assert torch.allclose(factor.double().T @ factor.double(), torch.linalg.inv(damped), rtol=1e-3, atol=1e-6)
    assert torch.equal(factor, factor.triu())


def test_the_factor_of_a_wide_layer_is_put_together_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_maths, "TRIANGLE_STEP", 5)
    hessian = moments(inputs())
    factor, _, _ = inverse_factor(hessian, 0.01)
    expected = np.linalg.inv(with_damping(hessian))
    assert np.allclose((factor.double().T @ factor.double()).numpy(), expected, rtol=1e-3, atol=1e-6)


def test_the_weighted_error_is_the_squared_error_of_the_output() -> None:
    values, difference = inputs(), layer().float_weight()
    found = weighted_error(difference, moments(values))
    assert found == pytest.approx(float((values.double() @ difference.double().T).square().sum() / 200), rel=1e-4)


def test_damping_escalates_and_says_so() -> None:
    broken = torch.eye(4)
    broken[0, 1] = broken[1, 0] = 1.05  # not positive definite until the diagonal grows
    _, used, tries = inverse_factor(broken, 0.01)
    assert tries == 3
    assert used == pytest.approx(0.08)


def test_statistics_with_nan_are_refused_rather_than_rounded_silently() -> None:
    with pytest.raises(InputError, match="NaN"):
        inverse_factor(torch.full((3, 3), float("nan")), 0.01)


@pytest.mark.parametrize("run", [1, 7, 64])
def test_compensation_equals_the_column_by_column_twin(run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "RUN", run)
    form, one = parse_format("int3(group=8)"), layer()
    hessian, weight = moments(inputs()), one.float_weight()
    order = torch.argsort(hessian.diagonal(), descending=True)
    params = form.fit(weight)
    factor, _, _ = inverse_factor(hessian[order][:, order], 0.01)
    codes = solve.compensate(weight[:, order], factor, form.rounder(params, order))
    packed = form.pack(codes[:, torch.argsort(order)], params, (6, 24)).dequantize()
    expected = slow_gptq(weight.double().numpy(), with_damping(hessian), form, params, order.tolist())
    assert np.abs(packed.numpy() - expected).max() < 1e-4


def test_columns_that_are_decided_together_pass_on_their_joint_error() -> None:
    """With pairs, the least-squares answer to both errors at once (paper, eq. 4, for a block of two)."""
    weight, hessian = layer().float_weight(), moments(inputs())
    factor, _, _ = inverse_factor(hessian, 0.01)

    def whole(part: torch.Tensor, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.round(part), torch.round(part)

    codes = solve.compensate(weight * 4, factor, whole, step=2)
    left, expected = weight.double().numpy() * 4, np.zeros((6, 24))
    for at in range(0, 24, 2):
        inverse = np.linalg.inv(with_damping(hessian)[at:, at:])
        expected[:, at : at + 2] = np.round(left[:, at : at + 2])
        error = (left[:, at : at + 2] - expected[:, at : at + 2]) @ np.linalg.inv(inverse[:2, :2])
        left[:, at + 2 :] -= error @ inverse[:2, 2:]
    assert np.abs(codes.numpy() - expected).max() < 1e-4


def test_the_matched_weight_is_the_least_squares_answer_on_other_inputs() -> None:
    clean, noise, weight = inputs().double(), 0.3 * inputs(seed=5).double(), layer().float_weight()
    got = (clean + noise).float()
    hessian, cross = moments(got), -(noise.float().T @ got) / len(got)
    order = torch.argsort(hessian.diagonal(), descending=True)
    factor, _, _ = inverse_factor(hessian[order][:, order], 0.01)
    damping = 0.01 * float(hessian.diagonal().mean()) * len(got)
    rows = np.concatenate([got.double().numpy(), np.sqrt(damping) * np.eye(24)])
    for share in (1.0, 0.25):
        wanted = got.double() - share * noise
        known = np.concatenate([wanted.numpy(), np.sqrt(damping) * np.eye(24)]) @ weight.double().numpy().T
        expected = np.linalg.lstsq(rows, known, rcond=None)[0].T
        found = solve.matched(weight, cross, factor, order, share)
        assert np.abs(found.numpy() - expected).max() < 1e-4


def slow_improve(
    weight: np.ndarray, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, hessian: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """One sweep over groups of 8: the scale by a parabola through three errors, each code by trying all of them."""

    def error(row: int) -> float:
        step = np.repeat(scale[row], 8)
        difference = weight[row] - (codes[row] - np.repeat(zero[row], 8)) * step
        return float(difference @ hessian @ difference)

    for row in range(len(weight)):
        for group in range(scale.shape[1]):
            start = scale[row, group]
            tried = []
            for factor in (0.5, 1.0, 1.5):
                scale[row, group] = start * factor
                tried.append(error(row))
            a, b = (tried[0] - 2 * tried[1] + tried[2]) / 0.5, (tried[2] - tried[0]) / 1.0
            scale[row, group] = np.float16(start * (1 - b / (2 * a)))
            for column in range(8 * group, 8 * group + 8):
                errors = []
                for code in range(2**bits):
                    codes[row, column] = code
                    errors.append(error(row))
                codes[row, column] = int(np.argmin(errors))
    return codes, scale


@pytest.mark.parametrize("text", ["int3(group=8)", "int2(group=8, asymmetric)", "int2(group=8, signed)"])
def test_a_sweep_of_descent_equals_trying_every_code(text: str) -> None:
    form, weight, hessian = parse_format(text), layer().float_weight(), moments(inputs())
    params = form.fit(weight)
    codes, values = form.quantize(weight, params, torch.arange(24))
    twin = [codes.double().numpy().copy(), *(params[name].double().numpy().copy() for name in ("scale", "zero"))]
    expected, scale = slow_improve(weight.double().numpy(), *twin, with_damping(hessian), form.bits)
    found, fitted = solve.improve(weight, values, damped(hessian, 0.01), form, params, 1)
    assert np.array_equal(found.numpy(), expected)
    assert np.allclose(fitted["scale"].double().numpy(), scale, rtol=2e-3)


@pytest.mark.parametrize("text", ["int3(group=8)", "int3(channel)", "int3(tensor)", "int4(group=16, signed)"])
def test_no_sweep_makes_the_error_larger_and_the_first_makes_it_less(text: str) -> None:
    form, weight, hessian = parse_format(text), layer().float_weight(), damped(moments(inputs()), 0.01)
    params = form.fit(weight)
    before = {name: value.clone() for name, value in params.items()}
    codes, values = form.quantize(weight, params, torch.arange(24))
    errors = [weighted_error(weight - values, hessian)]
    for sweeps in range(1, 5):
        codes, fitted = solve.improve(weight, values, hessian, form, params, sweeps)
        errors.append(weighted_error(weight - form.pack(codes, fitted, (6, 24)).dequantize(), hessian))
    assert all(after <= last * (1 + 1e-6) for last, after in pairwise(errors))
    assert errors[1] < errors[0]
    assert all(torch.equal(params[name], before[name]) for name in params)


def test_layers_that_share_inputs_come_out_as_if_each_were_alone() -> None:
    layers = {name: replace(layer(rows, seed=rows), name=name) for rows, name in ((6, "q"), (3, "k"), (1, "v"))}
    stats, item = LayerStats(moments(inputs()), tokens=200), Gptq(format="int3(group=8)")
    items = {"q": item, "k": item, "v": Gptq(format="int4(group=12, asymmetric)", refit=0)}
    found = item.block(Block("block", layers, layers, items, {}, dict.fromkeys(layers, stats)))
    for name, one in layers.items():
        torch.testing.assert_close(found.layers[name].float_weight(), items[name].layer(one, stats).float_weight())


def test_a_block_whose_inputs_are_all_zero_stays_finite() -> None:
    solved = Gptq(bits=4, group_size=8).layer(layer(), LayerStats(torch.zeros(24, 24), tokens=200))
    assert torch.count_nonzero(solved.float_weight()) == 0


@pytest.mark.parametrize(
    "text", ["int4(group=8)", "int3(channel)", "int2(group=8, asymmetric)", "int4(group=8, signed)"]
)
def test_gptq_leaves_less_output_error_than_rounding(text: str) -> None:
    one, hessian = layer(), moments(inputs())
    rounded = Rtn(format=text).layer(one, LayerStats())
    solved = Gptq(format=text).layer(one, LayerStats(hessian, tokens=200))
    before = weighted_error(rounded.float_weight() - one.float_weight(), hessian)
    assert weighted_error(solved.float_weight() - one.float_weight(), hessian) < before


def test_inputs_that_were_never_on_do_not_break_the_solve() -> None:
    values = inputs()
    values[:, 5] = 0
    solved = Gptq(bits=4, group_size=8).layer(layer(), LayerStats(moments(values), tokens=200)).float_weight()
    assert bool(torch.isfinite(solved).all())
    assert torch.count_nonzero(solved[:, 5]) == 0


def test_too_few_tokens_are_noted() -> None:
    notes = Gptq(bits=4, group_size=8).layer(layer(), LayerStats(moments(inputs(10)), tokens=10)).notes
    assert any("only 10 tokens for 24 inputs" in note for note in notes)


def test_the_pass_leaves_its_input_alone() -> None:
    one = layer()
    before = one.float_weight().clone()
    values = inputs()
    values[:, 5] = 0
    Gptq(bits=4, group_size=8).layer(one, LayerStats(moments(values), tokens=200))
    assert torch.equal(one.float_weight(), before)
