"""Runs that are stopped: signals, kills at any moment, a closed pipe, and the command that resumes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from compress import artifact, manifest
from compress.__main__ import main
from compress.errors import Interrupted
from helpers import killed
from helpers.runs import NEUTRAL, PROFILE, Done, arguments, deployed_bytes

EVERY = 8
"""File operations of a run from one kill to the next."""


def test_the_command_that_resumes_can_be_pasted_into_a_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Interrupted("Stopped.", signal.SIGTERM)

    monkeypatch.setattr(artifact, "export", stop)
    assert main(["export", "my out", "-p", PROFILE, "-o", "it's"]) == 143
    assert f"repeat: compress export 'my out' -p {PROFILE} -o 'it'\"'\"'s'" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_verb_that_keeps_nothing_without_a_traceback(
    finished: tuple[Path, Done], number: int, code: int
) -> None:
    given = [sys.executable, "-m", "compress", "profile", str(finished[0]), "--budget", "3"]
    with subprocess.Popen(given, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **NEUTRAL) as child:
        assert child.stderr is not None
        assert any("Timing settings" in line for line in child.stderr)
        child.send_signal(number)
        _, errors = child.communicate(timeout=120)
    assert child.returncode == code, errors
    assert "Stopped" in errors and "Traceback" not in errors


def test_verify_says_what_it_does_unless_it_is_quiet(
    finished: tuple[Path, Done], capsys: pytest.CaptureFixture[str]
) -> None:
    out = finished[0]
    assert main(["verify", str(out)]) == 0
    told = capsys.readouterr().err
    stages = ("Checking the files of", "Running the model in torch", "Comparing the artifact with its model: 0/")
    assert all(stage in told for stage in stages)
    assert main(["verify", str(out), "-q"]) == 0
    assert not capsys.readouterr().err


def test_changed_code_of_ours_is_another_run(
    two_blocks: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Killed(BaseException):
        """What no handler of ours catches."""

    def kill(*_: object) -> None:
        raise Killed

    given = [*arguments(two_blocks, text_file, tmp_path / "out"), "-q", "--overwrite"]
    monkeypatch.setattr(sys.modules["compress.run"], "_export_both", kill)
    with pytest.raises(Killed):
        main(given)
    monkeypatch.setattr(manifest, "code_digest", lambda: "another")
    assert main(given) == 2
    assert "an unfinished run that differs in: code" in capsys.readouterr().err


def test_kills_at_any_file_operation_leave_no_output_and_end_in_the_same_bytes(
    finished: tuple[Path, Done], two_blocks: Path, text_file: Path, captures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = [sys.executable, Path(killed.__file__), captures, out, EVERY, *arguments(two_blocks, text_file, out), "-q"]
    done = subprocess.run(list(map(str, given)), capture_output=True, text=True, timeout=400, check=False, **NEUTRAL)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 6, done.stdout
    assert deployed_bytes(out) == deployed_bytes(finished[0])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ctrl_c_finishes_the_block_and_prints_the_command_that_resumes(
    make_llama: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model = make_llama("deep", num_hidden_layers=12)
    out = tmp_path / "out"
    given = [sys.executable, "-m", "compress", *arguments(model, text_file, out)]
    with subprocess.Popen(given, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **NEUTRAL) as child:
        journal = tmp_path / "out.partial" / "journal.jsonl"
        deadline = time.monotonic() + 60
        while not journal.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=120)
    assert child.returncode == 130, errors
    assert "To resume, repeat: compress run" in errors and "Traceback" not in errors
    assert not out.exists() and 0 < len(journal.read_text().splitlines()) < 12


@pytest.mark.parametrize("verb", [["hardware", "show", PROFILE], ["hardware", "list"], ["passes"], ["--help"]])
def test_a_reader_that_closes_our_output_is_no_bug(verb: list[str]) -> None:
    given = [sys.executable, "-m", "compress", *verb]
    with subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **NEUTRAL) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.close()
        errors = child.stderr.read()
    assert child.returncode == 141 and not errors
