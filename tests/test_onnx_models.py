"""ONNX files as models: their layers, the same outputs as ONNX Runtime, INT8 from file to artifact, and refusals."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import compress
from compress.__main__ import main
from compress.artifact import export, open_artifact, profile, verify
from compress.engine.image_stream import image_logits
from compress.engine.store import open_store
from compress.errors import CompressError, InputError, UnsupportedError
from compress.inputs.images import read_images
from compress.models.model import Task, load
from compress.models.onnx_interface import Feed, Interface
from compress.pipeline import Pipeline
from compress.progress import Progress
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
        with pytest.raises(InputError, match=r"preprocessing.json"):
            load(tmp_path / "model.onnx")


def test_images_may_be_stored_under_the_name_of_the_input(given: Path, tmp_path: Path) -> None:
    image = load(given / "classifier.onnx").image
    assert image is not None
    values = np.zeros((5, *onnx_graphs.SIZE), np.float32)
    np.savez(tmp_path / "data.npz", input=values, labels=np.zeros(5, np.int64))
    assert len(read_images(tmp_path / "data.npz", image)) == 5
    np.savez(tmp_path / "data.npz", input=values)
    with pytest.raises(InputError, match="no array 'labels'"):
        read_images(tmp_path / "data.npz", image)


def _with_input(model: onnx.ModelProto, dims: list[int | str], kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info(model.graph.input[0].name, kind, dims))
    return model


def _second_input() -> onnx.ModelProto:
    model = onnx_graphs.classifier()
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))
    return model


def _quantized() -> onnx.ModelProto:
    g = onnx_graphs.Graph()
    scale, zero = g.constant("s", np.float32(0.1)), g.constant("z", np.uint8(0))
    x = g.node("QuantizeLinear", ["input", scale, zero], "q")
    g.node("DequantizeLinear", [x, scale, zero], "output")
    return g.model(["batch", *onnx_graphs.SIZE], {"output": ["batch", *onnx_graphs.SIZE]})  # type: ignore[no-any-return]


def _without_layers() -> onnx.ModelProto:
    g = onnx_graphs.Graph()
    g.node("Relu", ["input"], "output")
    return g.model(["batch", *onnx_graphs.SIZE], {"output": ["batch", *onnx_graphs.SIZE]})  # type: ignore[no-any-return]


def _suppressed() -> onnx.ModelProto:
    g = onnx_graphs.Graph()
    x = g.node("Conv", ["input", g.weight("w", 1, 3, 3, 3)], "c")
    g.node("Cast", [g.node("NonZero", [x], "n")], "output", to=TensorProto.FLOAT)
    return g.model([1, *onnx_graphs.SIZE], {"output": ["axes", "found"]})  # type: ignore[no-any-return]


def _endless() -> onnx.ModelProto:
    """A loop of 2^62 turns: it is refused, not run."""
    g = onnx_graphs.Graph()
    scalar = {"turn": TensorProto.INT64, "go": TensorProto.BOOL, "more": TensorProto.BOOL, "found": TensorProto.INT64}
    turn, go, more, found = (helper.make_tensor_value_info(name, kind, []) for name, kind in scalar.items())
    pairs = (("go", "more"), ("turn", "found"))
    body = [helper.make_node("Identity", [value], [copy]) for value, copy in pairs]
    turns, yes = g.constant("turns", np.int64(2**62)), g.constant("yes", np.bool_(True))
    inner = helper.make_node("Loop", [turns, yes], ["all"])
    inner.attribute.append(helper.make_attribute("body", helper.make_graph(body, "body", [turn, go], [more, found])))
    branches = [
        helper.make_graph([*nodes, helper.make_node("Relu", ["input"], ["out"])], name, [], [_any("out")])
        for name, nodes in (("then", [inner]), ("otherwise", []))
    ]
    g.node("If", ["yes"], "output", then_branch=branches[0], else_branch=branches[1])
    return g.model(["batch", *onnx_graphs.SIZE], {"output": ["batch", *onnx_graphs.SIZE]})  # type: ignore[no-any-return]


def _any(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_endless, "has loops"),
        (lambda: _with_input(onnx_graphs.classifier(), [1, 3, 2**40, 2**20]), "more than 2 GiB"),
        (lambda: _with_input(onnx_graphs.classifier(), ["batch", 3, "height", "width"]), "make_dynamic_shape_fixed"),
        (_second_input, "first axes differ"),
        (_quantized, "quantized already"),
        (_without_layers, "no layer to compress"),
        (_suppressed, "non-maximum suppression"),
    ],
)
def test_graphs_that_cannot_be_compressed_are_refused_by_name(
    tmp_path: Path, make: Callable[[], onnx.ModelProto], said: str
) -> None:
    path = onnx_graphs.save(make(), tmp_path / "model.onnx")
    with pytest.raises(UnsupportedError, match=said):
        load(path)
    assert main(["plan", str(path), "--passes", INT8, "--profile", PROFILE]) == 4


def test_names_out_of_a_file_drive_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx_graphs.classifier()
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "\x1b[31m\u202eh"
    path = onnx_graphs.save(model, tmp_path / "model.onnx")
    assert main(["plan", str(path), "--passes", INT8, "--profile", PROFILE]) == 4
    told = capsys.readouterr().err
    assert "\\x1b[31m\\u202eh" in told and not {"\x1b", "\u202e"} & set(told)
    Progress().note("warning: \x1b[2J")
    assert capsys.readouterr().err == "warning: \\x1b[2J\n"


def test_what_looks_like_a_layer_and_is_none_is_told_of(tmp_path: Path) -> None:
    g = onnx_graphs.Graph()
    x = g.node("Conv", ["input", g.weight("w", 4, 3, 3, 3)], "c", "first", pads=[1, 1, 0, 0])
    x = g.node("ConvTranspose", [x, g.weight("v", 4, 2, 2, 2)], "t", "up")
    shared = g.weight("u", 2, 2, 1, 1)
    x = g.node("Conv", [g.node("Conv", [x, shared], "d", "one"), shared], "output", "two")
    model = load(onnx_graphs.save(g.model(["n", 3, 12, 12], {"output": ["n", 2, 12, 12]}), tmp_path / "model.onnx"))
    assert list(model.structure.layers) == ["one", "two"]
    told = " ".join(model.warnings)
    assert "first (padding" in told and "ConvTranspose up" in told and "2 layers share a weight" in told


@pytest.mark.parametrize("passes", ["smoothquant, " + INT8, "rotate, rtn(bits=4)", "rtn(bits=8), tune"])
def test_passes_that_trace_or_differentiate_are_refused_by_name(
    given: Path, passes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(given / "classifier.onnx"), "--passes", passes, "--profile", PROFILE]) == 4
    said = capsys.readouterr().err
    assert "is an ONNX graph" in said and "rtn, gptq" in said


def test_targets_that_take_no_graph_say_so(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", str(given / "classifier.onnx"), "--passes", INT8]
    for choice in (["--profile", "nvidia-t4"], ["--profile", PROFILE, "--target", "checkpoint"]):
        assert main([*plan, *choice]) == 4
        assert "target onnx only" in capsys.readouterr().err
    assert main([*plan, "--profile", PROFILE]) == 0


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"input": "i", "shape": [1], "batch": 0, "outputs": []}', "[" * 99_999]
)
def test_an_interface_that_is_none_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError, match="tell no interface"):
        Interface.read(text)
    whole = Interface((Feed("images", "float32", (3, 4, 5)),), 0, (("a", (2,)),))
    assert Interface.read(whole.text) == whole
    with pytest.raises(InputError, match="tell no interface"):
        Interface.read(whole.text.replace("4", "-4"))


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
    with pytest.raises(CompressError, match="No such file"):
        load(tmp_path / "none.onnx")
    assert main(["plan", str(tmp_path / "none.onnx"), "--passes", INT8]) == 2
