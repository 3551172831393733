"""`compress reproduce`: a run repeated from its report, refused where something is not what it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compress import hwprofiles, recipe
from compress.__main__ import main
from compress.comparison.reproduction import Places, check, judge, reproduce, request_of
from compress.errors import CompressError, InputError, UsageError
from compress.hwprofiles import Profile
from compress.records import Asked, Interval, Metric, Quality, Report
from compress.report import load as load_report
from compress.run import run
from compress.run_report import Request
from helpers.reports import report_of


def small_profile() -> Profile:
    """Any machine's, with one setting to time."""
    found = hwprofiles.load("cpu-x86-avx512-vnni")
    assert found.detect is not None
    anywhere = found.detect.model_copy(update={"architecture": ("x86_64", "aarch64")})
    grid = found.grid.model_copy(update={"prefill": (), "decode": ((1, 8),)})
    return found.model_copy(update={"isa": (), "detect": anywhere, "grid": grid})


@pytest.fixture(scope="module", autouse=True)
def untimed() -> Iterator[None]:
    """Nothing here depends on speed, which takes the most time to measure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.run._measure", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def made(one_block: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run. Do not write into it."""
    out = tmp_path_factory.mktemp("reproduce") / "out"
    content = {"passes": "rtn(format=int8(group=32))", "quality": {"samples": 8, "length": 32, "generation": 0}}
    chosen = recipe.parse({**content, "calibration": {"samples": 4, "length": 32}}, "small", "test")
    run(Request(str(one_block), chosen, small_profile(), out, data=str(text_file), budget_s=0.1))
    return out


