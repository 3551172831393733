"""Tasks in processes of their own: answers in order, failures alone, signals passed on, no worker left behind."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from compress.errors import CompressError, InputError, Interrupted, ResourceError, UnsupportedError
from compress.progress import Progress
from compress.sweep import executor
from compress.sweep.executor import Executor, Here, Processes, Ray, read_answer, workers_that_fit
from helpers.runs import NEUTRAL

SCRIPT = """
import json, os, signal, sys, time
task = json.loads(sys.stdin.readline())
def stop(number, frame):
    print(json.dumps({"error": {"type": "Interrupted", "message": "stopped", "exit_code": 128 + number}}))
    sys.stdout.flush()
    os._exit(128 + number)
signal.signal(signal.SIGINT, stop)
began = time.monotonic()
if "log" in task:
    open(task["log"], "a").write("x")
if task["do"] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if task["do"] == "refuse":
    print(json.dumps({"error": {"type": "UnsupportedError", "message": "not here", "exit_code": 4}}))
    sys.exit(4)
time.sleep(task.get("sleep", 0))
print("noise on stdout")
print(json.dumps({"twice": 2 * task["number"], "began": began, "ended": time.monotonic()}))
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> None:
    """A light worker in place of `compress worker`."""
    monkeypatch.setattr(executor, "WORKER", ("-c", SCRIPT))


def quiet() -> Progress:
    return Progress(quiet=True)


def test_answers_come_in_the_order_of_the_tasks_and_a_failure_or_a_kill_is_that_tasks_alone(script: None) -> None:
    told: list[str] = []
    tasks = {
        "a": {"do": "work", "number": 1, "sleep": 0.3},
        "b": {"do": "refuse"},
        "c": {"do": "die"},
        "d": {"do": "work", "number": 4},
    }
    found = Processes(workers=4).map(tasks, quiet(), lambda name, _: told.append(name))
    assert list(found) == ["a", "b", "c", "d"] and sorted(told) == ["a", "b", "c", "d"]
    first, last = found["a"], found["d"]
    assert isinstance(first, dict) and isinstance(last, dict) and (first["twice"], last["twice"]) == (2, 8)
    assert isinstance(found["b"], UnsupportedError) and str(found["b"]) == "not here"
    assert isinstance(found["c"], ResourceError) and "killed, for want of memory" in str(found["c"])


def test_no_more_workers_are_at_work_than_were_asked_for(script: None) -> None:
    tasks = {str(number): {"do": "work", "number": number, "sleep": 0.05} for number in range(3)}
    found = [answer for answer in Processes(workers=1).map(tasks, quiet()).values() if isinstance(answer, dict)]
    assert len(found) == 3
    assert all(before["ended"] <= after["began"] for before, after in itertools.pairwise(found))


def test_a_signal_reaches_the_workers_and_nothing_more_is_begun(script: None, tmp_path: Path) -> None:
    log, progress = tmp_path / "log", quiet()

    def ask(name: str, _: object) -> None:
        progress.signal_number = signal.SIGINT

    tasks = {"short": {"do": "work", "number": 0, "log": str(log)}}
    tasks |= {str(place): {"do": "work", "number": 1, "sleep": 60, "log": str(log)} for place in range(3)}
    began = time.monotonic()
    with pytest.raises(Interrupted):
        Processes(workers=2).map(tasks, progress, ask)
    assert time.monotonic() - began < 30 and len(log.read_text()) == 2


def test_a_worker_ends_with_the_process_that_wanted_its_answer() -> None:
    code = "import time\nfrom compress.sweep.executor import read_task\nprint(read_task(), flush=True)\ntime.sleep(300)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **NEUTRAL
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write('{"a": 1}\n')
        child.stdin.flush()
        assert child.stdout.readline() == "{'a': 1}\n"
        child.stdin.close()  # as the end of the parent does
        assert child.wait(timeout=60) == 143


def test_in_this_process_a_failure_is_alone_too_and_an_interruption_ends_all() -> None:
    def work(task: Any, progress: Progress) -> dict[str, Any]:
        if "error" in task:
            raise task["error"]
        return {"twice": 2 * task["number"]}

    found = Here(work).map({"a": {"error": InputError("NaN")}, "b": {"number": 3}}, quiet())
    assert isinstance(found["a"], InputError) and found["b"] == {"twice": 6}
    with pytest.raises(Interrupted):
        Here(work).map({"a": {"error": Interrupted("stop")}, "b": {"number": 3}}, quiet())


@pytest.mark.parametrize(
    ("code", "output", "kind"),
    [
        (6, '{"error": {"message": "full", "exit_code": 6}}', ResourceError),
        (130, '{"error": {"message": "stop", "exit_code": 130}}', Interrupted),
        (1, '{"error": {"message": "KeyError: 3. This is a bug of compress", "exit_code": 1}}', InputError),
        (0, "", InputError),
        (7, "half a li", InputError),
        (0, "[1]", InputError),
        (-11, "", ResourceError),
        (137, "", ResourceError),
    ],
)
def test_whatever_a_worker_prints_becomes_an_error_with_a_sentence(
    code: int, output: str, kind: type[CompressError]
) -> None:
    found = read_answer(code, output)
    assert isinstance(found, kind) and str(found)


def test_memory_holds_at_least_one_worker() -> None:
    assert workers_that_fit(4, 10, 35) == 3
    assert workers_that_fit(4, 10, 5) == 1
    assert workers_that_fit(4, 10, None) == 4


def test_without_its_extra_ray_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedError, match=r"compress\[distributed\]"):
        Ray().map({"a": {}}, quiet())


def test_ray_answers_as_processes_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (extra distributed)")
    # named by a file: what a test puts into this module is not in the processes of Ray
    (tmp_path / "light.py").write_text(SCRIPT)
    monkeypatch.setattr(executor, "WORKER", (str(tmp_path / "light.py"),))
    tasks = {"a": {"do": "work", "number": 1}, "b": {"do": "refuse"}, "c": {"do": "die"}}
    runners: list[Executor] = [Ray(workers=1), Processes()]
    by_ray, by_processes = (runner.map(tasks, quiet()) for runner in runners)
    assert list(by_ray) == list(by_processes) == ["a", "b", "c"]
    assert isinstance(by_ray["a"], dict) and by_ray["a"]["twice"] == 2
    for name in ("b", "c"):
        assert type(by_ray[name]) is type(by_processes[name]) and str(by_ray[name]) == str(by_processes[name])
