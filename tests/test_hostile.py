"""Hostile files, each refused with its exit code, in one paragraph, with nothing written.

What is attacked elsewhere is not repeated here:

    ONNX graphs: external data, links, overlaps, functions without end      test_onnx_file.py
    ONNX graphs that ask for memory or do not end                           test_onnx_models.py
    names with markup and escapes on the three pages of a report            test_report.py, test_report_forms.py
    code that a report names                                                test_reproduction.py
    profiles that are no YAML, builds of objects, keys twice                test_hwprofiles.py
    two runs on one output, kills at every rename, full disks               test_workspace_kills.py, test_store.py
    signals, kills at any file operation of a run                           test_run_stopped.py
"""

from __future__ import annotations

import errno
import importlib
import sys
from pathlib import Path

import pytest

import onnx_graphs
from compress import hwprofiles, manifest
from compress.__main__ import main
from compress.engine.journal import Journal
from compress.export import find
from compress.models.loading import load
from compress.pipeline import Pipeline
from hostile import PROFILE, Attack, Place, artifacts, configs, data, settings, weights


@pytest.fixture(scope="session")
def sealed(two_blocks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, a checkpoint and a graph, with a manifest that tells their digests. Do not write into it."""
    out = tmp_path_factory.mktemp("sealed") / "artifact"
    model, profile = load(two_blocks), hwprofiles.load(PROFILE)
    Pipeline.parse("rtn(format=int8(group=32))").run(model, folder=out / "model")
    find("checkpoint").write(model, profile, out / "checkpoint")
    (out / "onnx").mkdir()
    onnx_graphs.save(onnx_graphs.classifier(), out / "onnx" / "model.onnx")
    assert profile.detect is not None
    anywhere = profile.detect.model_copy(update={"architecture": ("x86_64", "aarch64")})
    fitting = profile.model_copy(update={"isa": (), "detect": anywhere, "target": "checkpoint"})
    kept = {"ids": [[1] * 64] * 9, "bounds": {"shipped": 0.1}}
    facts = {"task": str(model.task), "profile": fitting.model_dump(mode="json"), "verification": kept}
    manifest.write(out, facts, ["model", "checkpoint", "onnx"])
    return out


ALL = (*weights.ATTACKS, *configs.ATTACKS, *data.ATTACKS, *settings.ATTACKS, *artifacts.ATTACKS)


@pytest.mark.parametrize("attack", ALL, ids=lambda attack: attack.name.replace(" ", "-"))
def test_it_is_refused_in_one_paragraph_and_nothing_is_written(
    attack: Attack,
    two_blocks: Path,
    text_file: Path,
    sealed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for where, value in attack.limits:
        module, _, name = where.partition(":")
        monkeypatch.setattr(importlib.import_module(module), name, value)
    given = [str(word) for word in attack.make(Place(tmp_path, two_blocks, text_file, sealed))]
    before = sorted(tmp_path.rglob("*"))
    code = main(given)
    printed, said = capsys.readouterr()
    assert attack.said in said and code == attack.code, f"exit {code}: {said[:2000]}"
    assert "Traceback" not in said and "bug of compress" not in said and "\x1b" not in said + printed
    assert len(said) < 3000
    assert sorted(tmp_path.rglob("*")) == before
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "Out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "Out of memory"),
        (RuntimeError("can't start new thread"), "Out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/full/x"), "No space left while writing /full/x"),
        (OSError(errno.EACCES, "Permission denied", "/closed/x"), "/closed/x cannot be used: Permission denied"),
    ],
)
def test_a_machine_that_is_too_small_or_refuses_is_no_bug(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("compress.report.load", fail)
    assert main(["report", "anything"]) == 6
    told = capsys.readouterr().err
    assert said in told and "bug" not in told


def test_a_journal_with_a_line_of_something_else_ends_before_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    whole = '{"step": "a", "data": 1}\n'
    for line in ("5", "null", "[]", '{"step": 1}', "[" * 100_000, "\0\0"):
        path.write_text(f"{whole}{line}\n{whole}")
        assert Journal(path).steps == {"a": 1} and path.read_text() == whole