def test_a_report_is_reproduced_to_the_byte(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", str(made / "report.json"), "-o", "again", "-q"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "reproduced: same bytes"
    files = load_report(made).files
    assert told[1] == f"{len(files)} files have the bytes that the report tells"
    assert {name.split("/")[0] for name in files} == {"model", "onnx"}
    assert load_report(tmp_path / "again").files == files
    again = load_report(tmp_path / "again").request
    assert again == load_report(made).request


def test_what_is_not_what_it_was_is_named_before_the_run(
    made: Path, tmp_path: Path, make_llama: Any, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.comparison.reproduction.run", lambda *_: pytest.fail("it ran"))
    report, other = load_report(made), tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    wider = make_llama("wider", num_hidden_layers=2)
    for places, words in (
        (Places(model=str(wider)), "source differs.*--model"),
        (Places(data=str(other)), "calibration data differ"),
        (Places(model=str(tmp_path / "none")), "source of this report cannot be found again.*--model"),
        (Places(data=str(tmp_path / "none.txt")), "data of this report cannot be found again.*--data"),
        (Places(quality=str(other)), "--quality-data: the run had no such file"),
    ):
        with pytest.raises(UsageError, match=words):
            reproduce(report, tmp_path / "out", places)
    assert not (tmp_path / "out").exists()


def test_other_versions_code_and_machines_are_warnings(made: Path, tmp_path: Path) -> None:
    report = load_report(made)
    assert report.request is not None
    assert check(report, request_of(report, Places(), tmp_path)) == ()
    asked = report.request.model_copy(update={"code_digest": "00", "machine": {"cpu": "x"}, "threads": 77})
    moved = report.model_copy(update={"request": asked, "versions": {**report.versions, "torch": "1.0"}})
    notes = " ".join(check(moved, request_of(moved, Places(), tmp_path)))
    for words in ("torch was 1.0", "code of compress has changed", "another machine", "77 threads then"):
        assert words in notes


def test_the_request_is_the_one_that_was_made(made: Path, one_block: Path, text_file: Path, tmp_path: Path) -> None:
    found = request_of(load_report(made), Places(), tmp_path)
    assert (found.model, found.data, found.budget_s) == (str(one_block), str(text_file), 0.1)
    assert found.profile == small_profile()
    assert found.recipe.passes == "rtn(format=int8(group=32))" and found.recipe.quality.samples == 8
    assert found.recipe.calibration.model_fields_set == {"samples", "length"}


def asked(**changes: Any) -> Asked:
    given: dict[str, Any] = {
        "task": "causal-lm",
        "is_local": True,
        "recipe": {"name": "r", "passes": "rtn"},
        "profile": small_profile().model_dump(mode="json"),
        "options": {"data": "text.txt", "device": "cpu", "budget_s": 1.0},
    }
    return Asked(threads=1, code_digest="00", **{**given, **changes})


def report(kl: float = 0.005, half: float | None = 0.001, digest: str = "data", **changes: Any) -> Report:
    interval = None if half is None else Interval(low=kl - half, high=kl + half)
    metric = Metric(value=kl, interval=interval, samples=9, unit="nats/token", protocol="p", better="lower")
    quality = Quality(subject="compressed", where="ort", metrics={"kl": metric}, data_digest=digest)
    given: dict[str, Any] = {
        "artifact_quality": quality,
        "request": asked(),
        "files": {"onnx/model.onnx": "aa", "model/a": "bb"},
    }
    return report_of(**{**given, **changes})


@pytest.mark.parametrize(
    "wrong",
    [
        {"source": "evil.py:make"},
        {"request": asked(options={"data": "os:abort"})},
        {"request": asked(recipe={"passes": "rtn", "calibration": {"data": "os:abort"}})},
        {"request": asked(recipe={"passes": "rtn", "quality": {"data": "os:abort"}})},
    ],
)
def test_a_report_cannot_have_code_run_that_the_user_did_not_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"names code to be run.*name it yourself: --"):
        request_of(report(**wrong), Places(), Path("out"))


def test_code_is_run_where_the_user_names_it() -> None:
    given = report(source="mine.py:make", request=asked(recipe={"passes": "rtn", "quality": {"data": "mod:f"}}))
    found = request_of(given, Places(model="mine.py:make", quality="mod:f"), Path("out"))
    assert (found.model, found.recipe.quality.data) == ("mine.py:make", "mod:f")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"request": None}, "holds no request.*compress run x"),
        ({"request": asked(options={"budget_s": "long"})}, "request is malformed: budget_s"),
        ({"request": asked(options={"device": "\x1b[31mfpga"})}, "device"),
        ({"request": asked(profile={"id": 3})}, "hardware profile is malformed"),
        ({"request": asked(recipe={"passes": "rtn", "seeds": 1})}, "unknown key 'seeds'"),
        ({"request": asked(recipe={})}, "'passes' is missing"),
        ({"request": asked(recipe={"passes": "rtn", "quality": 3})}, "quality"),
    ],
)
def test_a_malformed_request_is_one_paragraph(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(CompressError, match=words) as error:
        request_of(report(command="compress run x", **wrong), Places(), Path("out"))
    assert isinstance(error.value, UsageError | InputError) and "\x1b" not in str(error.value)


def test_options_of_a_newer_release_are_left_out() -> None:
    assert request_of(report(request=asked(options={"warp": 9})), Places(), Path("out")).data is None


OTHER = {"onnx/model.onnx": "cc", "model/a": "bb"}


@pytest.mark.parametrize(
    ("made", "verdict"),
    [
        (report(), "reproduced: same bytes"),
        (report(files=OTHER), "reproduced: same figures within intervals"),
        (report(0.0055, files=OTHER), "reproduced: same figures within intervals"),
        (report(0.009, files=OTHER), "differs"),
        (report(0.009), "differs"),
        (report(files=OTHER, artifact_bytes=504), "reproduced: same figures within intervals"),
        (report(files=OTHER, artifact_bytes=520), "differs"),
        (report(files=OTHER, digest="other"), "differs"),
        (report(0.006, half=None, files={}), "reproduced: same figures within intervals"),
    ],
)
def test_bytes_and_figures_decide(made: Report, verdict: str) -> None:
    assert judge(report(), made).verdict == verdict


def test_without_any_figure_to_compare_the_bytes_alone_decide() -> None:
    first, other = report(artifact_quality=None), report(artifact_quality=None, files=OTHER)
    same = judge(first, first)
    assert (same.verdict, same.notes) == ("reproduced: same bytes", ())
    found = judge(first, other)
    assert found.verdict == "differs" and "no quality figure could be compared" in found.notes


def test_what_differs_is_named() -> None:
    found = judge(report(), report(0.009, files={"onnx/model.onnx": "cc", "new": "dd"}))
    assert found.changed == ("model/a", "new", "onnx/model.onnx")
    assert found.figures == ("kl",)
    assert judge(report(files={}), report()).verdict == "reproduced: same figures within intervals"
