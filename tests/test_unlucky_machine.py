"""A command on a machine that is in its way: streams closed or full, signals, no such folder, limits of the system."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from compress import calibrate, report
from compress.__main__ import main
from compress.engine.disk import disk_errors
from compress.engine.workspace import Workspace
from compress.errors import InputError, ResourceError, UsageError
from compress.export.onnx import profiler
from compress.models import weight_files
from compress.progress import Progress
from compress.sweep.executor import read_answer
from helpers.runs import NEUTRAL, PROFILE, arguments
from helpers.workspaces import KEEP, begin, names

COMPRESS = f"{sys.executable} -m compress"
STOPPED = """
import os, signal, sys, time
import compress.__main__, compress.files, compress.hwprofiles
def names():
    with compress.files.scratch_folder() as folder:
        print(folder, flush=True)
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
compress.hwprofiles.names = names
sys.argv = ["compress", "hardware", "list"]
compress.__main__.entry()
"""


def shell(text: str, **settings: str) -> subprocess.CompletedProcess[str]:
    env = {**NEUTRAL["env"], **settings}
    return subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, timeout=120, check=False, cwd=NEUTRAL["cwd"], env=env
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_works_where_standard_streams_are_closed(closed: str) -> None:
    done = shell(f"{COMPRESS} hardware list {closed}")
    assert done.returncode == 0 and not done.stderr
    assert (PROFILE in done.stdout) is (">&-" not in closed.split())


def test_no_file_takes_the_number_of_a_closed_stream() -> None:
    program = "import os, compress.cli.streams as s; s.open_closed(); "
    program += "print(os.open(os.devnull, 0) > 2, file=s.sys.stderr)"
    assert shell(f"{sys.executable} -c '{program}' <&- >&-").stderr == "True\n"


@pytest.mark.parametrize(
    ("verb", "unbuffered"), [("hardware list", ""), (f"hardware show {PROFILE}", "1"), ("hardware list --json", "1")]
)
def test_an_output_that_cannot_be_written_is_told_and_is_no_success(verb: str, unbuffered: str) -> None:
    done = shell(f"{COMPRESS} {verb} > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 6
    assert done.stderr.startswith("compress: Standard output cannot be written (No space left on device)")
    assert len(done.stderr.splitlines()) == 1


def test_an_error_keeps_its_exit_code_and_is_told_on_stderr_where_its_json_cannot_be_written() -> None:
    done = shell(f"{COMPRESS} report nothing --json > /dev/full")
    assert done.returncode == 2 and "nothing" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_log_on_a_full_disk_changes_no_exit_code() -> None:
    assert shell(f"{COMPRESS} report nothing 2> /dev/full").returncode == 2


def test_a_terminal_that_is_gone_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def isatty(self) -> bool:
            return True

        def write(self, _text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

        def flush(self) -> None: ...

    monkeypatch.setattr(sys, "stderr", Gone())
    progress = Progress()
    for done in range(3):
        progress.tick("Working", done, 2)
    progress.note("done")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_output_cannot_show_is_written_as_its_code(encoding: str) -> None:
    program = "import sys; from compress.cli import streams; streams.name_output(); print('x → y')"
    done = shell(f'{sys.executable} -c "{program}"', PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and "x \\u2192 y" in done.stdout


def test_two_quick_signals_leave_no_temporary_folder_and_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STOPPED], capture_output=True, text=True, timeout=120, check=False, **NEUTRAL
    )
    assert done.returncode == 130 and done.stderr == "compress: Stopped at once.\n"
    assert not Path(done.stdout.strip()).exists()


def test_a_terminal_that_closes_asks_for_a_stop_once_however_often_it_says_so() -> None:
    progress, before = Progress(quiet=True), signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    try:
        with progress.catching_signals():
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGHUP)
        assert progress.signal_number == signal.SIGHUP and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_under_nohup_outlives_its_terminal() -> None:
    before, progress = signal.signal(signal.SIGHUP, signal.SIG_IGN), Progress(quiet=True)
    try:
        with progress.catching_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert progress.signal_number is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_worker_that_a_closed_terminal_stopped_is_no_failed_recipe() -> None:
    told = json.dumps({"error": {"message": "Stopped"}})
    answer = read_answer(129, told)
    assert getattr(answer, "signal_number", None) == signal.SIGHUP


def test_a_name_that_is_no_text_is_refused_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model", "-r", "w8a16", "-o", os.fsdecode(b"out\xff")]) == 2
    assert "is not UTF-8" in capsys.readouterr().err


def test_a_current_folder_that_was_removed_is_named_as_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert main(["plan", "model", "-r", "w8a16"]) == 2
    assert "was it removed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/x']"), "TMPDIR"),
        (OSError(errno.ENOSPC, "No space left on device", "from", None, "to"), "while writing to."),
    ],
)
def test_a_limit_of_the_system_is_no_bug(
    error: OSError, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(report, "load", fail)
    assert main(["report", "anything"]) == 6
    assert said in capsys.readouterr().err


def test_an_error_of_a_place_elsewhere_is_not_told_of_the_output(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/scratch/compress-x/y")
    with (
        pytest.raises(ResourceError, match=r"while writing /scratch/compress-x/y.*TMPDIR"),
        disk_errors(tmp_path / "out"),
    ):
        raise full
    inside = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out.partial" / "stages" / "x"))
    deep = tmp_path / "out.partial" / "variants" / "a"
    with pytest.raises(ResourceError, match=r"while writing .*out/variants/a\. Free"), disk_errors(deep):
        raise inside


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_ring_of_links_is_no_place_for_an_output(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "ring").symlink_to("ring")
    with pytest.raises(UsageError, match="ring"), Workspace(tmp_path / "ring", overwrite) as space:
        space.spare("model")
        space.open({"model": "a"})
    assert names(tmp_path) == ["ring"]


def test_a_file_system_that_locks_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ResourceError, match="locks no files"), Workspace(tmp_path / "out") as space:
        space.open({"model": "a"})


@pytest.mark.parametrize("source", ["out/model", "out/model:make", "link"])
def test_overwrite_never_deletes_what_the_output_is_made_from(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path / "out", "old").commit(KEEP)
    (tmp_path / "link").symlink_to(tmp_path / "out" / "model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="which --overwrite deletes"), Workspace(Path("out"), True) as space:
        space.spare(None, "org/name", source)
    assert names(tmp_path) == ["link", "out"]
    Workspace(Path("new"), True).spare(source)
    Workspace(Path("out"), True).spare("out", tmp_path)


def test_a_place_that_cannot_hold_a_profile_is_told_before_a_minute_of_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ResourceError, match="cannot be written"):
        calibrate.require_new(tmp_path / "mine.yaml")


def test_onnx_runtime_reports_to_nobody(tmp_path: Path) -> None:
    program = "import compress, onnxruntime as o, onnx_graphs; "
    program += "o.InferenceSession(onnx_graphs.classifier().SerializeToString())"
    here = {"PYTHONPATH": str(Path(__file__).parent), "TMPDIR": str(tmp_path)}
    done = shell(f'{sys.executable} -c "{program}"', **here)
    assert done.returncode == 0, done.stderr
    assert not names(tmp_path)


def test_a_run_on_a_model_inside_of_what_it_would_replace_is_refused_before_any_work(
    two_blocks: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path / "out", "old").commit(KEEP)
    shutil.copytree(two_blocks, tmp_path / "out" / "checkpoint")
    given = arguments(tmp_path / "out" / "checkpoint", text_file, tmp_path / "out", "w8a16")
    assert main([*given, "-q", "--overwrite"]) == 2
    assert "which --overwrite deletes" in capsys.readouterr().err
    assert main([*given, "-q", "--overwrite", "--passes", "rtn"]) == 2  # as one of several recipes
    assert "which --overwrite deletes" in capsys.readouterr().err
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "checkpoint" / "config.json").is_file()


@pytest.mark.parametrize("task", ["", "[1]\n", "{\n"])
def test_a_worker_without_a_task_says_what_it_reads(
    task: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(task))
    assert main(["worker"]) == 2
    assert "A worker reads its task" in capsys.readouterr().err


def test_a_profile_of_operators_that_a_full_disk_cut_off_is_no_bug(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('[{"cat": "Nod')
    with pytest.raises(ResourceError, match=r"run\.json is not whole.*TMPDIR"):
        profiler._read(tmp_path / "run.json")


def test_weights_that_may_not_be_read_are_not_called_malformed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise FileNotFoundError("No such file or directory")

    (tmp_path / "model.safetensors").write_bytes(b"x")
    monkeypatch.setattr(weight_files, "safe_open", refused)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read: you lack"):
        weight_files.open_file(tmp_path / "model.safetensors")
