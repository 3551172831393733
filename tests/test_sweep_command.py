"""Several recipes on the command line, and how variants share a machine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compress import recipe
from compress.__main__ import main
from compress.records import Footprint
from compress.sweep import bench, judge
from compress.sweep.executor import Here
from compress.sweep.records import Limits
from compress.sweep.run import sweep
from compress.sweep.setup import SweepRequest
from compress.sweep.variant import work
from helpers.runs import NEUTRAL, PROFILE, command
from helpers.sweeps import EIGHT, FOUR, small_profile


def test_a_classifier_is_judged_by_the_accuracy_it_loses(
    cnn: str, images_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "footprint", lambda *_: Footprint(disk_bytes=1))
    made = tuple(recipe.of_passes(text) for text in ("rtn(format=int8(channel))", "rtn(format=int4(channel))"))
    request = SweepRequest(
        cnn, made, small_profile(), tmp_path / "out", data=str(images_file), budget_s=0.05, limits=Limits(loss=100.0)
    )
    found = sweep(request, executor=Here(work))
    assert found.loss_metric == "accuracy lost, percentage points" and found.setting == "infer batch 1"
    for each in found.done:
        assert each.quality is not None
        assert each.figures["loss"].value == pytest.approx(-each.quality.metrics["accuracy_change"].value)
    assert found.choice.recommended in {each.name for each in found.done}


def test_variants_are_judged_in_groups_that_memory_holds() -> None:
    assert judge.together({"a": 1, "b": 1, "c": 1}, None) == [["a", "b", "c"]]
    assert judge.together({"a": 1, "b": 1, "c": 1}, 6) == [["a", "b"], ["c"]]
    assert judge.together({"a": 10, "b": 1}, 2) == [["a"], ["b"]]
    assert judge.together({}, 2) == []


def test_the_command_is_killed_and_resumed_and_its_report_is_shown_again(
    one_block: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = ["run", str(one_block), "--passes", EIGHT, "--passes", FOUR, "-p", PROFILE]
    given += ["--data", str(text_file), "-o", str(out), "--length", "32", "--samples", "8", "--quality-samples", "8"]
    given += ["--budget", "0.1", "--max-loss", "100", "--json"]
    process = [sys.executable, "-m", "compress", *given]
    with subprocess.Popen(process, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **NEUTRAL) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if "int4-group-32: Compressing" in line:  # the second worker is at work
                break
        child.send_signal(signal.SIGKILL)
    assert not out.exists()
    done = command(*given)
    assert done.returncode == 0, done.stderr
    assert "rtn-format-int8-channel: was finished before" in done.stderr
    found = json.loads(done.stdout)
    assert found["kind"] == "sweep" and [each["state"] for each in found["variants"]] == ["done", "done"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert main(["report", str(out)]) == 0
    shown = capsys.readouterr().out
    assert found["choice"]["recommended"] in shown and "Why not the others" in shown


def test_limits_with_one_recipe_are_refused(
    one_block: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["run", str(one_block), "-r", "w8a16", "--max-loss", "0.1", "-o", str(tmp_path / "out"), "-p", PROFILE])
        == 2
    )
    assert "chooses among several recipes" in capsys.readouterr().err
