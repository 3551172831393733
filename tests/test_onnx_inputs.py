"""ONNX graphs of texts and of arrays by name: from a file or an exporter's folder to an artifact, and refusals."""

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

import compress
from compress import hwprofiles
from compress.__main__ import main
from compress.artifact import export, open_artifact, verify
from compress.engine.image_stream import image_logits
from compress.errors import InputError, UsageError
from compress.inputs import datasets
from compress.models.image_source import fitting
from compress.models.loading import load
from compress.models.model import Task
from compress.models.onnx_interface import Feed, Interface
from compress.quality.outputs import farthest
from compress.report import load as load_report
from conftest import save_tokenizer

onnx_graphs = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("onnx_graphs.py"))))
PROFILE = "cpu-x86-avx512-vnni"
INT8 = "rtn(format=int8(channel)), act_quant"
TEXTS = [f"{'a ' * (place % 7)}text of {place}" for place in range(40)]


def folder_of(model: onnx.ModelProto, folder: Path) -> Path:
    """As an exporter writes it, with a tokenizer."""
    onnx_graphs.save_folder(model, folder)
    save_tokenizer(folder)
    return folder


def run(source: Path, data: Path, out: Path, passes: str = INT8) -> int:
    given = ["run", str(source), "--passes", passes, "--profile", PROFILE, "-o", str(out), "--data", str(data)]
    return main([*given, "--budget", "0.1", "--quiet"])


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed."""
    monkeypatch.setattr("compress.run._measure", lambda *_: None)


def tokens(text: str, width: int) -> np.ndarray[Any, Any]:
    return np.array([[*text.encode(), *[0] * (width - len(text))]], np.int64)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(onnx_graphs.encoder(), tmp_path_factory.mktemp("encoder") / "encoder")


def test_an_exporters_folder_of_an_encoder_goes_through_with_its_texts(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "texts.txt", tmp_path / "out"
    data.write_text("\n".join(TEXTS))
    assert run(encoder, data, out) == 0
    report = load_report(out)
    assert report.request and report.request.task == "array-outputs"
    assert report.operators == {"DynamicQuantizeMatMul": 2}
    assert report.verification and report.verification.agrees and report.speed and report.speed.end_to_end
    assert report.speed.timings[0].name == "encode batch 1 prompt 24"
    assert report.artifact_quality and 0.99 < report.artifact_quality.metrics["cosine"].value < 1
    assert report.calibration["preprocessing"] == "texts of 22 tokens, shorter ones filled up"
    assert verify(out).agrees
    again = export(open_artifact(out), profile=PROFILE, out=tmp_path / "again").folder / "onnx"
    for name in ("model.onnx", "tokenizer.json", "preprocessing.json"):
        assert (again / name).read_bytes() == (out / "onnx" / name).read_bytes()
    engine: Any = compress.load(out, anyway=True)
    both = engine.predict(["one", "seven"], batch=2)["last_hidden_state"]
    assert both.shape == (2, 5, 16) and not both[0, 3:].any() and both[0, 2].any()
    np.testing.assert_allclose(engine.predict("seven")["last_hidden_state"], both[1:], rtol=0.05, atol=0.05)
    capsys.readouterr()
    assert main(["predict", str(out), "--text", "one", "--anyway", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["rows"][0]["outputs"]) == {"last_hidden_state"}
    assert main(["predict", str(out), "--text", "x" * 25, "--anyway"]) == 2
    assert main(["predict", str(out), "--text", "x" * 25, "--anyway", "--truncate"]) == 0
    for refused in (["--top", "2"], ["--pool", "mean"]):
        assert main(["predict", str(out), "--text", "one", "--anyway", *refused]) == 2


def test_a_text_is_read_as_the_graph_alone_reads_it_however_it_is_filled_up(encoder: Path) -> None:
    model, image = load(encoder), load(encoder).image
    assert image and image.interface and (model.task, model.vocabulary, model.longest) == (Task.ARRAYS, 256, 24)
    session = onnxruntime.InferenceSession(str(encoder / "model.onnx"))
    ids = tokens("seven", 5)
    expected = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
    wide = tokens("seven", 9)
    rows = image.interface.of_tokens(wide, (wide > 0).astype(np.int64))
    found = next(image_logits(model, [torch.from_numpy(rows)])).reshape(9, 16)
    np.testing.assert_allclose(found[:5], expected[0], rtol=1e-4, atol=1e-5)
    assert not found[5:].any()


@pytest.mark.usefixtures("untimed")
def test_a_classifier_of_texts_is_judged_by_its_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder_of(onnx_graphs.encoder("logits"), tmp_path / "classifier")
    session = onnxruntime.InferenceSession(str(source / "model.onnx"))
    rows = []
    for text in TEXTS:
        ids = tokens(text, len(text))
        logits = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
        rows.append({"text": text, "label": int(logits.argmax())})
    data, out = tmp_path / "texts.jsonl", tmp_path / "out"
    data.write_text("\n".join(map(json.dumps, rows)))
    assert run(source, data, out, "gptq(format=int8(channel)), act_quant(static=true, observer=minmax)") == 0
    report = load_report(out)
    assert report.request and report.request.task == "classifier"
    assert report.baseline_quality and report.baseline_quality.metrics["accuracy"].value == 1
    assert report.artifact_quality and report.artifact_quality.metrics["accuracy"].value > 0.8
    capsys.readouterr()
    assert main(["predict", str(out), "--text", TEXTS[0], "--anyway", "--top", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["classes"][0]["class"] == rows[0]["label"]
    (tmp_path / "plain.txt").write_text("\n".join(TEXTS))
    assert run(source, tmp_path / "plain.txt", tmp_path / "no") == 2 and "label" in capsys.readouterr().err
    data.write_text('{"text": "a", "label": "b"}')
    assert run(source, data, tmp_path / "no") == 5 and "line 1: label is 'b'" in capsys.readouterr().err


def test_a_graph_of_a_fixed_batch_takes_any_number_of_samples(encoder: Path, tmp_path: Path) -> None:
    fixed = onnx_graphs.encoder()
    for value in fixed.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 2
    model, other = load(encoder), load(folder_of(fixed, tmp_path / "fixed"))
    assert other.image and other.image.interface and other.image.batch == 2
    rows = torch.from_numpy(other.image.interface.drawn(5, 6, np.random.default_rng(0)))
    found = next(image_logits(other, [rows]))
    assert found.shape == (5, 6 * 16)
    torch.testing.assert_close(found, next(image_logits(model, [rows])), rtol=1e-5, atol=1e-5)


def arrays(count: int = 30, **changes: Any) -> dict[str, Any]:
    drawn = np.random.default_rng(0)
    made = {
        "numbers": drawn.standard_normal((count, 6)).astype(np.float32),
        "place": drawn.integers(0, 9, (count, 1)),
        "switches": drawn.integers(0, 2, (count, 4)).astype(np.bool_),
    }
    return {**made, **changes}


def test_arrays_of_any_type_enter_by_name(tmp_path: Path) -> None:
    source = onnx_graphs.save(onnx_graphs.table(), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", **arrays())
    assert run(source, tmp_path / "data.npz", tmp_path / "out", "rtn(format=int8(channel))") == 0
    report = load_report(tmp_path / "out")
    assert report.artifact_quality and set(report.artifact_quality.metrics) >= {"cosine[price]", "cosine[map]"}
    assert report.calibration["samples"] == 24 and report.speed and report.speed.timings[0].phase == "infer"
    assert verify(tmp_path / "out").agrees
    engine: Any = compress.load(tmp_path / "out", anyway=True)
    expected = onnxruntime.InferenceSession(str(source)).run(
        None, {**arrays(), "place": arrays()["place"].astype("i4")}
    )
    for given in (tmp_path / "data.npz", arrays()):
        found = engine.predict(given)
        np.testing.assert_allclose(found["map"], expected[1], atol=0.1)
        assert found["map"].shape == (30, 2, 3) and found["price"].shape == (30, 1)
    with pytest.raises(UsageError, match="takes no texts"):
        engine.predict("a text")
    with pytest.raises(InputError, match="no array 'place'"):
        engine.predict({"numbers": arrays()["numbers"]})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"numbers": np.zeros((30, 5), np.float32)}, r"numbers is float32 \(30, 5\); the model takes float32 \(N, 6\)"),
        ({"numbers": np.full((30, 6), np.nan)}, "numbers holds NaN"),
        ({"place": np.zeros((29, 1), np.int64)}, "place is int64"),
        ({"place": np.zeros((30, 1))}, "place is float64; the model takes int32"),
        ({"place": np.full((30, 1), 2**24 + 1)}, "float32 is not exact"),
    ],
)
def test_arrays_that_do_not_fit_are_named(
    tmp_path: Path, changes: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = onnx_graphs.save(onnx_graphs.table(), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", **arrays(**changes))
    with pytest.raises(InputError, match=said):
        datasets.calibrate(load(source), tmp_path / "data.npz")
    assert run(source, tmp_path / "none.npz", tmp_path / "out") == 2
    assert "an .npz with an array for each input (numbers, place, switches)" in capsys.readouterr().err


def test_tokens_alone_are_enough_and_are_checked(encoder: Path, tmp_path: Path) -> None:
    model = load(encoder)
    np.savez(tmp_path / "ids.npz", input_ids=np.full((6, 11), 7))
    found: Any = datasets.calibrate(model, tmp_path / "ids.npz").windows
    assert found.pixels.shape == (6, 22) and found.pixels[:, 11:].eq(1).all()
    np.savez(tmp_path / "ids.npz", input_ids=np.full((6, 11), 256))
    with pytest.raises(InputError, match="token 256, but the vocabulary has 256"):
        datasets.calibrate(model, tmp_path / "ids.npz")
    (encoder / "tokenizer.json").rename(tmp_path / "away.json")
    try:
        (tmp_path / "texts.txt").write_text("a\nb\n")
        with pytest.raises(UsageError, match=r"Put tokenizer.json into its folder"):
            datasets.calibrate(model, tmp_path / "texts.txt")
    finally:
        (tmp_path / "away.json").rename(encoder / "tokenizer.json")


@pytest.mark.usefixtures("untimed")
def test_a_graph_of_one_length_takes_texts_of_that_length(tmp_path: Path) -> None:
    source = folder_of(onnx_graphs.encoder(length=8), tmp_path / "fixed")
    model = load(source)
    assert model.longest == 8 and model.image and model.image.shape == (16,)
    data = tmp_path / "texts.txt"
    data.write_text("\n".join(TEXTS))
    assert run(source, data, tmp_path / "out") == 0
    report = load_report(tmp_path / "out")
    assert report.verification and report.verification.agrees
    assert fitting(hwprofiles.load(PROFILE), model.image).grid.prefill == ((1, 8), (4, 8))
    bare = folder_of(onnx_graphs.encoder(mask=False), tmp_path / "bare")
    with pytest.raises(UsageError, match="has no attention_mask"):
        datasets.calibrate(load(bare), data)


def test_rows_are_told_apart_by_their_width() -> None:
    feeds = (Feed("input_ids", "int64", (0,), 9), Feed("more", "float32", (2, 2)))
    interface = Interface(feeds, 0, (("a", (0, 3)), ("b", (5,))), 7)
    assert interface.shape == (11,) and not interface.is_text and interface.length_of((6,)) == 2
    assert interface.sizes(2) == (6, 5) and Interface.read(interface.text) == interface
    rows = interface.drawn(3, 2, np.random.default_rng(0))
    given = interface.split(rows)
    assert given["input_ids"].shape == (3, 2) and given["input_ids"].dtype == np.int64 and given["input_ids"].max() < 9
    assert given["more"].shape == (3, 2, 2) and np.array_equal(interface.joined(given), rows)
    with pytest.raises(InputError, match="more than 2 GiB"):
        Interface.read(interface.text.replace('"length": 7', f'"length": {2**40}'))
    for width in (4, 3):
        with pytest.raises(InputError, match="are none of"):
            interface.length_of((width,))


def test_an_output_near_zero_is_held_against_what_is_usual() -> None:
    reference = torch.tensor([[3.0, 4, 1e-6], [0, 0, 2], [5, 0, 2]])
    found = reference + torch.tensor([[0.0, 0, 0.2], [0, 0, 0], [0, 1, 0]])
    usual = (8 / 3) ** 0.5
    assert farthest(reference, found, [2, 1]) == pytest.approx(max(0.2 / usual, 1 / 5))
    assert farthest(reference, found.index_fill(0, torch.tensor([1]), torch.nan), [2, 1]) == float("inf")
    assert farthest(torch.zeros(1, 2), torch.zeros(1, 2), [2]) == 0


def test_every_error_is_one_that_a_user_can_act_on(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    for source in (tmp_path / "model.onnx", tmp_path):
        with pytest.raises(InputError, match=r"model\.onnx"):
            load(source)
