"""Several recipes in one run: artifacts as single runs make them, one baseline, failures alone, kills and resumes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from compress import manifest
from compress.artifact import open_artifact
from compress.errors import InputError, Interrupted, UnsupportedError, UsageError
from compress.progress import Progress
from compress.records import Footprint
from compress.records.speed import END_TO_END, ENERGY, OPERATORS
from compress.report import load as load_report
from compress.run import run
from compress.run_report import Request
from compress.sweep import bench, judge
from compress.sweep.executor import Answer, Here, Task
from compress.sweep.finish import exit_code
from compress.sweep.load import load_sweep
from compress.sweep.page import to_html, to_markdown
from compress.sweep.records import Limits, Sweep
from compress.sweep.run import sweep
from compress.sweep.setup import SweepRequest
from compress.sweep.variant import work
from helpers.runs import deployed_bytes
from helpers.sweeps import EIGHT, FOUR, recipes, small_profile


@pytest.fixture
def asked(
    one_block: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., SweepRequest]:
    """A request for a sweep of a one-block model; arguments change it. No memory is measured, which takes processes."""
    monkeypatch.setattr(bench, "footprint", lambda *_: Footprint(disk_bytes=1))

    def make(*texts: str, **changes: Any) -> SweepRequest:
        given = {"recipes": recipes(*(texts or (EIGHT, FOUR))), "out": tmp_path / "out", **changes}
        return SweepRequest(
            str(one_block), profile=small_profile(), data=str(text_file), budget_s=0.05, command="compress run", **given
        )

    return make


class Counting(Here):
    """In this process, with a note of every task."""

    def __init__(self) -> None:
        super().__init__(work)
        object.__setattr__(self, "seen", [])

    def map(
        self, tasks: Mapping[str, Task], progress: Progress, done: Callable[[str, Answer], None] | None = None
    ) -> dict[str, Answer]:
        self.seen.extend(tasks)  # type: ignore[attr-defined]
        return super().map(tasks, progress, done)


@pytest.fixture(scope="module")
def finished(one_block: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepRequest, Sweep]:
    """One whole sweep of two recipes and one that this target cannot store."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    request = SweepRequest(
        str(one_block), recipes(EIGHT, FOUR, "rtn(format=int8(group=7))"), small_profile(), out, data=str(text_file),
        budget_s=0.05, command="compress run <img src=x onerror=alert(1)>", limits=Limits(loss=1e9),
    )  # fmt: skip
    return request, sweep(request, executor=Here(work))


def test_every_variant_is_a_complete_artifact_and_one_report_is_over_all(finished: tuple[SweepRequest, Sweep]) -> None:
    out, found = finished[0].out, finished[1]
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json", "report.html", "report.json", "report.md", "variants",
    ]  # fmt: skip
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    manifest.check_files(out)
    assert len(found.done) == 2 and sorted(path.name for path in (out / "variants").iterdir()) == sorted(
        each.name for each in found.done
    )
    for each in found.done:
        names = sorted(path.name for path in (out / each.folder).iterdir())
        assert names == ["manifest.json", "model", "onnx", "report.html", "report.json", "report.md"]
        manifest.check_files(out / each.folder)
        own = load_report(out / each.folder)
        assert own.artifact_bytes == each.artifact_bytes and own.verification == each.verification
        assert own.speed is not None and own.speed.timings == each.timings
        measured = {ENERGY: own.speed.energy, END_TO_END: own.speed.end_to_end, OPERATORS: own.speed.operators}
        # on a busy machine the little budget may not do for a whole request, which is then said
        assert own.speed.unavailable.keys() == {name for name, value in measured.items() if value is None}
        assert own.speed.variant.peak_memory_bytes and own.speed.variant.peak_memory_bytes > 10_000_000
    assert load_sweep(out) == found


