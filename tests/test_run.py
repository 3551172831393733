"""The command as its users call it: one run from end to end, and the verbs on its artifact."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import compress
from compress import manifest
from compress.__main__ import main
from compress.artifact import evaluate_artifact, export, profile, verify
from compress.errors import InputError
from compress.inputs.datasets import calibrate
from compress.report import load as load_report
from helpers.runs import PROFILE, Done, arguments, deployed_bytes


def test_a_run_ends_with_an_artifact_a_report_and_exit_code_0(
    finished: tuple[Path, Done],
) -> None:
    out, done = finished
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in out.iterdir())
    assert names == ["manifest.json", "model", "onnx", "report.html", "report.json", "report.md"]
    assert not out.with_name("out.partial").exists()
    report = json.loads(done.stdout)
    assert report["schema_version"] == 1
    assert report["verification"]["level"] == "ran" and report["verification"]["agrees"]
    for part in ("baseline_quality", "artifact_quality", "memory_quality"):
        metric = report[part]["metrics"]["perplexity"]
        assert metric["interval"]["low"] <= metric["value"] <= metric["interval"]["high"]
    assert report["artifact_quality"]["metrics"]["kl"]["samples"] == 24
    assert report["operators"] == {"GatherBlockQuantized+MatMulNBits": 1, "MatMulNBits": 14}
    assert {timing["phase"] for timing in report["speed"]["timings"]} == {"decode", "prefill"}
    assert report["speed"]["variant"]["peak_memory_bytes"] > 10_000_000


def test_the_report_names_bytes_that_are_on_the_disk(finished: tuple[Path, Done]) -> None:
    out, _ = finished
    report = load_report(out)
    assert report.artifact_bytes == sum(path.stat().st_size for path in (out / "onnx").iterdir())
    assert report.source_bytes == (Path(report.source) / "model.safetensors").stat().st_size


def test_no_file_of_the_artifact_holds_a_path_of_this_machine(
    finished: tuple[Path, Done],
) -> None:
    out, _ = finished
    packages = str(Path(compress.__file__).parent).encode()
    for name, content in deployed_bytes(out).items():
        assert str(out).encode() not in content and packages not in content, name


def test_the_graph_passes_the_onnx_checker(finished: tuple[Path, Done]) -> None:
    out, _ = finished
    onnx.checker.check_model(str(out / "onnx" / "model.onnx"))


def test_verify_accepts_the_artifact_and_names_every_damage(finished: tuple[Path, Done], tmp_path: Path) -> None:
    out, _ = finished
    found = verify(out)
    assert found.agrees and found.level == "ran" and found.positions >= 512
    (note,) = found.notes  # and none that the tokens are not those recorded
    assert note.startswith("model_gqa.onnx and model.onnx") and "the same 32 greedy tokens" in note
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / "onnx" / "config.json").unlink()
    (copy / "onnx" / "extra.txt").write_text("x")
    weights = copy / "onnx" / "model.onnx_data"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError) as caught:
        verify(copy)
    for told in ("missing onnx/config.json", "changed onnx/model.onnx_data", "not in the manifest: onnx/extra.txt"):
        assert told in str(caught.value)


@pytest.mark.parametrize("name", ["onnx/model.onnx_data", "model/outer.safetensors"])
def test_a_damaged_artifact_is_neither_evaluated_nor_timed(
    finished: tuple[Path, Done], text_file: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(finished[0], tmp_path / "copy")
    path = tmp_path / "copy" / name
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"changed {name}"):
        evaluate_artifact(tmp_path / "copy", text_file)
    if name.startswith("onnx/"):  # of what is timed
        with pytest.raises(InputError, match=f"changed {name}"):
            profile(tmp_path / "copy")


def test_a_damaged_model_is_not_exported_under_a_fresh_manifest(finished: tuple[Path, Done], tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path / "copy")
    path = tmp_path / "copy" / "model" / "outer.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"changed model/outer\.safetensors"):
        export(tmp_path / "copy", profile=PROFILE, out=tmp_path / "again")
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy"]


def test_the_model_can_be_exported_again_for_another_profile(finished: tuple[Path, Done], tmp_path: Path) -> None:
    out, _ = finished
    again = export(out, profile="cpu-arm-dotprod", out=tmp_path / "arm")
    assert again.profile.id == "cpu-arm-dotprod"
    assert deployed_bytes(tmp_path / "arm") == deployed_bytes(out)
    manifest.check_files(tmp_path / "arm")


def test_the_manifest_holds_the_figures_of_the_report_until_the_model_is_exported_again(
    finished: tuple[Path, Done], tmp_path: Path
) -> None:
    out, _ = finished
    facts, report = manifest.read(out), load_report(out)
    assert report.artifact_quality is not None and report.speed is not None
    perplexity = report.artifact_quality.metrics["perplexity"].value
    assert facts["metrics"]["quality"]["artifact"]["perplexity"]["value"] == perplexity
    assert set(facts["metrics"]["speed"]) == {timing.name for timing in report.speed.timings}
    assert facts["metrics"]["artifact_bytes"] == report.artifact_bytes
    assert "metrics" not in export(out, profile="cpu-arm-dotprod", out=tmp_path / "arm").facts


def test_generate_continues_a_prompt_and_the_command_prints_the_same(
    finished: tuple[Path, Done], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = finished
    engine: Any = compress.load(out, anyway=True)  # the profile need not be this machine's
    text = engine.generate("the river", max_new_tokens=8).text
    assert main(["generate", str(out), "--prompt", "the river", "--tokens", "8", "--anyway"]) == 0
    assert text and capsys.readouterr().out == f"the river{text}\n"


def test_a_second_run_onto_the_same_output_is_refused_and_overwrite_replaces(
    finished: tuple[Path, Done],
    two_blocks: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (out / "model" / "outer.safetensors").unlink()
    given = [*arguments(two_blocks, text_file, out), "-q"]
    assert main(given) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*given, "--overwrite"]) == 0
    assert deployed_bytes(out) == deployed_bytes(finished[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_python_example_of_the_readme_runs(two_blocks: Path, text_file: Path, tmp_path: Path) -> None:
    model = compress.load(two_blocks)
    pipeline = compress.Pipeline.parse("gptq(format=int4(group=32))")
    result = pipeline.run(model, calibration=calibrate(model, text_file, samples=4, length=64))
    artifact = compress.export(result, profile=PROFILE, out=tmp_path / "out")
    text = str(compress.profile(artifact, against=model, budget_s=0.1))
    assert "decode" in text and "speed-up" in text
    assert compress.verify(tmp_path / "out").agrees
    with pytest.raises(compress.CompressError, match="not the model that"):
        compress.profile(artifact, against=compress.open_artifact(tmp_path / "out").model())


def test_an_encoder_runs_from_end_to_end(
    tmp_path: Path, save_random: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=64,
    )  # fmt: skip
    folder = save_random("bert-run", config, "AutoModel")
    ids = tmp_path / "ids.json"
    maker = random.Random(0)
    ids.write_text(json.dumps([[maker.randrange(256) for _ in range(40)] for _ in range(40)]))
    given = arguments(folder, ids, tmp_path / "out", "encoder-int8")
    given[given.index("--length") + 1] = "32"
    assert main([*given, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["operators"] == {"Gather": 1, "MatMul": 1, "MatMulIntegerToFloat": 12}
    assert {timing["phase"] for timing in report["speed"]["timings"]} == {"encode"}
    assert report["artifact_quality"]["metrics"]["cosine"]["value"] > 0.98
    assert main(["generate", str(tmp_path / "out"), "--prompt", "1 2", "--anyway"]) == 2
    assert "kind encoder" in capsys.readouterr().err
