"""`--target checkpoint` on the command line: a run, a plan, and an export of what another target has."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import compress
from compress.__main__ import main
from compress.export.onnx import target as onnx_target
from compress.pipeline import Pipeline
from compress.profiles import as_profile
from compress.speed.footprint import deployable_bytes


class Said(NamedTuple):
    """What the command ended with and wrote."""

    code: int
    out: str
    err: str


def run(*given: str | Path) -> Said:
    """The command in this process, which takes no imports again."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(item) for item in given])
    return Said(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def finished(one_block: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Said]:
    out = tmp_path_factory.mktemp("run") / "out"
    options = ["--samples", "4", "--quality-samples", "4", "--length", "64", "--budget", "0.1", "--json"]
    return out, run("run", one_block, "--passes", "gptq(format=int4(group=32))", "-d", text_file, "-o", out,
                    "-p", "cpu-x86-avx2", "--target", "checkpoint", *options)  # fmt: skip


def test_a_run_writes_a_checkpoint_that_verify_accepts_and_generate_continues(finished: tuple[Path, Said]) -> None:
    out, done = finished
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["target"] == "checkpoint" and report["verification"]["level"] == "ran"
    assert report["operators"] == {"dense": 1, "pack-quantized": 7}
    assert report["artifact_bytes"] == deployable_bytes(out / "checkpoint")
    assert report["plan"]["predicted_artifact_bytes"] == pytest.approx(report["artifact_bytes"], rel=0.02)
    assert any("runs no faster" in note for note in report["plan"]["notes"])
    assert "compressed-tensors" in report["speed"]["runtime"]
    assert run("verify", out).code == 0
    assert run("generate", out, "--prompt", "the", "-n", "3").code == 0


def test_an_artifact_of_a_run_can_be_exported_for_another_target(finished: tuple[Path, Said], tmp_path: Path) -> None:
    out, _ = finished
    done = run("export", out, "--target", "checkpoint-gptq", "-p", "cpu-x86-avx2", "-o", tmp_path / "gptq", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["target"] == "checkpoint-gptq"
    config = json.loads((tmp_path / "gptq" / "checkpoint" / "config.json").read_text())
    assert config["quantization_config"]["checkpoint_format"] == "gptq_v2"
    back = compress.export(tmp_path / "gptq", profile="cpu-x86-avx2", target="onnx", out=tmp_path / "onnx")
    assert back.deployable == tmp_path / "onnx" / "onnx" and onnx_target.FOLDER == "onnx"


def test_a_plan_for_a_layout_names_what_it_refuses(llama: Path) -> None:
    done = run("plan", llama, "--passes", "rtn(format=int3(group=32))", "-p", "cpu-x86-avx2", "-t", "checkpoint-awq")
    assert done.code == 2 and "AWQ stores int4 only" in done.out.replace("\n", " ")
    unknown = run("plan", llama, "--passes", "rtn(format=int3(group=32))", "--target", "checkpoints")
    assert unknown.code == 2 and "Did you mean 'checkpoint'" in unknown.err


def test_a_timed_call_leaves_its_cached_tokens_as_they_were(llama: Path, tmp_path: Path) -> None:
    from compress.export.checkpoint.target import COMPRESSED_TENSORS

    model = compress.load(llama)
    made = Pipeline.parse("rtn(format=int4(group=32))").run(model).model
    COMPRESSED_TENSORS.write(made, as_profile("cpu-x86-avx2"), tmp_path)
    session = COMPRESSED_TENSORS.session(tmp_path, 1)
    once = session.call(torch.tensor([[5]]).numpy(), 16)
    once()
    first = session.greedy([1, 2, 3], 8)
    once()
    assert session.greedy([1, 2, 3], 8) == first
    whole = session.logits(torch.tensor([[1, 2, 3, *first[:-1]]]).numpy())[0]
    assert whole[2:].argmax(-1).tolist() == first
