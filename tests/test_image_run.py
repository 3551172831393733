"""An image classifier from the command line to its report, and the verbs on its artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import compress
from compress.__main__ import main
from compress.artifact import evaluate_artifact, export, open_artifact, verify
from compress.errors import UsageError
from compress.inputs.datasets import calibrate
from compress.models.loading import load
from compress.pipeline import Pipeline
from compress.records import Report
from compress.report import load as load_report
from compress.report import to_html, to_markdown

PROFILE = "cpu-x86-avx512-vnni"


@pytest.fixture(scope="module")
def finished(cnn: str, images_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """One run of the real command."""
    out = tmp_path_factory.mktemp("run") / "out"
    recipe = out.with_name("recipe.yaml")
    recipe.write_text("passes: [{rtn: {format: int8(channel)}}]\nquality: {gates: {accuracy_change: -60}}\n")
    code = main(
        [
            *("run", cnn, "--recipe", str(recipe), "--profile", PROFILE, "--data", str(images_file)),
            *("-o", str(out), "--budget", "0.1", "--quiet"),
        ]
    )
    return out, code


@pytest.fixture(scope="module")
def report(finished: tuple[Path, int]) -> Report:
    return load_report(finished[0])


def test_a_run_ends_with_an_artifact_that_agrees_and_paired_accuracy(
    finished: tuple[Path, int], report: Report
) -> None:
    assert finished[1] == 0
    assert report.verification is not None and report.verification.agrees and report.verification.positions == 512
    assert report.operators == {"Cast+Mul+Conv": 5, "MatMulNBits": 1}
    assert report.artifact_bytes < report.source_bytes
    assert report.calibration["images"] == 64 and [gate.met for gate in report.gates] == [True]
    assert report.baseline_quality and report.artifact_quality and report.memory_quality
    metrics = report.artifact_quality.metrics
    before = report.baseline_quality.metrics["accuracy"]
    assert before.samples == 16 and 0.6 < before.value <= 1
    change = 100 * (metrics["accuracy"].value - before.value)
    assert metrics["accuracy_change"].value == pytest.approx(change, abs=1e-9)
    assert before.protocol == "top1/batch-32, preprocessing (x / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.3]"
    assert metrics["kl"].value < 0.05 and report.memory_quality.metrics["kl"].value < 0.05


def test_the_report_speaks_of_images(report: Report) -> None:
    assert report.speed is not None
    assert [timing.name for timing in report.speed.timings] == ["infer batch 1", "infer batch 4"]
    assert report.speed.baseline.peak_memory_bytes and report.speed.baseline.peak_memory_bytes > 10_000_000
    assert "accuracy change" in report.verdict and "infer batch 1" in report.verdict
    page = to_markdown(report)
    assert "baseline samples/s" in page and "tokens/s" not in page and "percentage points" in page
    assert "4 BatchNorm" in page and "in the baseline too" in page
    assert "infer" in to_html(report)


def test_the_artifact_names_its_code_and_says_how_its_inputs_are_made(finished: tuple[Path, int], cnn: str) -> None:
    out, _ = finished
    kept = json.loads((out / "model" / "structure.json").read_text())["module"]
    assert f"{kept['file']}:{kept['callable']}" == cnn and len(kept["sha256"]) == 64
    made = json.loads((out / "onnx" / "preprocessing.json").read_text())
    assert made["mean"] == [0.5, 0.4, 0.3] and made["input"]["height"] == 12
    assert sorted(path.name for path in (out / "onnx").iterdir()) == [
        "model.onnx",
        "model.onnx_data",
        "preprocessing.json",
    ]


def test_the_verbs_work_on_it(finished: tuple[Path, int], images_file: Path, tmp_path: Path) -> None:
    out, _ = finished
    assert verify(out).agrees
    found = evaluate_artifact(out, images_file)
    assert found.artifact.metrics["accuracy"].samples == 80
    assert found.baseline.metrics["accuracy"].value > 0.8
    made = export(open_artifact(out), profile=PROFILE, out=tmp_path / "again")
    for path in sorted((made.folder / "onnx").iterdir()):
        assert path.read_bytes() == (out / "onnx" / path.name).read_bytes()
    engine: Any = compress.load(out, anyway=True)  # the profile need not be this machine's
    assert engine.predict(images_file).shape == (80, 5)
    with pytest.raises(UsageError, match=r"kind image-classifier.*language model"):
        engine.generate("hello")


def test_passes_calibrate_on_images(cnn: str, images_file: Path) -> None:
    model = load(cnn)
    result = Pipeline.parse("gptq(format=int4(channel))").run(model, images_file)
    assert result.calibration is not None and result.calibration.summary()["images"] == 80
    assert all(layer.changed for layer in result.passes[0].layers) and len(result.passes[0].layers) == 6
    assert calibrate(model, images_file, samples=5).summary()["images"] == 5


def test_a_gate_that_images_do_not_have_is_refused(cnn: str, images_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("passes: [{rtn: {format: int8(channel)}}]\nquality: {gates: {perplexity: 3}}\n")
    assert main(["run", cnn, "--recipe", str(recipe), "--data", str(images_file), "-o", str(tmp_path / "o")]) == 2


def test_a_plan_needs_no_data(cnn: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", cnn, "--passes", "rtn(format=int8(channel))", "--profile", PROFILE, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [layer["kind"] for layer in found["layers"]] == ["conv"] * 5 + ["linear"]
    assert found["predicted_artifact_bytes"] > 5000 and not found["refusals"]
