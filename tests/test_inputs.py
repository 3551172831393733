"""Malformed, unsafe and unfitting inputs: each is one clear error of the right kind."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import CompressError, InputError, UnsupportedError, UsageError
from compress.inputs import datasets
from compress.inputs.datasets import Calibration
from compress.inputs.documents import read_documents
from compress.models.loading import load


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(kind: type[CompressError], function: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        function()
    assert type(caught.value) is kind
    return str(caught.value)


def test_a_folder_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    assert "No such folder" in refusal(UsageError, lambda: load(tmp_path / "absent"))


def test_a_hub_id_that_cannot_be_fetched_says_what_to_do() -> None:
    assert "local folder" in refusal(UsageError, lambda: load("nobody/nothing"))


def test_a_file_instead_of_a_folder_is_refused(copy: Path) -> None:
    assert "is a file" in refusal(UsageError, lambda: load(copy / "config.json"))


def test_a_folder_without_config_is_refused(copy: Path) -> None:
    (copy / "config.json").unlink()
    assert "has no config.json" in refusal(UsageError, lambda: load(copy))


def test_a_folder_around_a_models_names_the_folder_inside(copy: Path, tmp_path: Path) -> None:
    around = tmp_path / "around"
    around.mkdir()
    copy.rename(around / "hf")
    assert f"Did you mean {around / 'hf'}?" in refusal(UsageError, lambda: load(around))
    (around / "manifest.json").write_text("{}")
    assert "the model that it was made from" in refusal(UsageError, lambda: load(around))


@pytest.mark.parametrize("text", ["{", "[1]", "\x00\xff"])
def test_a_config_that_is_no_object_is_refused(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    assert "config.json" in refusal(InputError, lambda: load(copy))


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
        {"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}},
        {"trust_remote_code": True},
    ],
)
def test_a_config_that_asks_for_code_is_refused_and_nothing_runs(copy: Path, changes: dict[str, object]) -> None:
    (copy / "evil.py").write_text("raise SystemExit('ran')")
    edit_config(copy, **changes)
    assert "asks for code of its own" in refusal(InputError, lambda: load(copy))


def test_a_tokenizer_that_asks_for_code_is_refused(copy: Path) -> None:
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["evil.T", None]}}))
    assert "asks for code of its own" in refusal(InputError, lambda: load(copy).tokenizer())


def test_an_unknown_architecture_is_refused(copy: Path) -> None:
    edit_config(copy, model_type="llamma", architectures=["LlammaForCausalLM"])
    assert "model_type 'llamma'" in refusal(InputError, lambda: load(copy))


def test_a_model_that_is_already_quantized_is_refused(copy: Path) -> None:
    edit_config(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "already quantized (gptq)" in refusal(UnsupportedError, lambda: load(copy))


def test_a_checkpoint_of_pickles_is_not_opened(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    text = refusal(InputError, lambda: load(copy))
    assert "pytorch_model.bin" in text and "save_pretrained" in text


def test_a_folder_without_weights_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "no *.safetensors" in refusal(InputError, lambda: load(copy))


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_a_truncated_checkpoint_is_refused(copy: Path, keep: int) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "truncated or malformed" in refusal(InputError, lambda: load(copy))


def test_a_header_of_absurd_length_is_refused(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])
    assert "truncated or malformed" in refusal(InputError, lambda: load(copy))


def test_a_missing_parameter_is_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors")
    assert "'model.layers.1.mlp.up_proj.weight'" in refusal(InputError, lambda: load(copy))


def test_a_tensor_of_another_shape_is_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 64)
    save_file(tensors, copy / "model.safetensors")
    text = refusal(InputError, lambda: load(copy))
    assert "model.layers.1.mlp.up_proj.weight" in text and "(3, 64)" in text and "(96, 64)" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_stop_the_read(copy: Path, value: float) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = value
    save_file(tensors, copy / "model.safetensors")
    text = refusal(InputError, lambda: load(copy).layers(1))
    assert "model.layers.1.mlp.up_proj.weight" in text and "NaN or infinite" in text


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ("{", "not a checkpoint index"),
        ('{"weight_map": {"a": "../escape.safetensors"}}', "not a file beside it"),
        ('{"weight_map": {"a": "missing.safetensors"}}', "not a file beside it"),
    ],
)
def test_a_checkpoint_index_may_only_name_files_beside_it(copy: Path, index: str, told: str) -> None:
    (copy / "model.safetensors.index.json").write_text(index)
    assert told in refusal(InputError, lambda: load(copy))


def test_a_sharded_checkpoint_is_read_through_its_index(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, group in parts.items():
        save_file({name: tensors[name] for name in group}, copy / file)
    (copy / "model.safetensors").unlink()
    weight_map = {name: file for file, group in parts.items() for name in group}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model = load(copy)
    assert torch.equal(
        model.layers(2)["model.layers.2.mlp.up_proj"].weight, tensors["model.layers.2.mlp.up_proj.weight"]
    )


# data


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "content", "kind", "told"),
    [
        ("a.parquet", "x", UsageError, "not read"),
        ("a.jsonl", '{"txt": "x"}', InputError, "'text' or 'ids'"),
        ("a.jsonl", "{", InputError, "line 1, is not JSON"),
        ("a.json", '{"a": 1}', InputError, "lists of token ids"),
        ("a.json", "[[1, -2]]", InputError, "lists of token ids"),
        ("a.json", "[]", InputError, "at least one"),
        ("a.txt.gz", "not gzip", InputError, "cannot be read"),
    ],
)
def test_data_of_the_wrong_form_is_refused(
    tmp_path: Path, name: str, content: str, kind: type[CompressError], told: str
) -> None:
    assert told in refusal(kind, lambda: read_documents(write(tmp_path / name, content)))


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    assert "absent.txt" in refusal(UsageError, lambda: read_documents(tmp_path / "absent.txt"))


def test_text_needs_a_tokenizer(make_llama: Callable[..., Path], text_file: Path) -> None:
    model = load(make_llama("mute", tokenizer=False))
    assert "has no tokenizer" in refusal(UsageError, lambda: datasets.calibrate(model, text_file))


def test_a_broken_tokenizer_is_an_input_error(copy: Path, text_file: Path) -> None:
    (copy / "tokenizer.json").write_text('{"model": 5}')
    assert "tokenizer" in refusal(InputError, lambda: datasets.calibrate(load(copy), text_file))


def test_ids_outside_the_vocabulary_are_refused(llama: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "ids.json", json.dumps([[1, 2, 300]]))
    assert "token 300" in refusal(InputError, lambda: datasets.calibrate(load(llama), path))


def test_data_shorter_than_a_window_says_how_long_it_is(llama: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "short.txt", "too short")
    text = refusal(UsageError, lambda: datasets.calibrate(load(llama), path, length=64))
    assert "64 tokens" in text and "has 9" in text


def test_ids_and_text_in_every_container_are_the_same_documents(tmp_path: Path) -> None:
    rows = [[1, 2, 3], [4, 5]]
    plain = write(tmp_path / "a.json", json.dumps(rows))
    lines = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"ids": row}) for row in rows))
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    assert read_documents(plain) == read_documents(lines) == read_documents(packed) == rows


def test_one_file_is_split_by_document_and_no_window_is_in_both_parts(llama: Path, tmp_path: Path) -> None:
    maker = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 256, (40,), generator=maker).tolist() for _ in range(20)]
    path = write(tmp_path / "ids.json", json.dumps(rows))
    first, second = datasets.split(load(llama), path, samples=100, quality_samples=None, length=16, seed=3)
    held = {tuple(row) for row in second.ids.tolist()}
    owners = {
        place for place, row in enumerate(rows) for window in held if window in (tuple(row[:16]), tuple(row[16:32]))
    }
    assert len(owners) == 4 and len(held) == 8
    seen = [token for row in first.windows.ids.tolist() for token in row]
    joined = [token for place, row in enumerate(rows) if place not in owners for token in row]
    assert seen == joined[: len(seen)]
    again, _ = datasets.split(load(llama), path, samples=100, quality_samples=None, length=16, seed=3)
    assert again.windows.digest == first.windows.digest
    other, _ = datasets.split(load(llama), path, samples=100, quality_samples=None, length=16, seed=4)
    assert other.windows.digest != first.windows.digest


def test_a_window_in_both_parts_is_an_error(llama: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "ids.json", json.dumps([[7] * 32] * 10))
    text = refusal(
        UsageError, lambda: datasets.split(load(llama), path, samples=9, quality_samples=None, length=16, seed=0)
    )
    assert "both the calibration and the quality data" in text


def test_calibration_draws_the_same_windows_for_the_same_seed(llama: Path, text_file: Path) -> None:
    def digest(seed: int) -> str:
        made: Calibration = datasets.calibrate(load(llama), text_file, samples=5, length=32, seed=seed)
        assert made.windows.ids.shape == (5, 32)
        return made.windows.digest

    assert digest(1) == digest(1) != digest(2)
