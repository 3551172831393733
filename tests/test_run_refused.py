"""Runs that end in an error: which exit code, what is said, and what is left."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from compress import artifact, manifest
from compress.__main__ import main
from compress.artifact import export, open_artifact
from compress.engine import disk
from compress.errors import ResourceError, UsageError
from compress.export import find
from compress.quality.evaluate import Evaluation
from compress.records import Metric, Quality
from compress.report import load as load_report
from compress.target import Refusal
from helpers.runs import PROFILE, Done, arguments


def test_what_a_target_does_not_take_is_refused_before_anything_is_written(
    finished: tuple[Path, Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> None:
        raise ResourceError("full")

    monkeypatch.setattr(artifact, "require_space", no_space)
    with pytest.raises(ResourceError, match="full"):
        export(finished[0], profile=PROFILE, out=tmp_path / "out")
    monkeypatch.setattr(find("onnx"), "plan_layer", lambda *_: Refusal("not today"))
    with pytest.raises(UsageError, match=r"layer\(s\), first .*: not today"):
        export(finished[0], profile=PROFILE, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def disagreeing(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs, but says that the outputs differ."""
    real = module.verify_export
    monkeypatch.setattr(module, "verify_export", lambda *given: real(*given).model_copy(update={"agrees": False}))


def test_a_run_whose_artifact_disagrees_with_its_model_keeps_it_and_exits_5(
    two_blocks: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disagreeing(sys.modules["compress.run"], monkeypatch)
    code = main([*arguments(two_blocks, text_file, tmp_path / "out", "w8a16"), "-q", "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert code == error["exit_code"] == 5
    assert "is kept, but must not be used" in error["message"]
    report = load_report(tmp_path / "out")
    assert report.verification is not None and not report.verification.agrees
    manifest.check_files(tmp_path / "out")


def test_an_export_or_a_check_that_disagrees_is_one_error_with_exit_code_5(
    finished: tuple[Path, Done],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disagreeing(artifact, monkeypatch)
    assert main(["export", str(finished[0]), "-p", PROFILE, "-o", str(tmp_path / "out"), "--json"]) == 5
    assert "must not be used" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert not open_artifact(tmp_path / "out").folder.with_name("out.partial").exists()
    assert main(["verify", str(finished[0]), "--json"]) == 5
    assert "DOES NOT AGREE" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_a_gate_that_is_not_met_keeps_the_result_and_exits_3(two_blocks: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "strict.yaml"
    recipe.write_text("passes: [rtn(format=int2(group=32))]\nquality: {gates: {kl: 0.000001}}\n")
    assert main([*arguments(two_blocks, text_file, tmp_path / "out", recipe), "-q"]) == 3
    report = load_report(tmp_path / "out")
    assert [gate.met for gate in report.gates] == [False]
    assert "kl" in report.verdict.lower()
    assert open_artifact(tmp_path / "out").model().structure.layers


def test_figures_that_are_no_number_are_still_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from compress import artifact
    from compress.__main__ import main

    metric = Metric(value=float("nan"), samples=1, unit="1", protocol="p", better="lower")
    part = Quality(subject="baseline", where="here", metrics={"kl": metric}, data_digest="")
    monkeypatch.setattr(artifact, "evaluate_artifact", lambda *_, **__: Evaluation(part, part, part))
    assert main(["eval", "out", "--data", "x.txt", "--json"]) == 0

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["memory"]["metrics"]["kl"]["value"] == "NaN"


@pytest.mark.parametrize(
    ("changes", "code", "told"),
    [
        (["absent-folder"], 2, "No such folder"),
        (["--recipe", "w4a61"], 2, "Did you mean 'w4a16'"),
        (["--profile", "cpu-x86-avx512"], 2, "cpu-x86-avx512-vnni"),
        (["--data", "absent.txt"], 2, "No such data file"),
        (["--device", "tpu"], 2, "cpu and cuda"),
        (["--wrong-flag"], 2, "No such option"),
        (["--length", "1"], 2, "--length"),
    ],
)
def test_a_wrong_option_is_one_paragraph_and_exit_code_2(
    two_blocks: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    code: int,
    told: str,
) -> None:
    given = arguments(two_blocks, text_file, tmp_path / "out")
    if changes[0] == "absent-folder":
        given[1] = "./absent-folder"
    else:
        given += changes
    assert main(given) == code
    said = capsys.readouterr().err
    assert told in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_a_group_that_the_target_cannot_store_is_refused_before_anything_is_written(
    two_blocks: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(two_blocks, text_file, tmp_path / "out")
    place = given.index("--recipe")
    given[place : place + 2] = ["--passes", "gptq(format=int4(group=48))"]
    code = main([*given, "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert code == error["exit_code"] == 2
    assert "group=48" in error["message"] and "16, 32, 64, 128, 256" in error["message"]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_cannot_be_written_is_a_resource_error(
    two_blocks: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    assert main(arguments(two_blocks, text_file, tmp_path / "out")) == 6
    assert "cannot be written" in capsys.readouterr().err


def test_an_output_below_a_file_is_a_resource_error(
    two_blocks: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert main(arguments(two_blocks, text_file, tmp_path / "file" / "out")) == 6
    assert "cannot be written" in capsys.readouterr().err


def test_too_little_disk_is_known_before_the_run(
    two_blocks: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(ResourceError, match="0 MB free; this run needs about 1 MB"):
        disk.require_space(tmp_path / "new", 1_000_000)
