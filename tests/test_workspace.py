"""The staging folder of an output: what may be replaced, what a kill leaves, who holds the lock."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

import compress
from compress import manifest
from compress.engine import workspace
from compress.engine.disk import disk_errors
from compress.engine.workspace import Workspace
from compress.errors import CompressError, InputError, Interrupted, ResourceError, UnsupportedError, UsageError
from compress.progress import Named, Progress
from helpers.workspaces import KEEP, begin, fill, names, whole


def test_a_commit_leaves_the_output_alone_beside_nothing(tmp_path: Path) -> None:
    begin(tmp_path / "out").commit(KEEP)
    assert whole(tmp_path / "out") == "new" and names(tmp_path) == ["out"]


def test_an_output_that_appeared_during_the_run_is_kept_and_so_is_the_result(tmp_path: Path) -> None:
    space = begin(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis").write_text("x")
    with pytest.raises(UsageError, match=r"out exists.*kept in .*out\.partial.*Move .* away or add --overwrite"), space:
        space.commit(KEEP)
    assert names(tmp_path) == ["out", "out.partial"] and names(tmp_path / "out") == ["thesis"]
    (tmp_path / "out" / "thesis").unlink()
    (tmp_path / "out").rmdir()
    again = Workspace(tmp_path / "out")
    assert "block" in again.open({"model": "a"})
    again.commit(KEEP)
    assert whole(tmp_path / "out") == "new"


def test_a_finished_result_without_journalled_steps_is_kept_too(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="kept in"), Workspace(tmp_path / "out") as space:
        space.open({"model": "a"})
        fill(space.folder, "new")
        (tmp_path / "out").mkdir()
        space.commit(KEEP)
    assert (space.folder / "model" / "weights").read_text() == "new"


@pytest.mark.parametrize("kind", ["files", "foreign manifest", "file", "link", "dangling link"])
def test_overwrite_replaces_nothing_but_an_artifact_or_an_empty_folder(tmp_path: Path, kind: str) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    if kind == "file":
        out.write_text("x")
    elif kind.endswith("link"):
        out.symlink_to(other)
        if kind == "link":
            fill(other, "old")
    else:
        out.mkdir()
        (out / ("notes" if kind == "files" else manifest.NAME)).write_text("{}")
    before = names(tmp_path)
    with (
        pytest.raises(UsageError, match=r"no folder with a manifest\.json.*Move it away"),
        Workspace(out, True) as space,
    ):
        space.open({"model": "a"})
    assert names(tmp_path) == before


def test_overwrite_checks_again_before_it_replaces(tmp_path: Path) -> None:
    space = begin(tmp_path / "out", overwrite=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis").write_text("x")
    with pytest.raises(UsageError, match=r"no folder with a manifest\.json.*kept in"), space:
        space.commit(KEEP)
    assert names(tmp_path / "out") == ["thesis"]


def test_overwrite_replaces_an_artifact_and_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    begin(tmp_path / "out", "one", overwrite=True).commit(KEEP)
    begin(tmp_path / "out", "two", overwrite=True).commit(KEEP)
    assert whole(tmp_path / "out") == "two" and names(tmp_path) == ["out"]


def test_a_folder_of_the_users_in_the_way_of_overwrite_is_named_and_kept(tmp_path: Path) -> None:
    begin(tmp_path / "out").commit(KEEP)
    for name in ("out.replaced", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis").write_text("x")
        with pytest.raises(UsageError, match=name), Workspace(tmp_path / "out", True) as space:
            space.open({"model": "a"})
        assert names(tmp_path / name) == ["thesis"]
        (tmp_path / name).rename(tmp_path / "elsewhere" if name == "out.replaced" else tmp_path / "elsewhere2")


def test_a_staging_folder_without_a_fingerprint_is_not_built_upon(tmp_path: Path) -> None:
    fill(tmp_path / "out.partial", "of another run that was killed in its commit")
    with Workspace(tmp_path / "out") as space:
        space.open({"model": "a"})
        assert names(space.folder) == ["fingerprint.json"]


def test_a_kill_while_the_fingerprint_is_written_blocks_nothing(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "fingerprint.json.tmp").write_text("{")
    with Workspace(tmp_path / "out") as space:
        assert not space.open({"model": "a"}).steps


def test_the_lock_is_held_until_the_output_is_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path / "out", "old").commit(KEEP)
    space, refused = begin(tmp_path / "out", overwrite=True), []
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        for moment in ("before", "after"):
            if moment == "after":
                real(self, target)
            with pytest.raises(UsageError, match="Another run"):
                Workspace(tmp_path / "out", True).open({"model": "a"})
            refused.append(moment)
        return target

    monkeypatch.setattr(Path, "rename", rename)
    space.commit(KEEP)
    assert refused == ["before", "after"] * 2


def test_a_lock_on_a_file_that_was_removed_meanwhile_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Workspace(tmp_path / "out"), Workspace(tmp_path / "out")
    first.open({"model": "a"})
    real, opened = fcntl.flock, []

    def flock(stream: object, how: int) -> None:
        opened.append(stream)
        if len(opened) == 1:  # the first run ends between the second one's open and its lock
            first.close()
        real(stream, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", flock)
    second.open({"model": "a"})
    assert len(opened) == 2
    with pytest.raises(UsageError, match="Another run"):
        Workspace(tmp_path / "out").open({"model": "a"})
    second.close()
    assert names(tmp_path) == ["out.partial"]


def _take_often(out: Path, rounds: int, clashes: list[str]) -> None:
    """Takes the lock again and again; tells where another one is inside with it."""
    while rounds:
        with suppress(UsageError), Workspace(out) as space:
            space.open({"model": "a"})
            try:
                os.close(os.open(out.parent / "inside", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                clashes.append("two at once")
            time.sleep(0.0005)
            (out.parent / "inside").unlink(missing_ok=True)
            rounds -= 1


def test_of_many_runs_one_at_a_time_holds_the_lock(tmp_path: Path) -> None:
    clashes: list[str] = []
    workers = [threading.Thread(target=_take_often, args=(tmp_path / "out", 100, clashes)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not clashes and names(tmp_path) == ["out.partial"]


@pytest.mark.parametrize("error", [UsageError, InputError, ResourceError, UnsupportedError])
def test_a_run_that_ends_in_a_users_error_before_any_step_leaves_nothing(
    tmp_path: Path, error: type[CompressError]
) -> None:
    with pytest.raises(error), Workspace(tmp_path / "out") as space:
        space.open({"model": "a"})
        (space.folder / "scratch").write_text("x")
        raise error("x")
    assert not names(tmp_path)


@pytest.mark.parametrize("error", [Interrupted("x"), RuntimeError("x"), KeyboardInterrupt()])
def test_a_stop_or_a_bug_keeps_the_staging_folder(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), Workspace(tmp_path / "out") as space:
        space.open({"model": "a"})
        raise error
    assert names(tmp_path) == ["out.partial"]


def test_finished_steps_outlive_an_error_and_so_does_the_run_of_another(tmp_path: Path) -> None:
    with pytest.raises(ResourceError), Workspace(tmp_path / "out") as space:
        space.open({"model": "a"}).add("block")
        raise ResourceError("x")
    with pytest.raises(UsageError, match="differs in: model"), Workspace(tmp_path / "out") as space:
        space.open({"model": "b"})
    with Workspace(tmp_path / "out") as space:
        assert "block" in space.open({"model": "a"})


def test_too_little_disk_does_not_block_the_corrected_run(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.recipe import load as load_recipe
    from compress.run import run
    from compress.run_report import Request

    monkeypatch.setattr(workspace.shutil, "disk_usage", lambda _: shutil_usage(1))
    recipe = load_recipe("w4a16")
    request = Request(
        str(llama), recipe, compress.hwprofiles.load("cpu-x86-avx512-vnni"), tmp_path / "out", str(text_file)
    )
    with pytest.raises(ResourceError, match="MB free") as told:
        run(request)
    assert "out.partial" not in str(told.value)
    assert not names(tmp_path)


def shutil_usage(free: int) -> object:
    import shutil

    return shutil._ntuple_diskusage(100, 100 - free, free)  # type: ignore[attr-defined]


@pytest.mark.parametrize("out", [".", "/", "..", "a/..", ""])
def test_an_output_without_a_name_of_its_own_is_a_usage_error(out: str) -> None:
    with pytest.raises(UsageError, match="no name of its own"):
        Workspace(Path(out))


def test_an_output_with_a_name_too_long_is_a_resource_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="name too long"), Workspace(tmp_path / ("x" * 250)) as space:
        space.open({"model": "a"})


@pytest.mark.parametrize(
    ("numbers", "code"),
    [((signal.SIGTERM, signal.SIGTERM), 143), ((signal.SIGINT, signal.SIGTERM), 143), ((signal.SIGINT,) * 2, 130)],
)
def test_a_second_signal_stops_at_once_and_its_number_is_carried(numbers: tuple[int, int], code: int) -> None:
    progress = Progress(quiet=True)
    with pytest.raises(Interrupted, match="at once") as caught, progress.catching_signals():
        for number in numbers:
            os.kill(os.getpid(), number)
    assert 128 + caught.value.signal_number == code


def test_a_worker_leaves_it_to_its_parent_to_tell_of_a_signal(capsys: pytest.CaptureFixture[str]) -> None:
    for told in (True, False):
        progress = Progress()
        with progress.catching_signals(told=told):
            os.kill(os.getpid(), signal.SIGINT)
        assert progress.signal_number == signal.SIGINT
        assert ("Stopping after this step" in capsys.readouterr().err) is told


def test_the_progress_of_one_of_several_begins_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    outer = Progress()
    Named(outer, "w4a16").tick("Comparing continuations", 0, 12)
    assert "w4a16: Comparing continuations: 0/12" in capsys.readouterr().err
    outer.signal_number = signal.SIGINT
    with pytest.raises(Interrupted):
        Named(outer, "w4a16").check()


def test_the_command_that_a_second_sigterm_stops_exits_143() -> None:
    program = """
import os, signal, sys
import compress.opening, compress.__main__
def generate(*_args, **_more):
    from compress.progress import Progress
    with Progress(quiet=True).catching_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
compress.opening.open_engine = generate
sys.exit(compress.__main__.main(["generate", "x", "--prompt", "y", "--json"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 143, done.stderr
    assert json.loads(done.stdout)["error"]["exit_code"] == 143


def test_a_short_write_without_an_error_number_is_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="No space left") as told, disk_errors(tmp_path / "out.partial" / "model"):
        raise OSError("1048576 requested and 0 written")
    assert "out.partial" not in str(told.value)  # which is gone when the error is read
