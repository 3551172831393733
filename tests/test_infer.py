"""`compress predict`: classes of images and embeddings of texts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compress
from compress import manifest
from compress.__main__ import main
from compress.errors import InputError, UsageError
from compress.inputs.prompts import Reader, read_texts
from compress.models.embedding import pool_hidden
from compress.runtime.engine import Engine
from compress.runtime.sampling import softmax


@pytest.fixture(scope="module")
def images_out(make_artifact: Callable[..., Path], cnn: str) -> Path:
    return make_artifact(cnn, "onnx")


@pytest.fixture(scope="module")
def encoder(save_random: Callable[..., Path], llama: Path) -> Path:
    """A BERT of 24 positions with the byte tokenizer of the other fixtures, which puts no marks around a text."""
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=24,
    )  # fmt: skip
    folder: Path = save_random("bert-infer", config, "AutoModel")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(llama / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def encoder_out(make_artifact: Callable[..., Path], encoder: Path) -> Path:
    return make_artifact(encoder, "onnx", "checkpoint")


@pytest.fixture
def pixels(images_file: Path) -> Any:
    with np.load(images_file) as content:
        return content["images"][:6].transpose(0, 3, 1, 2).copy()


def run(capsys: pytest.CaptureFixture[str], *given: object) -> tuple[int, str, str]:
    code = main([str(item) for item in given])
    return code, *capsys.readouterr()


def test_logits_are_those_of_the_module_on_the_same_pixels(images_out: Path, cnn: str, pixels: Any) -> None:
    from compress.models.placing import whole_module

    model = compress.load(cnn)
    with torch.no_grad():
        expected = whole_module(model)(model.image.preprocess(torch.from_numpy(pixels))).numpy()  # type: ignore
    engine: Any = compress.load(images_out)
    for batch in (1, 4):
        assert engine.predict(pixels, batch=batch) == pytest.approx(expected, abs=1e-4)
    inputs = model.image.preprocess(torch.from_numpy(pixels)).numpy()  # type: ignore[union-attr]
    assert engine.predict(inputs) == pytest.approx(expected, abs=1e-4)


def test_the_command_prints_the_likeliest_classes_of_each_image(
    images_out: Path, images_file: Path, pixels: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, told = run(capsys, "predict", images_out, "-i", images_file, "--top", 2)
    logits = compress.load(images_out).predict(pixels)  # type: ignore[union-attr]
    chances = softmax(logits)
    best = int(chances[0].argmax())
    assert code == 0 and shown.startswith(f"0: class {best} {chances[0, best]:.1%}, class ")
    assert len(shown.splitlines()) == 80 and "onnxruntime" in told and "onnx/model.onnx" in told
    found = json.loads(run(capsys, "predict", images_out, "-i", images_file, "--json")[1])
    assert found["count"] == 80 and found["placement"]["provider"] == "CPU"
    assert sum(each["probability"] for each in found["rows"][3]["classes"]) == pytest.approx(1, abs=1e-5)


def test_pictures_of_a_folder_are_read_in_order_and_one_alone_gives_the_same(
    images_out: Path, pixels: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name, picture in zip(("b.png", "a.png", "deep/c.png"), pixels, strict=False):
        Image.fromarray(picture.transpose(1, 2, 0)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    written = tmp_path / "made.npz"
    assert run(capsys, "predict", images_out, "-i", tmp_path / "in", "-o", written, "-q") == (0, "", "")
    with np.load(written) as made:
        assert made["names"].tolist() == ["a.png", "b.png", "deep/c.png"]
        expected = compress.load(images_out).predict(pixels[[1, 0, 2]])  # type: ignore[union-attr]
        assert made["logits"] == pytest.approx(expected, abs=1e-5)
        assert made["probabilities"].sum(1) == pytest.approx(np.ones(3), abs=1e-6)
    line = run(capsys, "predict", images_out, "-i", tmp_path / "in" / "b.png", "--top", 1)[1]
    assert line.startswith(f"b.png: class {expected[1].argmax()} ")
    assert run(capsys, "predict", images_out, "-i", tmp_path / "in", "-o", written)[0] == 2
    before = written.read_bytes()
    assert run(capsys, "predict", images_out, "-i", tmp_path / "in", "-o", written, "--overwrite")[0] == 0
    assert written.read_bytes() == before and [path.name for path in tmp_path.iterdir()].count("made.npz") == 1


def test_pixels_are_refused_where_a_function_of_the_user_s_made_the_inputs(
    images_out: Path, pixels: Any, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(images_out, tmp_path / "out"))
    told = json.loads((out / "onnx" / "preprocessing.json").read_text())
    (out / "onnx" / "preprocessing.json").write_text(
        json.dumps({**told, "preprocessing": "net.py: preprocess", "mean": [], "std": []})
    )
    facts = {key: value for key, value in manifest.read(out).items() if key in ("task", "profile")}
    manifest.write(out, facts, ["onnx"])
    engine: Any = compress.load(out)
    with pytest.raises(UsageError, match=r"net.py: preprocess.*does not hold"):
        engine.predict(pixels)
    assert engine.predict(pixels.astype(np.float32)).shape == (6, 5)


def test_images_that_do_not_fit_are_refused(
    images_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "large.npz", images=np.zeros((2, 30, 30, 3), np.uint8))
    np.savez(tmp_path / "other.npz", pictures=np.zeros((2, 12, 12, 3), np.uint8))
    np.savez(tmp_path / "nan.npz", images=np.full((2, 3, 12, 12), np.nan, np.float32))
    np.savez(tmp_path / "none.npz", images=np.zeros((0, 3, 12, 12), np.uint8))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no image")
    (tmp_path / "empty").mkdir()
    for name, code, words in [
        ("large.npz", 5, "the model takes (channels, h, w)"),
        ("other.npz", 5, "no array 'images'; it holds pictures"),
        ("nan.npz", 5, "NaN"),
        ("none.npz", 5, "holds no images"),
        ("broken.png", 5, "cannot be read as an image"),
        ("empty", 5, "holds no images"),
        ("missing.png", 2, "No such input"),
    ]:
        found = run(capsys, "predict", images_out, "-i", tmp_path / name)
        assert found[0] == code and words in found[2], (name, found)
    assert run(capsys, "predict", images_out, "--text", "hello")[0] == 2
    engine: Any = compress.load(images_out)
    with pytest.raises(UsageError, match=r"Images are \(2, 3\)"):
        engine.predict(np.zeros((2, 3), np.uint8))
    with pytest.raises(UsageError, match=r"Images of int64: allowed are pixels of uint8"):
        engine.predict(np.zeros((2, 3, 12, 12), np.int64))
    with pytest.raises(UsageError, match="kind image-classifier"):
        engine.generate("hello")


@pytest.mark.parametrize("option", [["--pool", "cls"], ["--truncate"]])
def test_options_for_texts_are_refused_for_images(
    images_out: Path, images_file: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    code, _, told = run(capsys, "predict", images_out, "-i", images_file, *option)
    assert code == 2 and "--pool and --truncate are for texts" in told


TEXTS = ["the river", "a", "stone runs over tree"]


@pytest.mark.parametrize("name", ["onnx", "checkpoint"])
@pytest.mark.parametrize("batch", [1, 3])
def test_embeddings_are_the_model_s_own_whatever_the_padding(
    encoder_out: Path, encoder: Path, name: str, batch: int
) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model, engine = AutoModel.from_pretrained(encoder), compress.load(encoder_out, engine=name, threads=1)
    assert isinstance(engine, Engine)
    for pool in ("mean", "cls", "none"):
        found = engine.predict(TEXTS, pool=pool, batch=batch)  # type: ignore[arg-type]
        for text, row in zip(TEXTS, found, strict=True):
            ids = tokenizer(text).input_ids
            with torch.no_grad():
                hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
            expected = {"mean": hidden.mean(0), "cls": hidden[0], "none": hidden}[pool]
            assert row == pytest.approx(expected, abs=1e-4)


def test_the_command_gives_a_json_line_per_text_or_writes_an_npz(
    encoder_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, rows = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    lines.write_text("\n".join(TEXTS) + "\n")
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    shown = run(capsys, "predict", encoder_out, "-i", lines, "-q")[1]
    found = [json.loads(line) for line in shown.splitlines()]
    expected = compress.load(encoder_out).predict(TEXTS)  # type: ignore[union-attr]
    assert [row["text"] for row in found] == TEXTS
    assert np.array([row["embedding"] for row in found], np.float32) == pytest.approx(expected)
    assert run(capsys, "predict", encoder_out, "-i", rows, "-q")[1] == shown
    assert run(capsys, "predict", encoder_out, *(w for t in TEXTS for w in ("--text", t)), "-q")[1] == shown
    made = json.loads(run(capsys, "predict", encoder_out, "-i", rows, "--pool", "none", "--json")[1])
    assert [len(row["hidden"]) for row in made["rows"]] == [len(text) for text in TEXTS]
    out = tmp_path / "made.npz"
    answer = json.loads(run(capsys, "predict", encoder_out, "-i", rows, "--pool", "none", "-o", out, "--json")[1])
    assert answer["written"] == str(out) and answer["count"] == 3
    with np.load(out) as content:
        assert content["offsets"].tolist() == [0, 9, 10, 30] and content["hidden"].shape == (30, 32)
        first = content["hidden"][0:9].mean(0)
    assert first == pytest.approx(expected[0], abs=1e-5)


def test_a_text_that_is_too_long_is_refused_or_cut_as_asked(
    encoder_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "the river runs over the stone"
    code, _, told = run(capsys, "predict", encoder_out, "--text", "a", "--text", long)
    assert code == 2 and "Text 2 has 29 tokens; the model has positions for 24" in told and "--truncate" in told
    engine: Any = compress.load(encoder_out)
    assert engine.predict(long, truncate=True) == pytest.approx(engine.predict(long[:24]), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "Give --input FILE, or --text"),
        (["--text", "a", "-i", "b.txt"], "Give --input FILE, or --text"),
        (["--text", ""], "Text 1 is empty"),
        (["-i", "missing.txt"], "No such data file"),
        (["--text", "a", "-o", "x.json"], "is no name of an .npz"),
        (["--text", "a", "--top", "3"], "--top is for the classes of images"),
    ],
)
def test_wrong_options_are_one_paragraph_with_exit_code_2(
    encoder_out: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    code, shown, told = run(capsys, "predict", encoder_out, *options)
    assert code == 2 and words in told and shown == ""


def test_a_language_model_is_told_to_generate_and_an_encoder_to_predict(
    lm_out: Path, encoder_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, told = run(capsys, "predict", lm_out, "--text", "hello")
    assert code == 2 and "Use `generate`" in told
    code, _, told = run(capsys, "generate", encoder_out, "--prompt", "hello")
    assert code == 2 and "kind encoder" in told and "Use `predict`" in told


def test_a_place_that_cannot_be_written_is_exit_code_6(
    encoder_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "predict", encoder_out, "--text", "a", "-o", tmp_path / "no" / "x.npz")[0] == 6


def test_pooling_counts_the_tokens_of_the_mask_only() -> None:
    hidden = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1]])
    slow = [[sum(hidden[row, place, col] for place in range(n)) / n for col in range(3)] for row, n in ((0, 2), (1, 4))]
    assert np.array(pool_hidden(hidden, mask, "mean")).tolist() == slow
    assert np.array(pool_hidden(hidden, mask, "cls")).tolist() == hidden[:, 0].tolist()
    assert [len(row) for row in pool_hidden(hidden, mask, "none")] == [2, 4]
    with pytest.raises(UsageError, match="Did you mean 'mean'"):
        pool_hidden(hidden, mask, "meen")  # type: ignore[arg-type]


def test_lines_of_a_text_file_are_its_texts_and_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("one\r\ntwo\u2028still two\n".encode())
    assert read_texts(path) == ["one", "two\u2028still two"]
    path.write_text("")
    with pytest.raises(InputError, match="empty"):
        read_texts(path)


def test_token_ids_too_long_are_cut_and_unknown_ones_refused() -> None:
    reader = Reader("here", None, 10, 3)
    assert reader.text([1, 2, 3, 4], "Text 1", truncate=True) == [1, 2, 3]
    with pytest.raises(UsageError, match="Text 1 holds token 10"):
        reader.text([10], "Text 1")
