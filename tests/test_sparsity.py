"""What became zero, as a report shows it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import compress
from compress.inputs.datasets import quality_windows
from compress.inputs.windows import Windows
from compress.maths.masks import Pattern
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.quality.evaluate import stream_logits
from compress.quality.token_evaluate import TokenJudge
from compress.records import Quality, Report
from compress.records.sparsity import LayerSparsity, Sparsity
from compress.report import to_html, to_markdown
from compress.report.sparsity_rows import sparsity_note, sparsity_table
from helpers.fidelity_twin import twin_ece
from helpers.full_report import terminal
from helpers.reports import report_of


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Model:
    return compress.load(make_llama("sparsity", num_hidden_layers=1, intermediate_size=96))


def test_zeros_are_counted_in_the_final_weights_not_in_the_settings(model: Model) -> None:
    text = "magnitude(pattern=2:4, targets=[*.mlp.*]), rtn(format=int2(group=32))"
    found = Pipeline.parse(text).run(model)
    assert found.sparsity is not None
    assert {each.layer.rsplit(".", 1)[1] for each in found.sparsity.layers} == {"gate_proj", "up_proj", "down_proj"}
    for each in found.sparsity.layers:
        weight = found.model.layer(found.model.structure.layers[each.layer]).float_weight()
        assert (each.weights, each.zeros) == (weight.numel(), int((weight == 0).sum()))
        assert each.zeros > 0.5 * each.weights  # two bits round more of them to zero
        assert (each.pattern, each.asked, each.met) == ("2:4", 0.5, True)
    assert found.sparsity.weights == sum(
        spec.shape[0] * spec.shape[1] for spec in found.model.structure.layers.values()
    )


def test_a_model_that_nothing_pruned_has_no_such_record(model: Model) -> None:
    assert Pipeline.parse("rtn(format=int2(group=32))").run(model).sparsity is None


@pytest.mark.parametrize(
    ("text", "weight", "held"),
    [
        ("2:4", [[1, 0, 0, 2, 0, 0, 3, 4], [0, 0, 0, 0, 1, 1, 0, 0]], True),
        ("2:4", [[1, 0, 0, 2, 0, 5, 3, 4], [0, 0, 0, 0, 1, 0, 0, 0]], False),
        ("2:3", [[1, 0, 1, 1]], False),
        ("row", [[1, 0, 0, 2], [0, 0, 3, 0]], True),
        ("row", [[0, 0, 0, 0], [0, 1, 3, 1]], False),
        ("layer", [[0, 0, 0, 0], [1, 1, 1, 1]], True),
        ("layer", [[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 1]], False),
        ("2x2", [[0, 0, 1, 0], [0, 0, 0, 1]], True),
        ("2x2", [[0, 0, 1, 0], [1, 0, 0, 0]], False),
        ("4x2", [[0, 0]], False),
    ],
)
def test_a_pattern_is_held_or_not(text: str, weight: list[list[float]], held: bool) -> None:
    assert Pattern.parse(text).held(torch.tensor(weight), 0.5) is held


def report(met: bool = True) -> Report:
    layers = (
        LayerSparsity(layer="model.layers.0.up", weights=200, zeros=100, pattern="2:4", asked=0.5, met=True),
        LayerSparsity(layer="model.layers.1.up", weights=200, zeros=110, pattern="2:4", asked=0.5, met=met),
        LayerSparsity(layer="model.layers.1.down", weights=100, zeros=40),
    )
    return report_of(sparsity=Sparsity(layers=layers, weights=1000))


def test_every_page_shows_shares_the_pattern_and_that_a_mask_alone_is_size_only() -> None:
    rows = sparsity_table(report()).rows
    assert rows[0] == ("model.layers.*.up", "2", "2:4", "50.0%", "52.5%", "50.0%", "55.0%", "yes")
    assert rows[1][0] == "model.layers.1.down" and rows[1][-1] == "-"
    assert rows[-2][4] == "50.0%" and rows[-1][4] == "25.0%"
    for page in (to_markdown(report()), to_html(report()), terminal(report())):
        assert "Sparsity" in page and "52.5" in page and "size only at best" in " ".join(page.split())
    assert "size only at best" in " ".join(terminal(report(), full=False).split())


def test_a_broken_pattern_is_said_loudly() -> None:
    assert "NO: 1 of 2, model.layers.1.up first" in sparsity_table(report(met=False)).rows[0]
    assert "do NOT have the pattern" in sparsity_note(report(met=False))[0]


def test_a_report_of_a_dense_model_has_no_such_table() -> None:
    assert not sparsity_table(report_of()).rows and "Sparsity" not in to_markdown(report_of())


def test_the_record_survives_report_json() -> None:
    assert Report.model_validate_json(report().model_dump_json()).sparsity == report().sparsity


def judged(model: Model, changed: Model, windows: Windows, sharpness: float = 1.0) -> tuple[Quality, Quality]:
    """Quality of a model and of what was made of it, whose logits are multiplied."""
    judge = TokenJudge(windows)
    rows = [windows.rows()[place] for place in judge.order]
    for place, first, second in zip(judge.order, stream_logits(model, rows), stream_logits(changed, rows), strict=True):
        judge.see(place, first, second * sharpness, first, second * sharpness)
    before, after, _ = judge.qualities("torch", None)
    return before, after


def answers(model: Model, windows: Windows, sharpness: float) -> tuple[list[float], list[float]]:
    """Confidence of the top answer and whether it is right, over all tokens."""
    confidence: list[float] = []
    right: list[float] = []
    for row, logits in zip(windows.rows(), stream_logits(model, windows.rows()), strict=True):
        top = (logits[:-1].double() * sharpness).softmax(-1).max(-1)
        confidence += top.values.tolist()
        right += (top.indices == row[1:]).double().tolist()
    return confidence, right


@pytest.mark.parametrize("sharpness", [1.0, 40.0], ids=["as pruned", "as pruned, and too sure of itself"])
def test_a_pruned_model_is_judged_by_its_calibration_too(sharpness: float, model: Model, text_file: Path) -> None:
    pruned = Pipeline.parse("magnitude(sparsity=0.6)").run(model).model
    windows = quality_windows(model, text_file, length=64, samples=12)
    assert isinstance(windows, Windows)
    before, after = judged(model, pruned, windows, sharpness)
    found, expected = twin_ece(*answers(pruned, windows, sharpness)), twin_ece(*answers(model, windows, 1.0))
    assert after.metrics["ece"].value == pytest.approx(found, abs=1e-6)
    assert after.metrics["ece_change"].value == pytest.approx(found - expected, abs=1e-6)
    assert after.metrics["ece_change"].interval is not None and before.metrics["ece"].value == pytest.approx(expected)
    page = to_markdown(report_of(baseline_quality=before, artifact_quality=after))
    assert "calibration error" in page and "calibration error, change" in page


def test_a_model_that_answers_alike_and_is_too_sure_shows_it(model: Model, text_file: Path) -> None:
    """Same top tokens, another confidence: only the calibration error tells."""
    pruned = Pipeline.parse("magnitude(sparsity=0.6)").run(model).model
    windows = quality_windows(model, text_file, length=64, samples=12)
    assert isinstance(windows, Windows)
    (_, calm), (_, sure) = (judged(model, pruned, windows, each) for each in (1.0, 40.0))
    assert calm.metrics["top1_agreement"].value == sure.metrics["top1_agreement"].value
    change = sure.metrics["ece_change"].interval
    assert change is not None and change.low > 0.1 > abs(calm.metrics["ece_change"].value)
