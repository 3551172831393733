"""The command as its users call it: one run from end to end, its artifact's verbs, kills and exit codes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compress
from compress import manifest
from compress.artifact import export, open_artifact, verify
from compress.errors import InputError, ResourceError, UsageError
from compress.report import load as load_report

PROFILE = "cpu-x86-avx512-vnni"
# children import what is installed, not the checkout that the tests were started in
NEUTRAL: dict[str, Any] = {"cwd": tempfile.gettempdir(), "env": {**os.environ, "PYTHONSAFEPATH": "1"}}


def command(*arguments: object, timeout: float = 300, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "compress", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **NEUTRAL,
        **more,
    )


def arguments(model: Path, data: Path, out: Path, recipe: str = "w4a16") -> list[object]:
    return [
        "run",
        model,
        "--recipe",
        recipe,
        "--profile",
        PROFILE,
        "--data",
        data,
        "-o",
        out,
        "--length",
        64,
        "--samples",
        16,
        "--quality-samples",
        24,
        "--budget",
        0.3,
    ]


def deployed_bytes(out: Path) -> dict[str, bytes]:
    """Everything that must not depend on how often a run was stopped."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for part in ("model", "onnx")
        for path in sorted((out / part).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(
    llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One run of the real command."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, command(*arguments(llama, text_file, out), "--json")


def test_a_run_ends_with_an_artifact_a_report_and_exit_code_0(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
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
    assert report["operators"] == {"GatherBlockQuantized+MatMulNBits": 1, "MatMulNBits": 21}
    assert {timing["phase"] for timing in report["speed"]["timings"]} == {"decode", "prefill"}
    assert report["speed"]["variant"]["peak_memory_bytes"] > 10_000_000


def test_the_report_names_bytes_that_are_on_the_disk(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = finished
    report = load_report(out)
    assert report.artifact_bytes == sum(path.stat().st_size for path in (out / "onnx").iterdir())
    assert report.source_bytes == (Path(report.source) / "model.safetensors").stat().st_size


def test_no_file_of_the_artifact_holds_a_path_of_this_machine(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, _ = finished
    packages = str(Path(compress.__file__).parent).encode()
    for name, content in deployed_bytes(out).items():
        assert str(out).encode() not in content and packages not in content, name


def test_the_graph_passes_the_onnx_checker(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    import onnx

    out, _ = finished
    onnx.checker.check_model(str(out / "onnx" / "model.onnx"))


def test_verify_accepts_the_artifact_and_names_every_damage(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
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


def test_a_damaged_model_is_not_exported_under_a_fresh_manifest(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "copy")
    path = tmp_path / "copy" / "model" / "outer.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"changed model/outer\.safetensors"):
        export(tmp_path / "copy", profile=PROFILE, out=tmp_path / "again")
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy"]


def test_a_reader_that_closes_our_output_is_no_bug(tmp_path: Path) -> None:
    given = [sys.executable, "-m", "compress", "hardware", "show", PROFILE]
    with subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.close()
        errors = child.stderr.read()
    assert child.returncode == 141 and not errors


def test_the_model_can_be_exported_again_for_another_profile(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    out, _ = finished
    again = export(out, profile="cpu-arm-dotprod", out=tmp_path / "arm")
    assert again.profile.id == "cpu-arm-dotprod"
    assert deployed_bytes(tmp_path / "arm") == deployed_bytes(out)
    manifest.check_files(tmp_path / "arm")


def test_the_manifest_holds_the_figures_of_the_report_until_the_model_is_exported_again(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    out, _ = finished
    facts, report = manifest.read(out), load_report(out)
    assert report.artifact_quality is not None and report.speed is not None
    perplexity = report.artifact_quality.metrics["perplexity"].value
    assert facts["metrics"]["quality"]["artifact"]["perplexity"]["value"] == perplexity
    assert set(facts["metrics"]["speed"]) == {timing.name for timing in report.speed.timings}
    assert facts["metrics"]["artifact_bytes"] == report.artifact_bytes
    assert "metrics" not in export(out, profile="cpu-arm-dotprod", out=tmp_path / "arm").facts


def test_what_a_target_does_not_take_is_refused_before_anything_is_written(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress import artifact
    from compress.export import find
    from compress.target import Refusal

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
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from compress.__main__ import main

    disagreeing(sys.modules["compress.run"], monkeypatch)
    code = main([*map(str, arguments(llama, text_file, tmp_path / "out", "w8a16")), "-q", "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert code == error["exit_code"] == 5
    assert "is kept, but must not be used" in error["message"]
    report = load_report(tmp_path / "out")
    assert report.verification is not None and not report.verification.agrees
    manifest.check_files(tmp_path / "out")


def test_an_export_or_a_check_that_disagrees_is_one_error_with_exit_code_5(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from compress import artifact
    from compress.__main__ import main

    disagreeing(artifact, monkeypatch)
    assert main(["export", str(finished[0]), "-p", PROFILE, "-o", str(tmp_path / "out"), "--json"]) == 5
    assert "must not be used" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert not open_artifact(tmp_path / "out").folder.with_name("out.partial").exists()
    assert main(["verify", str(finished[0]), "--json"]) == 5
    assert "DOES NOT AGREE" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_figures_that_are_no_number_are_still_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from compress import artifact
    from compress.__main__ import main
    from compress.evaluate import Evaluation
    from compress.records import Metric, Quality

    metric = Metric(value=float("nan"), samples=1, unit="1", protocol="p", better="lower")
    part = Quality(subject="baseline", where="here", metrics={"kl": metric}, data_digest="")
    monkeypatch.setattr(artifact, "evaluate_artifact", lambda *_, **__: Evaluation(part, part, part))
    assert main(["eval", "out", "--data", "x.txt", "--json"]) == 0

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["memory"]["metrics"]["kl"]["value"] == "NaN"


def test_the_command_that_resumes_can_be_pasted_into_a_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from compress import artifact
    from compress.__main__ import main
    from compress.errors import Interrupted

    def stop(*_: object, **__: object) -> None:
        raise Interrupted("Stopped.", signal.SIGTERM)

    monkeypatch.setattr(artifact, "export", stop)
    assert main(["export", "my out", "-p", PROFILE, "-o", "it's"]) == 143
    assert f"repeat: compress export 'my out' -p {PROFILE} -o 'it'\"'\"'s'" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_verb_that_keeps_nothing_without_a_traceback(
    finished: tuple[Path, subprocess.CompletedProcess[str]], number: int, code: int
) -> None:
    given = [sys.executable, "-m", "compress", "profile", str(finished[0]), "--budget", "60"]
    with subprocess.Popen(given, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **NEUTRAL) as child:
        assert child.stderr is not None
        assert "Timing settings" in child.stderr.readline()
        child.send_signal(number)
        _, errors = child.communicate(timeout=120)
    assert child.returncode == code, errors
    assert "Stopped" in errors and "Traceback" not in errors


def test_changed_code_of_ours_is_another_run(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.__main__ import main

    given = [*map(str, arguments(llama, text_file, tmp_path / "out")), "-q", "--overwrite"]
    code = (
        "import sys\nfrom compress import run\nfrom compress.__main__ import main\n"
        "def die(*_):\n    raise SystemExit(9)\n"
        f"run._export_both = die\nmain({given!r})"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, **NEUTRAL).returncode == 9
    monkeypatch.setattr(manifest, "code_digest", lambda: "another")
    assert main(given) == 2


def test_generate_continues_a_prompt_and_the_command_prints_the_same(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, _ = finished
    engine: Any = compress.load(out, anyway=True)  # the profile need not be this machine's
    text = engine.generate("the river", max_new_tokens=8).text
    given = ("generate", out, "--prompt", "the river", "--tokens", 8, "--anyway")
    assert text and command(*given).stdout == f"the river{text}\n"


def test_a_second_run_onto_the_same_output_is_refused_and_overwrite_replaces(
    finished: tuple[Path, subprocess.CompletedProcess[str]], llama: Path, text_file: Path
) -> None:
    out, _ = finished
    before = deployed_bytes(out)
    refused = command(*arguments(llama, text_file, out))
    assert refused.returncode == 2 and "exists" in refused.stderr and "Traceback" not in refused.stderr
    assert command(*arguments(llama, text_file, out), "--overwrite", "-q").returncode == 0
    assert deployed_bytes(out) == before
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


def test_a_gate_that_is_not_met_keeps_the_result_and_exits_3(llama: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "strict.yaml"
    recipe.write_text("passes: [rtn(format=int2(group=32))]\nquality: {gates: {kl: 0.000001}}\n")
    done = command(*arguments(llama, text_file, tmp_path / "out", str(recipe)), "-q")
    assert done.returncode == 3, done.stderr
    report = load_report(tmp_path / "out")
    assert [gate.met for gate in report.gates] == [False]
    assert "kl" in report.verdict.lower()
    assert open_artifact(tmp_path / "out").model().structure.layers


def test_ten_kills_at_random_moments_leave_no_output_and_end_in_the_same_bytes(
    finished: tuple[Path, subprocess.CompletedProcess[str]], llama: Path, text_file: Path, tmp_path: Path
) -> None:
    out, maker, kills = tmp_path / "out", random.Random(7), 0
    for _ in range(10):
        with subprocess.Popen(
            [sys.executable, "-m", "compress", *map(str, arguments(llama, text_file, out)), "-q"],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            **NEUTRAL,
        ) as child:
            try:
                child.wait(timeout=maker.uniform(1.0, 14.0))
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
                kills += 1
        if out.exists():
            manifest.check_files(out)
            shutil.rmtree(out)
    assert kills >= 5
    assert command(*arguments(llama, text_file, out), "-q").returncode == 0
    assert deployed_bytes(out) == deployed_bytes(finished[0])


def test_ctrl_c_finishes_the_block_and_prints_the_command_that_resumes(
    make_llama: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model = make_llama("deep", num_hidden_layers=40)
    out = tmp_path / "out"
    given = [sys.executable, "-m", "compress", *map(str, arguments(model, text_file, out))]
    with subprocess.Popen(given, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **NEUTRAL) as child:
        journal = tmp_path / "out.partial" / "journal.jsonl"
        deadline = time.monotonic() + 60
        while not journal.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=120)
    assert child.returncode == 130, errors
    assert "To resume, repeat: compress run" in errors and "Traceback" not in errors
    assert not out.exists() and 0 < len(journal.read_text().splitlines()) < 40


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
    llama: Path, text_file: Path, tmp_path: Path, changes: list[str], code: int, told: str
) -> None:
    given = [str(item) for item in arguments(llama, text_file, tmp_path / "out")]
    if changes[0] == "absent-folder":
        given[1] = "./absent-folder"
    else:
        given += changes
    done = command(*given)
    assert done.returncode == code, done.stderr
    assert told in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_group_that_the_target_cannot_store_is_refused_before_anything_is_written(
    llama: Path, text_file: Path, tmp_path: Path
) -> None:
    given = [str(item) for item in arguments(llama, text_file, tmp_path / "out")]
    place = given.index("--recipe")
    given[place : place + 2] = ["--passes", "gptq(format=int4(group=48))"]
    done = command(*given, "--json")
    error = json.loads(done.stdout)["error"]
    assert done.returncode == error["exit_code"] == 2
    assert "group=48" in error["message"] and "16, 32, 64, 128, 256" in error["message"]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_cannot_be_written_is_a_resource_error(llama: Path, text_file: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    done = command(*arguments(llama, text_file, tmp_path / "out"))
    assert done.returncode == 6 and "cannot be written" in done.stderr


def test_an_output_below_a_file_is_a_resource_error(llama: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = command(*arguments(llama, text_file, tmp_path / "file" / "out"))
    assert done.returncode == 6 and "cannot be written" in done.stderr, done.stderr


def test_too_little_disk_is_known_before_the_run(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress import workspace
    from compress.errors import ResourceError

    monkeypatch.setattr(workspace.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(ResourceError, match="0 MB free; this run needs about 1 MB"):
        workspace.require_space(tmp_path / "new", 1_000_000)


def test_the_python_example_of_the_readme_runs(llama: Path, text_file: Path, tmp_path: Path) -> None:
    model = compress.load(llama)
    pipeline = compress.Pipeline.parse("gptq(format=int4(group=32))")
    from compress.data import calibrate

    result = pipeline.run(model, calibration=calibrate(model, text_file, samples=4, length=64))
    artifact = compress.export(result, profile=PROFILE, out=tmp_path / "out")
    text = str(compress.profile(artifact, against=model, budget_s=0.3))
    assert "decode" in text and "speed-up" in text
    assert compress.verify(tmp_path / "out").agrees
    with pytest.raises(compress.CompressError, match="not the model that"):
        compress.profile(artifact, against=compress.open_artifact(tmp_path / "out").model())


def test_an_encoder_runs_from_end_to_end(tmp_path: Path, save_random: Callable[..., Path], text_file: Path) -> None:
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
    given[given.index("--length") + 1] = 32
    done = command(*given, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["operators"] == {"Gather": 1, "MatMul": 1, "MatMulIntegerToFloat": 12}
    assert {timing["phase"] for timing in report["speed"]["timings"]} == {"encode"}
    assert report["artifact_quality"]["metrics"]["cosine"]["value"] > 0.98
    refused = command("generate", tmp_path / "out", "--prompt", "1 2", "--anyway")
    assert refused.returncode == 2 and "kind encoder" in refused.stderr
