"""ONNX files as models: their layers, the same outputs as ONNX Runtime, INT8 from file to artifact."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

import compress
from compress.__main__ import main
from compress.artifact import export, open_artifact, profile, verify
from compress.engine.image_stream import image_logits
from compress.engine.store import open_store
from compress.errors import InputError, UsageError
from compress.inputs.images import read_images
from compress.models.loading import load
from compress.models.model import Task
from compress.pipeline import Pipeline
from compress.quality.outputs import score_outputs, summarize_outputs
from compress.report import load as load_report

onnx_graphs = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("onnx_graphs.py"))))
PROFILE = "cpu-x86-avx512-vnni"
INT8 = "rtn(format=int8(channel)), act_quant(static=true)"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both models, how pixels enter them, and images that are labelled by the classifier itself."""
    folder = tmp_path_factory.mktemp("onnx")
    for name in ("classifier", "detector"):
        onnx_graphs.save(getattr(onnx_graphs, name)(), folder / f"{name}.onnx")
    (folder / "preprocessing.json").write_text('{"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}')
    pixels = np.random.default_rng(1).integers(0, 256, (60, *onnx_graphs.SIZE), np.uint8)
    session = onnxruntime.InferenceSession(str(folder / "classifier.onnx"))
    logits = session.run(None, {"input": ((pixels / 255 - 0.5) / 0.25).astype(np.float32)})[0]
    np.savez(folder / "labelled.npz", images=pixels, labels=logits.argmax(1))
    np.savez(folder / "plain.npz", images=pixels.transpose(0, 2, 3, 1))
    return folder


def test_layers_are_named_after_their_nodes_and_normalisations_are_folded(given: Path) -> None:
    model = load(given / "classifier.onnx")
    layers = model.structure.layers
    assert model.task is Task.IMAGE and list(layers) == ["stem.Conv", "block.0.deep.Conv", "fc.Gemm", "head.MatMul"]
    assert [(spec.shape, spec.groups, spec.has_bias) for spec in layers.values()] == [
        *(((8, 27), 1, True), ((8, 9), 8, True), ((16, 288), 1, True), ((5, 16), 1, False)),
    ]
    assert b"BatchNormalization" not in model.image.graph and model.structure.head == "head.MatMul"  # type: ignore[union-attr]
    assert list(load(given / "detector.onnx").structure.layers) == ["Conv_0", "Conv_2", "Conv_6"]


