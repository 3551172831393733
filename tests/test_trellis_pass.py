"""The pass `trellis`: its solver's parts against their plain definitions, and what a run of it may be trusted with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import compress
from compress import solve, solve_trellis
from compress.engine.applying import checked
from compress.engine.blockpass import Block
from compress.engine.in_turn import Systems
from compress.engine.layer_stats import LayerStats
from compress.errors import CompressError, UsageError
from compress.formats.base import QuantTensor
from compress.formats.trellis import Trellis
from compress.inputs.datasets import calibrate
from compress.layer import Layer, LayerKind
from compress.maths.hessian import damped, weighted_error
from compress.passes import find
from compress.pipeline import Pipeline, planned
from compress.training.code_step import CodeStep
from compress.training.soft_trellis import SoftTrellis

FORM = Trellis(2, block=16)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(size: int) -> Tensor:
    """Of inputs that go together, of unlike sizes."""
    inputs = gaussian(400, size, seed=1) @ gaussian(size, size, seed=2) * torch.linspace(0.2, 2, size)
    return damped(inputs.T @ inputs / 400, 0.01)


def coded(order: str = "static", rows: int = 32, columns: int = 64) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    target, hessian = gaussian(rows, columns), moments(columns)
    params = FORM.fit(target, importance=hessian.diagonal())
    return target, hessian, params, solve_trellis.encode(FORM, target, hessian, params, order)


def lost(target: Tensor, hessian: Tensor, codes: Tensor, params: dict[str, Tensor]) -> float:
    shape = (target.shape[0], target.shape[1])
    return weighted_error(target - FORM.pack(codes, params, shape).dequantize(), hessian)


def test_what_is_coded_meets_the_second_moments_turned_with_it() -> None:
    hessian, suh, svh = moments(32), gaussian(32, seed=3).exp(), torch.ones(16)
    inner = gaussian(32, 16)
    turned = solve_trellis.turned_moments(FORM, hessian, suh)
    expected = weighted_error(FORM.turn_back(inner, suh, svh), hessian)
    assert weighted_error(inner.T, turned) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("order", "share"), [("static", 0.7), ("given", 0.95)])
def test_later_rows_of_tiles_absorb_what_is_lost(order: str, share: float) -> None:
    target, hessian, params, codes = coded(order)
    plain = FORM.quantize(target, params, torch.arange(64))[0]
    assert codes.shape == plain.shape
    assert lost(target, hessian, codes, params) < share * lost(target, hessian, plain, params)


def test_inputs_that_are_alike_leave_nothing_to_absorb() -> None:
    target = gaussian(16, 32)
    params = {"suh": torch.ones(32), "svh": torch.ones(16)}
    codes = solve_trellis.encode(FORM, target, torch.eye(32), params, "static")
    assert torch.equal(codes, FORM.quantize(target, params, torch.arange(32))[0])


def test_refitted_scales_never_lose_more_and_are_what_storage_holds() -> None:
    target, hessian, params, codes = coded()
    errors = [lost(target, hessian, codes, params)]
    for sweeps in (1, 2, 3):
        found = solve_trellis.refit(FORM, target, hessian, codes, params, sweeps)
        assert all(torch.equal(value, value.half().float()) for value in found.values())
        errors.append(lost(target, hessian, codes, found))
    assert errors == sorted(errors, reverse=True) and errors[1] < errors[0]


def test_scales_of_rows_and_columns_are_those_of_the_normal_equations() -> None:
    target, unit, hessian = gaussian(5, 6), gaussian(5, 6, seed=1), moments(6)
    root = torch.linalg.cholesky(hessian.double())
    rows = solve.row_scales(target, unit, hessian)
    for row in range(5):
        plain = torch.linalg.lstsq((unit[row].double() @ root)[:, None], target[row].double() @ root).solution
        assert float(rows[row]) == pytest.approx(float(plain), rel=1e-4)
    design = torch.stack([(torch.outer(unit[:, at], torch.eye(6)[at]).double() @ root).flatten() for at in range(6)], 1)
    expected = torch.linalg.lstsq(design, (target.double() @ root).flatten()[:, None]).solution[:, 0]
    found = solve.column_scales(target, unit, hessian)
    assert found is not None
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-4)


def test_a_layer_that_no_token_reached_is_coded_as_if_its_inputs_were_alike_and_says_so() -> None:
    one = {"m": Layer("m", LayerKind.LINEAR, gaussian(16, 32))}
    item = find("trellis").build({"format": "trellis(bits=4, block=16)"})
    done = item.block(Block("b", one, one, {"m": item}, {}, {"m": LayerStats()})).layers["m"]  # type: ignore[attr-defined]
    assert "no calibration token" in done.notes[0]
    assert float((done.float_weight() - gaussian(16, 32)).square().mean()) < 0.01


def test_without_compiled_kernels_torch_finds_the_same_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"m": Layer("m", LayerKind.LINEAR, gaussian(16, 16))}
    item = find("trellis").build({"format": "trellis(bits=3, block=16)"})
    block = Block("b", one, one, {"m": item}, {}, {"m": LayerStats(moments(16), tokens=400)})
    here = item.block(block).layers["m"]  # type: ignore[attr-defined]
    monkeypatch.setenv("COMPRESS_KERNELS", "torch")
    found = item.block(block).layers["m"]  # type: ignore[attr-defined]
    _, row = checked(item, one["m"], found, one["m"], LayerStats(), "trellis", 0.0)
    assert any("searched by torch" in note for note in row.notes)
    torch.testing.assert_close(found.float_weight(), here.float_weight())


def test_a_run_codes_every_layer_with_the_width_it_was_given(make_llama: Callable[..., Path], text_file: Path) -> None:
    model = compress.load(make_llama("one", num_hidden_layers=1))
    data = calibrate(model, text_file, samples=8, length=32)
    text = "trellis(format=trellis(bits=2, block=32), overrides={*.o_proj: {bits: 4}})"
    found, again = (Pipeline.parse(text).run(model, data).model for _ in range(2))
    for name, spec in found.structure.layers.items():
        weight, same = found.layer(spec).weight, again.layer(spec).weight
        if spec.format is not None:
            assert isinstance(weight, QuantTensor) and isinstance(same, QuantTensor)
            assert spec.format == Trellis(4 if "o_proj" in name else 2, block=32)
            assert all(torch.equal(same.tensors[part], tensor) for part, tensor in weight.tensors.items())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("trellis(format=int4(group=32))", "no trellis.*gptq"),
        ("trellis(bits=9)", "less than or equal to 8"),
        ("trellis(format=trellis(bits=2), bits=3)", "contradict each other"),
        ("trellis(group_size=32)", "group_size is for integer formats"),
        ("trellis(sequential=false, mismatch=0.5)", "needs sequential=true"),
        ("trellis(overrides={*: {mismatch: 0}})", "may not set mismatch"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Pipeline.parse(text)


def test_a_model_of_other_sizes_is_refused_before_work_starts(llama: Path) -> None:
    with pytest.raises(CompressError, match=r"128 input columns.*q_proj has 64.*smaller blocks.*ignore="):
        planned(Pipeline.parse("trellis").resolve(compress.load(llama)))


def soft() -> SoftTrellis:
    form = Trellis(3, block=16)
    params = form.fit(gaussian(32, 32))
    codes = form.quantize(gaussian(32, 32), params, torch.arange(32))[0]
    return SoftTrellis(Layer("m", LayerKind.LINEAR, form.pack(codes, params, (32, 32))))


def test_scales_take_the_gradient_of_the_weight_and_are_stored_as_trained() -> None:
    one = soft()
    assert torch.equal(one.weight(), one.layer.float_weight())
    for factor in one.factors:
        factor.requires_grad_()
    (one.weight() * gaussian(32, 32, seed=4)).sum().backward()
    step = torch.tensor(2.0**-8)
    for factor in one.factors:
        assert factor.grad is not None
        expected = float(factor.grad[7])
        before = (one.weight() * gaussian(32, 32, seed=4)).sum()
        with torch.no_grad():
            factor[7] += step
        after = (one.weight() * gaussian(32, 32, seed=4)).sum()
        assert float((after - before) / step) == pytest.approx(expected, rel=0.2)
    torch.testing.assert_close(one.rounded().float_weight(), one.weight().detach())


def test_codes_of_the_tiles_that_are_furthest_follow_a_wish_and_no_others() -> None:
    one = soft()
    before, target = one.held.clone(), one.weight().clone()
    wish = target.clone()
    wish[:16, :16] += 0.5 * gaussian(16, 16, seed=5)
    one.reencode(wish, 0.25, 1)
    changed = (one.held != before).any(-1)
    assert changed[0, 0] and int(changed.sum()) == 1
    assert float((one.weight() - wish).square().sum()) < float((target - wish).square().sum())


@pytest.mark.parametrize("method", ["tune", "pv_tuning"])
def test_tuning_trains_the_scales_of_a_trellis(method: str, make_llama: Callable[..., Path], text_file: Path) -> None:
    model = compress.load(make_llama("one", num_hidden_layers=1))
    data = calibrate(model, text_file, samples=8, length=32)
    start = "trellis(format=trellis(bits=2, block=32), mismatch=0)"
    coded, tuned = (Pipeline.parse(text).run(model, data).model for text in (start, f"{start}, {method}(steps=3)"))
    for name, spec in coded.structure.layers.items():
        first, second = coded.layer(spec).weight, tuned.layer(spec).weight
        if spec.format is not None:
            assert isinstance(first, QuantTensor) and isinstance(second, QuantTensor)
            assert not torch.equal(first.tensors["svh"], second.tensors["svh"]), name
            # a tile changes once its weights have come as far as the codes' own error
            assert torch.equal(first.tensors["trellis"], second.tensors["trellis"]), name


@pytest.mark.parametrize("share", [1.0, 0.1, 1e-3, 1e-5])
def test_a_step_of_codes_comes_no_further_from_a_wish_however_small_a_row_is(share: float) -> None:
    form, weight = Trellis(2, block=16), gaussian(32, 32)
    weight[3] *= share
    params = form.fit(weight)
    codes = form.quantize(weight, params, torch.arange(32))[0]
    one = SoftTrellis(Layer("m", LayerKind.LINEAR, form.pack(codes, params, (32, 32))))
    wish = one.weight() + 0.5 * torch.randn(32, 32, generator=torch.Generator().manual_seed(7))
    before, held = float((wish - one.weight()).square().sum()), one.held.clone()
    one.reencode(wish, 1.0, 1)
    assert float((wish - one.weight()).square().sum()) <= before * (1 + 1e-6)
    assert share < 1 or not torch.equal(one.held, held)


def test_the_step_of_pv_tuning_stores_other_codes_once_weights_have_come_far_enough() -> None:
    one = soft()
    step, held = CodeStep(one, 1.0, 1, 0.0), one.held.clone()
    step.wish += 0.01 * torch.randn(32, 32, generator=torch.Generator().manual_seed(7))
    step.follow()
    assert torch.equal(one.held, held)
    step.wish += 0.5 * torch.randn(32, 32, generator=torch.Generator().manual_seed(8))
    before = float((step.wish - one.weight()).square().sum())
    step.follow()
    stored = one.rounded().weight
    assert isinstance(stored, QuantTensor) and isinstance(one.layer.weight, QuantTensor)
    assert not torch.equal(stored.tensors["trellis"], one.layer.weight.tensors["trellis"])
    assert float((step.wish - stored.dequantize()).square().sum()) < before


@pytest.mark.parametrize("size", [1e-6, 1e5])
def test_scales_of_very_small_and_very_large_weights_are_held(size: float) -> None:
    form, weight = Trellis(4, block=16), size * gaussian(32, 32)
    params = form.fit(weight)
    _, values = form.quantize(weight, params, torch.arange(32))
    assert float((values - weight).norm() / weight.norm()) < 0.1


def test_without_a_mismatch_the_plain_second_moments_are_not_factorised(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer("b.a", LayerKind.LINEAR, gaussian(32, 64), users=("b.a",))
    item = find("trellis").build({"format": "trellis(bits=2, block=16)", "mismatch": 0})
    known = {"b.a": LayerStats(hessian=moments(64), tokens=400)}
    block = Block("b", {"b.a": layer}, {"b.a": layer}, {"b.a": item}, {}, known)
    module = sys.modules[type(item).__module__]
    asked: list[int] = []

    def factorised(_: object, layer: Layer, stats: LayerStats, systems: Systems) -> solve.System:
        asked.append(1)
        return systems.of(layer, stats, 0.05, 1, "given")

    monkeypatch.setattr(Systems, "of", lambda *_: pytest.fail("factorised"))
    plain = item.block(block).layers["b.a"].float_weight()  # type: ignore[attr-defined]
    monkeypatch.undo()
    monkeypatch.setattr(module, "_system", factorised)
    assert torch.equal(item.block(block).layers["b.a"].float_weight(), plain)  # type: ignore[attr-defined]
    assert asked
