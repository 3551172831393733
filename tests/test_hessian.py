"""Second moments, and the errors of outputs that the report takes from them, against plain products over all tokens."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.engine import collect
from compress.inputs.datasets import Calibration, calibrate
from compress.maths import hessian
from compress.models import placing
from compress.models.model import Model
from compress.pipeline import Pipeline, Result
from compress.records import LayerResult, OutputReference, PassResult
from compress.report.detail_rows import _against

LATE = "model.layers.1.mlp.down_proj"


def rows(seed: int, tokens: int = 200, features: int = 20) -> Tensor:
    maker = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, features, generator=maker) @ torch.randn(features, features, generator=maker)


def test_a_factor_of_reordered_columns_is_that_of_the_reordered_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "TRIANGLE_STEP", 6)
    values = rows(0)
    moments, order = values.T @ values / len(values), torch.randperm(20, generator=torch.Generator().manual_seed(1))
    factor, used, tries = hessian.inverse_factor(moments, 0.01, order)
    again, _, _ = hessian.inverse_factor(moments[order][:, order], 0.01)
    torch.testing.assert_close(factor, again)
    damping = used * moments.diagonal().mean() * torch.eye(20)
    wanted = torch.linalg.inv((moments + damping)[order][:, order].double()).float()
    torch.testing.assert_close(factor.T @ factor, wanted, rtol=1e-3, atol=1e-4)
    assert tries == 0 and torch.equal(factor, factor.triu())


@pytest.mark.parametrize("step", [6, 256])
def test_errors_are_those_of_the_outputs_whatever_the_strips(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "TRIANGLE_STEP", step)
    now, drift = rows(0), 0.3 * rows(2)
    source, made = torch.randn(2, 7, 20, generator=torch.Generator().manual_seed(3)).unbind()
    moments = [first.T @ second / len(now) for first, second in ((now, now), (drift, now), (drift, drift))]
    assert hessian.weighted_error(made, moments[0]) == pytest.approx(
        float((now @ made.T).square().sum() / len(now)), rel=1e-5
    )
    error, power = hessian.stream_error(made, source, *moments)
    wanted = (now + drift) @ source.T
    assert error == pytest.approx(float((now @ made.T - wanted).square().sum() / len(now)), rel=1e-4)
    assert power == pytest.approx(float(wanted.square().sum() / len(now)), rel=1e-4)


def test_an_error_never_falls_below_zero() -> None:
    source, values = torch.eye(4), torch.eye(4)
    assert hessian.stream_error(source, source, values, 0 * values, -values) == (0.0, 0.0)


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    return compress.load(llama)


@pytest.fixture(scope="module")
def calibration(model: Model, text_file: Path) -> Calibration:
    return calibrate(model, text_file, samples=16, length=32)


def late_outputs(model: Model, batches: list[Tensor]) -> Tensor:
    """What the layer `LATE` puts out, by nothing but a forward pass of the whole model."""
    module, seen = placing.whole_module(model), list[Tensor]()
    child = module.get_submodule(LATE)
    assert isinstance(child, nn.Linear)
    child.register_forward_hook(lambda _module, _inputs, output: seen.append(output.flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            module(input_ids=batch)
    return torch.cat(seen)


def reported(result: Result) -> tuple[float, str]:
    [row] = [row for row in result.passes[-1].layers if row.layer == LATE]
    assert row.output_error is not None
    return row.output_error, row.output_reference


def test_output_errors_are_taken_against_the_uncompressed_model_where_its_stream_was_carried(
    model: Model, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "DRIFT_STEP", 1)  # of all tokens, so that the twin agrees exactly
    made = Pipeline.parse("gptq(format=int2(group=16))").run(model, calibration)
    wanted, found = (late_outputs(each, calibration.batches()) for each in (model, made.model))
    error, reference = reported(made)
    assert reference == "reference stream"
    assert error == pytest.approx(float((found - wanted).square().sum() / wanted.square().sum()), rel=1e-2)


def test_without_that_stream_they_are_taken_on_the_same_inputs(model: Model, calibration: Calibration) -> None:
    made = Pipeline.parse("gptq(format=int2(group=16), mismatch=0)").run(model, calibration)
    error, reference = reported(made)
    assert reference == "same inputs" and 0 < error < 1


def test_the_report_says_what_output_errors_are_taken_against() -> None:
    def told(*references: OutputReference) -> str:
        layers = (
            LayerResult(layer="0", users=("0",), pass_text="gptq", changed=True, output_reference=each)
            for each in references
        )
        return _against([PassResult(pass_text="gptq", matches={}, layers=tuple(layers), seconds=0.0)])

    assert "same inputs" in told("same inputs") and "uncompressed" not in told("same inputs")
    assert "same inputs" not in told("reference stream") and "uncompressed model" in told("reference stream")
    assert "same inputs" in told("reference stream", "same inputs")
