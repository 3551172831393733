"""GPTQ and its factor, against slow twins and against rounding."""

import numpy as np
import pytest
import torch

from compress.collect import LayerStats
from compress.errors import InputError
from compress.formats import parse_format
from compress.hessian import accumulate, inverse_factor, weighted_error
from compress.layer import Layer, LayerKind
from compress.passes.gptq import Gptq, compensate
from compress.passes.rtn import Rtn


def inputs(rows: int = 200, features: int = 24, seed: int = 0) -> torch.Tensor:
    maker = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=maker) @ torch.randn(features, features, generator=maker)


def layer(rows: int = 6, columns: int = 24, seed: int = 1) -> Layer:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return Layer("block.linear", LayerKind.LINEAR, weight, users=("block.linear",))


def moments(values: torch.Tensor) -> torch.Tensor:
    return accumulate(None, values) / values.shape[0]


def test_moments_add_up_over_batches() -> None:
    values = inputs()
    total = None
    for part in values.split(30):
        total = accumulate(total, part)
    assert torch.allclose(total, values.T @ values, rtol=1e-4, atol=1e-3)


def test_the_factor_squares_to_the_damped_inverse() -> None:
    hessian = moments(inputs())
    factor, used, tries = inverse_factor(hessian, 0.01)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(24, dtype=torch.float64)
    assert (used, tries) == (0.01, 0)
    assert torch.allclose(factor.double().T @ factor.double(), torch.linalg.inv(damped), rtol=1e-3, atol=1e-6)
    assert torch.equal(factor, factor.triu())


def test_damping_escalates_and_says_so() -> None:
    broken = torch.eye(4)
    broken[0, 1] = broken[1, 0] = 1.05  # not positive definite until the diagonal grows
    _, used, tries = inverse_factor(broken, 0.01)
    assert tries == 3
    assert used == pytest.approx(0.08)


def test_statistics_with_nan_are_refused_rather_than_rounded_silently() -> None:
    with pytest.raises(InputError, match="NaN"):
        inverse_factor(torch.full((3, 3), float("nan")), 0.01)


def slow_gptq(weight: np.ndarray, hessian: np.ndarray, form: object, params: dict, order: list[int]) -> np.ndarray:
    """Column by column with the inverse recomputed from the columns that are left (OBQ, eq. 2 of the paper)."""
    weight = weight.copy()
    result = np.zeros_like(weight)
    left = list(order)
    for column in order:
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        _, values = form.quantize(torch.tensor(weight[:, [column]]).float(), params, torch.tensor([column]))
        result[:, column] = values[:, 0].numpy()
        error = (weight[:, column] - result[:, column]) / inverse[0, 0]
        for place, other in enumerate(left[1:], 1):
            weight[:, other] -= error * inverse[0, place]
        left.pop(0)
    return result


@pytest.mark.parametrize("block", [1, 7, 128])
def test_compensation_equals_the_column_by_column_twin(block: int) -> None:
    form, one = parse_format("int3(group=8)"), layer()
    hessian, weight = moments(inputs()), one.float_weight()
    order = torch.argsort(hessian.diagonal(), descending=True)
    params = form.fit(weight)
    factor, _, _ = inverse_factor(hessian[order][:, order], 0.01)
    codes = compensate(weight[:, order].clone(), factor, form, params, order, block)
    packed = form.pack(codes[:, torch.argsort(order)], params, (6, 24)).dequantize()
    damped = hessian.double().numpy() + 0.01 * float(hessian.diagonal().mean()) * np.eye(24)
    expected = slow_gptq(weight.double().numpy(), damped, form, params, order.tolist())
    assert np.abs(packed.numpy() - expected).max() < 1e-4


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