def test_a_variant_is_what_a_run_with_its_recipe_alone_makes_and_is_judged_alike(
    finished: tuple[SweepRequest, Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, found = finished
    monkeypatch.setattr("compress.run._measure", lambda *_: None)
    alone = run(Request(request.model, request.recipes[1], request.profile, tmp_path / "one", data=request.data))
    folder = request.out / found.variants[1].folder
    assert deployed_bytes(folder) == deployed_bytes(tmp_path / "one")
    beside = load_report(folder)
    for name in (
        "baseline_quality",
        "artifact_quality",
        "memory_quality",
        "verification",
        "plan",
        "operators",
        "files",
    ):
        assert getattr(beside, name) == getattr(alone, name), name
    assert open_artifact(folder).facts["files"].keys() == open_artifact(tmp_path / "one").facts["files"].keys()


def test_a_recipe_that_the_target_refuses_fails_alone_with_its_reason(finished: tuple[SweepRequest, Sweep]) -> None:
    _request, found = finished
    first, second, refused = found.variants
    assert (first.state, second.state, refused.state) == ("done", "done", "failed")
    assert "group" in refused.reason and refused.exit_code in (2, 4) and not refused.figures
    assert found.choice.reasons[refused.name].startswith("failed: ")
    assert exit_code(found) == 0 and found.choice.recommended in (first.name, second.name)
    text = to_markdown(found)
    assert refused.name in text and "FAILED" in text and found.choice.recommended in text


def test_all_timings_come_from_the_same_rounds_and_variants_are_compared_pair_by_pair(
    finished: tuple[SweepRequest, Sweep],
) -> None:
    _, found = finished
    first, second = found.done
    for one, other in zip(first.timings, second.timings, strict=True):
        assert (one.baseline_s, one.control, one.rounds) == (other.baseline_s, other.control, other.rounds)
    pairs = {(each.axis, each.first, each.second): each for each in found.differences}
    assert set(pairs) == {
        (axis, *names)
        for axis in ("loss", "latency")
        for names in ((first.name, second.name), (second.name, first.name))
    }
    loss = pairs["loss", second.name, first.name]
    expected = second.figures["loss"].value - first.figures["loss"].value
    assert loss.value == pytest.approx(expected) and loss.interval.low <= expected <= loss.interval.high
    ratio = pairs["latency", first.name, second.name]
    assert ratio.interval.low < ratio.value < ratio.interval.high


def test_the_page_shows_the_front_escapes_what_it_is_given_and_stays_small(
    finished: tuple[SweepRequest, Sweep],
) -> None:
    _, found = finished
    page = to_html(found)
    assert page.count("<svg") >= 1 and "speed-up" in page and len(page.encode()) < 300_000
    assert "<img" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page and "<script>" not in page


def test_an_artifact_verb_on_a_sweep_names_its_artifacts(finished: tuple[SweepRequest, Sweep]) -> None:
    with pytest.raises(UsageError, match=r"sweep of several recipes.*rtn-format-int4-group-32"):
        open_artifact(finished[0].out)
    with pytest.raises(UsageError, match="variants/NAME"):  # what compare and reproduce read
        load_report(finished[0].out)


def test_a_stopped_sweep_goes_on_where_it_was_and_ends_in_the_same_bytes(
    asked: Callable[..., SweepRequest], finished: tuple[SweepRequest, Sweep]
) -> None:
    request, stopping = asked(), Progress(quiet=True)

    class Stopping(Counting):
        def map(self, tasks: Any, progress: Progress, done: Any = None) -> dict[str, Answer]:
            def stop(name: str, answer: Answer) -> None:
                done(name, answer)
                progress.signal_number = signal.SIGTERM

            return super().map(tasks, progress, stop)

    with pytest.raises(Interrupted):
        sweep(request, stopping, Stopping())
    assert not request.out.exists()
    again = Counting()
    found = sweep(request, executor=again)
    assert again.seen == ["rtn-format-int4-group-32"]  # type: ignore[attr-defined]
    for each, before in zip(found.done, finished[1].done, strict=True):
        assert deployed_bytes(request.out / each.folder) == deployed_bytes(finished[0].out / before.folder)
        assert each.quality == before.quality
    assert sorted(path.name for path in request.out.parent.iterdir()) == ["out"]


def test_a_kill_while_judging_or_before_the_last_rename_computes_no_variant_again(
    asked: Callable[..., SweepRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """What no handler of ours catches."""

    def kill(*_: object, **__: object) -> None:
        raise Killed

    request = asked()
    with monkeypatch.context() as patch:
        patch.setattr(bench, "time_together", kill)
        with pytest.raises(Killed):
            sweep(request, executor=Counting())
    monkeypatch.setattr(bench, "judge", kill)  # its result is in the journal
    again = Counting()
    with monkeypatch.context() as patch:
        patch.setattr("compress.engine.workspace.Workspace.commit", kill)
        with pytest.raises(Killed):
            sweep(request, executor=again)
    monkeypatch.setattr(bench, "time_together", kill)
    found = sweep(request, executor=again)
    assert not again.seen and len(found.done) == 2  # type: ignore[attr-defined]
    manifest.check_files(request.out)


def test_other_recipes_take_up_what_an_unfinished_sweep_has_of_the_same(asked: Callable[..., SweepRequest]) -> None:
    class Stopping(Counting):
        def map(self, tasks: Any, progress: Progress, done: Any = None) -> dict[str, Answer]:
            super().map(tasks, progress, done)
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        sweep(asked(), executor=Stopping())
    again = Counting()
    found = sweep(asked(FOUR, "rtn(format=int8(group=32))"), executor=again)
    assert again.seen == ["rtn-format-int8-group-32"]  # type: ignore[attr-defined]
    assert [each.name for each in found.done] == ["rtn-format-int4-group-32", "rtn-format-int8-group-32"]
    assert len(list((asked().out / "variants").iterdir())) == 2


def test_a_variant_whose_output_is_no_number_fails_alone(
    asked: Callable[..., SweepRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = judge.stream_logits

    def broken(model: Any, windows: Any, **more: Any) -> Any:
        for place, output in enumerate(real(model, windows, **more)):
            formats = {str(spec.format) for spec in model.structure.layers.values()}
            if place == 3 and any("int4" in text for text in formats):
                raise InputError("NaN in block 0")
            yield output

    monkeypatch.setattr(judge, "stream_logits", broken)
    found = sweep(asked(), executor=Here(work))
    assert [each.state for each in found.variants] == ["done", "failed"]
    assert found.variants[1].reason == "NaN in block 0" and found.variants[1].exit_code == 5
    assert [path.name for path in (asked().out / "variants").iterdir()] == ["rtn-format-int8-channel"]


def test_where_every_recipe_fails_the_first_reason_is_the_error_and_nothing_is_written(
    asked: Callable[..., SweepRequest],
) -> None:
    request = asked("rtn(format=int8(group=7))", "rtn(format=int4(group=7))")
    with pytest.raises((UsageError, UnsupportedError), match="group"):
        sweep(request, executor=Here(work))
    assert not list(request.out.parent.iterdir())


def test_recipes_that_begin_alike_share_the_first_stage_and_end_in_the_same_bytes(
    asked: Callable[..., SweepRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.run._measure", lambda *_: None)
    request = asked(f"rotate, {EIGHT}", f"rotate, {FOUR}")
    found = sweep(request, executor=Here(work))
    assert [len(each.reused) for each in found.variants] == [0, 1] and "rotate" in found.variants[1].reused[0]
    run(Request(request.model, request.recipes[1], request.profile, tmp_path / "one", data=request.data))
    assert deployed_bytes(request.out / found.variants[1].folder) == deployed_bytes(tmp_path / "one")


def test_recipes_that_could_not_be_compared_are_refused_before_any_work(asked: Callable[..., SweepRequest]) -> None:
    first, second = recipes(EIGHT, FOUR)
    longer = second.model_copy(update={"quality": second.quality.model_copy(update={"length": 16})})
    other_seed = second.model_copy(update={"seed": 3})
    for pair, told in (
        ((first, first), "given twice"),
        ((first, longer), "quality.length"),
        ((first, other_seed), "seed"),
    ):
        with pytest.raises(UsageError, match=told):
            sweep(asked(recipes=pair), executor=Here(work))
    assert not asked().out.parent.joinpath("out.partial").exists()


def test_gates_are_each_recipes_own_and_exit_3_says_that_none_may_be_taken(
    finished: tuple[SweepRequest, Sweep],
) -> None:
    _, found = finished
    assert exit_code(found) == 0
    none = found.model_copy(update={"choice": found.choice.model_copy(update={"allowed": ()})})
    assert exit_code(none) == 3
    first, second, _ = found.variants
    assert first.verification is not None
    wrong = tuple(
        each.model_copy(update={"verification": first.verification.model_copy(update={"agrees": False})})
        for each in (first, second)
    )
    assert exit_code(none.model_copy(update={"variants": wrong})) == 5