@pytest.mark.parametrize("name", ["classifier", "detector"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_module_computes_what_onnx_runtime_does(given: Path, name: str, count: int) -> None:
    model = load(given / f"{name}.onnx")
    images = torch.randn(count, *onnx_graphs.SIZE, generator=torch.Generator().manual_seed(3))
    found = next(image_logits(model, [images]))
    session = onnxruntime.InferenceSession(str(given / f"{name}.onnx"))
    own = model.image.input  # type: ignore[union-attr]
    each = [session.run(None, {own: one[None].numpy()}) for one in images]
    expected = torch.stack([torch.cat([torch.from_numpy(part).flatten() for part in parts]) for parts in each])
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [9, 11, 17])
def test_older_opsets_are_raised(tmp_path: Path, opset: int) -> None:
    model = load(onnx_graphs.save(onnx_graphs.classifier(opset), tmp_path / "model.onnx"))
    assert len(model.structure.layers) == 4
    raised = onnx.ModelProto.FromString(model.image.graph)  # type: ignore[union-attr]
    assert {item.domain: item.version for item in raised.opset_import}[""] == 21


def test_a_classifier_goes_through_int8_with_its_accuracy(given: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["run", str(given / "classifier.onnx"), "--passes", INT8, "--profile", PROFILE, "-o", str(out)]
    assert main([*arguments, "--data", str(given / "labelled.npz"), "--budget", "0.1", "--quiet"]) == 0
    report = load_report(out)
    assert report.operators == {"MatMulIntegerToFloat": 2, "QDQ+Conv": 2}
    assert report.verification is not None and report.verification.agrees
    assert report.baseline_quality and report.artifact_quality
    assert report.baseline_quality.metrics["accuracy"].value == 1
    assert report.artifact_quality.metrics["accuracy"].value > 0.8
    made = onnx.load(str(out / "onnx" / "model.onnx"))
    assert [value.name for value in (*made.graph.input, *made.graph.output)] == ["input", "output"]
    kinds = {tensor.data_type for tensor in made.graph.initializer if tensor.name.endswith(".codes")}
    assert kinds == {TensorProto.INT8}
    (given / "classifier.onnx").rename(given / "away.onnx")  # an artifact needs its source no more
    try:
        assert verify(out).agrees
        again = export(open_artifact(out), profile=PROFILE, out=tmp_path / "again").folder
    finally:
        (given / "away.onnx").rename(given / "classifier.onnx")
    assert (again / "onnx" / "model.onnx").read_bytes() == (out / "onnx" / "model.onnx").read_bytes()


def test_a_detector_goes_through_int8_with_the_agreement_of_its_outputs(
    given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    passes = "[{gptq: {format: int8(channel)}}, {act_quant: {static: true}}, bias_correct]"
    recipe.write_text(f"passes: {passes}\nquality: {{gates: {{relative_error: 0.1}}}}\n")
    arguments = ["run", str(given / "detector.onnx"), "--recipe", str(recipe), "--profile", PROFILE, "-o", str(out)]
    assert main([*arguments, "--data", str(given / "plain.npz"), "--budget", "0.1", "--quiet"]) == 0
    report = load_report(out)
    assert report.operators == {"QDQ+Conv": 3} and report.artifact_quality and report.speed
    found = report.artifact_quality.metrics
    assert set(found) >= {"cosine", "relative_error", "cosine[scores]", "relative_error[boxes]"}
    assert 0 < found["relative_error"].value < 0.1 and found["cosine"].value > 0.99
    assert [timing.name for timing in report.speed.timings] == ["infer batch 1"]  # all that it takes
    assert [timing.name for timing in profile(out, budget_s=0.1).timings] == ["infer batch 1"]
    engine: Any = compress.load(out, anyway=True)
    assert engine.predict(given / "plain.npz").shape == (60, 64 * 6)
    capsys.readouterr()
    source = str(given / "plain.npz")
    assert main(["predict", str(out), "--input", source, "--anyway", "-o", str(tmp_path / "p.npz")]) == 0
    with np.load(tmp_path / "p.npz") as arrays:
        assert arrays["scores"].shape == (60, 64, 2) and arrays["boxes"].shape == (60, 64, 4)
    assert main(["predict", str(out), "--input", source, "--anyway", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["rows"][0]["outputs"]) == {"scores", "boxes"}
    assert main(["predict", str(out), "--input", source, "--anyway", "--top", "2"]) == 2


def test_a_store_gives_the_same_model_back(given: Path, tmp_path: Path) -> None:
    result = Pipeline.parse(INT8).run(load(given / "detector.onnx"), given / "plain.npz", folder=tmp_path)
    images = torch.randn(2, *onnx_graphs.SIZE, generator=torch.Generator().manual_seed(0))
    again = open_store(tmp_path)
    assert torch.equal(*(next(image_logits(model, [images])) for model in (result.model, again)))
    (tmp_path / "graph.onnx").write_bytes(onnx_graphs.detector().SerializeToString())
    with pytest.raises(InputError, match="not a graph of a compress store"):
        open_store(tmp_path)


def test_pixels_enter_as_the_file_beside_the_model_says(given: Path, tmp_path: Path) -> None:
    model = load(given / "classifier.onnx")
    assert model.image is not None and not model.warnings
    images = read_images(given / "labelled.npz", model.image)
    assert images.preprocessing == "(x / 255 - [0.5, 0.5, 0.5]) / [0.25, 0.25, 0.25]"
    alone = load(onnx_graphs.save(onnx_graphs.classifier(), tmp_path / "model.onnx"))
    assert "x / 255" in alone.warnings[0]
    for text in (
        *('{"mean": [1]}', "[]", "{", '{"mean": [0.5], "std": [1]}', '{"mean": [0,0,0], "std": [0,1,1]}'),
        *('{"mean": [0,0,NaN], "std": [1,1,1]}', '{"mean": [0,0,0], "std": [1,NaN,1]}'),
    ):
        (tmp_path / "preprocessing.json").write_text(text)
        with pytest.raises(InputError, match=r"preprocessing.json") as told:
            load(tmp_path / "model.onnx")
        assert "Error(" not in str(told.value)  # no words of Python's


def test_images_may_be_stored_under_the_name_of_the_input(given: Path, tmp_path: Path) -> None:
    image = load(given / "classifier.onnx").image
    assert image is not None
    values = np.zeros((5, *onnx_graphs.SIZE), np.float32)
    np.savez(tmp_path / "data.npz", input=values, labels=np.zeros(5, np.int64))
    assert len(read_images(tmp_path / "data.npz", image)) == 5
    np.savez(tmp_path / "data.npz", input=values)
    with pytest.raises(InputError, match="no array 'labels'"):
        read_images(tmp_path / "data.npz", image)


def test_outputs_are_scored_one_by_one() -> None:
    reference = torch.tensor([[3.0, 4, 1], [0, 0, 2]])
    found = torch.tensor([[3.0, 4, 2], [0, 0, torch.nan]])
    score = score_outputs(reference, found, [2, 1])
    assert score.cosine.tolist() == [[1, 1], [1, 0]]
    assert score.error.tolist() == [[0, 1], [0, torch.inf]]
    broken = score_outputs(found, reference, [2, 1])  # nor is anything like a reference that is no number
    assert broken.cosine[1].tolist() == [1, 0] and broken.error[1].tolist() == [0, torch.inf]
    turned = score_outputs(torch.tensor([[1.0, 0]]), torch.tensor([[1.0, 1]]), [2])
    assert turned.cosine.item() == pytest.approx(2**-0.5) and turned.error.item() == 1
    whole = summarize_outputs([turned, turned], ["out"], "compressed", "here", "p", "d")
    assert set(whole.metrics) == {"cosine", "relative_error"} and whole.metrics["relative_error"].value == 1
    with pytest.raises(ValueError, match="sizes"):
        score_outputs(reference, found, [2, 2])


def test_the_real_models_go_through(assets: Path) -> None:
    found = {}
    for name in ("mnist/mnist_cnn_a.onnx", "onnx_face/version-RFB-320.onnx"):
        model = load(assets / name)
        found[name] = (model.task, len(model.structure.layers))
        assert not any("left as they are" in text for text in model.warnings)
    assert list(found.values()) == [(Task.IMAGE, 4), (Task.OUTPUTS, 52)]
    face = load(assets / "onnx_face" / "version-RFB-320.onnx")
    with np.load(assets / "onnx_face" / "face_images.npz") as stored:
        pixels = torch.from_numpy(stored[stored.files[0]][:1]).permute(0, 3, 1, 2)
    output = next(image_logits(face, [(pixels.float() - 127) / 128]))
    with np.load(assets / "onnx_face" / "reference_outputs_RFB.npz") as reference:
        expected = np.concatenate([reference["scores"][:1].reshape(-1), reference["boxes"][:1].reshape(-1)])
    np.testing.assert_allclose(output[0].numpy(), expected, atol=2e-4)


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load(tmp_path / "none.onnx")
    assert main(["plan", str(tmp_path / "none.onnx"), "--passes", INT8]) == 2
