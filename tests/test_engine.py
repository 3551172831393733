"""`compress.load(OUT)`: which engine is loaded, where it runs, and what is refused with which sentence."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import compress
from compress import hwprofiles, manifest
from compress.__main__ import main
from compress.errors import InputError, UnsupportedError, UsageError
from compress.models.model import Model
from compress.runtime.engine import Engine


@pytest.fixture
def out(lm_out: Path, tmp_path: Path) -> Path:
    """An artifact that a test may damage."""
    return Path(shutil.copytree(lm_out, tmp_path / "out"))


def of_profile(out: Path, **changes: Any) -> None:
    """Give the artifact another profile."""
    facts = {key: value for key, value in manifest.read(out).items() if key in ("task", "profile")}
    manifest.write(out, {**facts, "profile": {**facts["profile"], **changes}}, ["onnx", "checkpoint"])


def test_an_artifact_is_loaded_as_its_profile_says_and_the_placement_is_the_runtime_s_own(lm_out: Path) -> None:
    engine = compress.load(lm_out, threads=2)
    assert isinstance(engine, Engine)
    assert engine.placement.runtime.startswith("onnxruntime 1.") and engine.placement.provider == "CPU"
    assert engine.placement.threads == 2 and (lm_out / engine.placement.file).is_file()
    assert engine.placement.file.startswith("onnx/")
    other = compress.load(lm_out, engine="checkpoint", threads=1).placement  # type: ignore[union-attr]
    assert other.runtime.startswith("transformers 5.") and other.provider == "torch cpu" and other.file == "checkpoint"


def test_a_model_s_folder_is_loaded_as_before_and_its_store_is_no_engine(llama: Path) -> None:
    assert isinstance(compress.load(llama), Model)
    assert compress.load(llama, weights=False).weights is None  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="no artifact"):
        compress.load(llama, engine="onnx")


def test_a_model_s_folder_that_happens_to_hold_a_manifest_stays_a_model(copy: Path) -> None:
    (copy / "manifest.json").write_text("{}")
    assert isinstance(compress.load(copy), Model)


@pytest.mark.parametrize("settings", [{"revision": "main"}, {"weights": False}])
def test_arguments_of_models_are_refused_for_artifacts(lm_out: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="is an artifact"):
        compress.load(lm_out, **settings)


@pytest.mark.parametrize(
    ("settings", "words"), [({"engine": "onx"}, "Did you mean 'onnx'"), ({"threads": 0}, "threads=0")]
)
def test_wrong_arguments_are_usage_errors(lm_out: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        compress.load(lm_out, **settings)


@pytest.mark.parametrize("name", ["model.onnx_data", "tokenizer.json", "config.json"])
def test_a_changed_file_is_refused_before_it_is_read(out: Path, name: str) -> None:
    path = out / "onnx" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"changed onnx/{name}"):
        compress.load(out)
    assert isinstance(compress.load(out, engine="checkpoint"), Engine)  # which reads none of it


def test_a_file_that_was_added_or_is_gone_is_refused(out: Path) -> None:
    (out / "onnx" / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(InputError, match="not in the manifest: onnx/chat_template"):
        compress.load(out)
    (out / "onnx" / "chat_template.jinja").unlink()
    (out / "onnx" / "model.onnx_data").unlink()
    with pytest.raises(InputError, match=r"missing onnx/model\.onnx_data"):
        compress.load(out)


def test_files_beside_the_engine_are_not_needed(out: Path) -> None:
    (out / "report.html").write_text("notes of a user")
    shutil.rmtree(out / "checkpoint")
    assert isinstance(compress.load(out), Engine)


def test_an_artifact_for_another_kind_of_machine_is_a_sentence_with_exit_code_4(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_profile(out, isa=["avx2", "imaginary_vnni"])
    with pytest.raises(UnsupportedError, match=r"lacks .*imaginary_vnni.*compress export"):
        compress.load(out, engine="onnx")
    assert main(["generate", str(out), "--prompt", "x", "--engine", "onnx", "--json"]) == 4
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["exit_code"] == 4 and "imaginary_vnni" in error["message"]
    assert main(["generate", str(out), "--prompt", "x", "-n", "2", "--engine", "onnx", "--anyway"]) == 0
    assert "Note: It was made for" in capsys.readouterr().err


def test_a_calibrated_profile_detects_no_machine_but_its_instructions_are_still_checked(out: Path) -> None:
    of_profile(out, isa=["imaginary_vnni"], detect=None)
    with pytest.raises(UnsupportedError, match="lacks imaginary_vnni"):
        compress.load(out, engine="onnx")


def test_another_architecture_is_named(out: Path) -> None:
    detect = manifest.read(out)["profile"]["detect"]
    here = hwprofiles.machine()["architecture"]
    other = "aarch64" if here == "x86_64" else "x86_64"
    of_profile(out, detect={**detect, "architecture": [other]})
    with pytest.raises(UnsupportedError, match=rf"\({other}\); this machine is {here}"):
        compress.load(out, engine="onnx")


def test_where_the_profile_s_own_engine_does_not_run_another_does_and_says_why(out: Path) -> None:
    of_profile(out, isa=["imaginary_vnni"])
    engine = compress.load(out)
    assert isinstance(engine, Engine) and engine.placement.file == "checkpoint"
    assert "onnx: It was made for" in engine.notes[0] and "imaginary_vnni" in engine.notes[0]
    assert len(engine.generate("the", max_new_tokens=3).rows[0].tokens) == 3


def test_an_artifact_without_any_engine_says_how_to_make_one(out: Path) -> None:
    for name in ("onnx", "checkpoint"):
        shutil.rmtree(out / name)
    with pytest.raises(UnsupportedError, match=r"holds no exported folder.*compress export"):
        compress.load(out)


def test_a_missing_runtime_is_a_sentence_with_exit_code_4(
    lm_out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["generate", str(lm_out), "--prompt", "x", "--engine", "onnx"]) == 4
    told = capsys.readouterr().err
    assert "does not run here. onnx: onnxruntime is not installed" in told and "Traceback" not in told


def test_a_target_that_only_builds_is_refused_by_name(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.export import find

    monkeypatch.delattr(find("onnx"), "runner")
    with pytest.raises(UnsupportedError, match=r"It is for onnxruntime on .* does not run it"):
        compress.load(out, engine="onnx")


def test_a_runtime_that_runs_elsewhere_than_the_profile_says_is_refused(out: Path) -> None:
    runtimes = manifest.read(out)["profile"]["runtimes"]
    runtimes["onnxruntime"]["provider"] = "CUDAExecutionProvider"
    of_profile(out, runtimes=runtimes)
    with pytest.raises(UnsupportedError, match="runs on CPU here, not on CUDAExecutionProvider"):
        compress.load(out, engine="onnx")


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"schema_version": 1, "files": {}}', '{"schema_version": 99, "files": {}}']
)
def test_a_malformed_manifest_is_exit_code_5(out: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "manifest.json").write_text(text)
    assert main(["generate", str(out), "--prompt", "x"]) == 5
    assert "manifest.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_config_that_is_no_object_is_malformed_input(out: Path, name: str) -> None:
    (out / "onnx" / name).write_text("[1]")
    of_profile(out)
    with pytest.raises(InputError, match=name):
        compress.load(out)


def test_no_artifact_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path / "none"), "--prompt", "x"]) == 2
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 5
    assert "manifest.json" in capsys.readouterr().err


def test_the_folder_runs_in_plain_onnxruntime_as_the_readme_shows(lm_out: Path) -> None:
    """The lines of the README, and that they give what the engine gives."""
    import numpy as np
    import onnxruntime as ort
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lm_out / "onnx")
    session = ort.InferenceSession(lm_out / "onnx" / "model.onnx")
    ids = np.array([tokenizer("the river").input_ids])
    empty = {i.name: np.zeros((1, o.shape[1], 0, o.shape[3]), np.float32)
             for i, o in zip(session.get_inputs()[2:], session.get_outputs()[1:], strict=True)}  # fmt: skip
    logits = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty})[0]
    engine: Any = compress.load(lm_out)
    assert int(logits[0, -1].argmax()) == engine.generate("the river", max_new_tokens=1).rows[0].tokens[0]
