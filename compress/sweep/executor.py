"""Where independent tasks run (design §8): processes of this machine, or Ray on many. No scheduler of our own.

A task is a JSON object and so is its answer: nothing is pickled, and whatever starts a worker, it is the same command,
`compress worker`, which reads one task from standard input. A worker ends when its input is closed, so none outlives
the process that wanted its answer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from compress.errors import CompressError, InputError, Interrupted, ResourceError, UnsupportedError, UsageError
from compress.files import parse_json
from compress.progress import SIGNALS, Progress

Task = Mapping[str, Any]
Answer = dict[str, Any] | CompressError
"""What a worker found, or why it could not."""
POLL_S = 0.1
WORKER = ("-m", "compress", "worker", "--json")
_ERRORS = {each.exit_code: each for each in (UsageError, UnsupportedError, InputError, ResourceError)}


class Executor(Protocol):
    """Something that works on tasks."""

    def map(
        self, tasks: Mapping[str, Task], progress: Progress, done: Callable[[str, Answer], None] | None = None
    ) -> dict[str, Answer]:
        """Every task's answer, in the order of the tasks. done: told of each as it ends. Raises: Interrupted, after
        the workers have saved what they finished."""
        ...


@dataclass(frozen=True)
class Here:
    """One after another in this process; `work` is what a worker would do."""

    work: Callable[[Task, Progress], dict[str, Any]]

    def map(
        self, tasks: Mapping[str, Task], progress: Progress, done: Callable[[str, Answer], None] | None = None
    ) -> dict[str, Answer]:
        """See `Executor`."""
        answers: dict[str, Answer] = {}
        for name, task in tasks.items():
            progress.check()
            try:
                answers[name] = self.work(task, progress)
            except Interrupted:
                raise
            except CompressError as error:
                answers[name] = error
            if done:
                done(name, answers[name])
        return answers


@dataclass
class Processes:
    """So many processes at a time, each a fresh one: a task that is killed for memory fails alone."""

    workers: int = 1
    quiet: bool = False
    _running: dict[str, _Child] = field(default_factory=dict, repr=False)

    def map(
        self, tasks: Mapping[str, Task], progress: Progress, done: Callable[[str, Answer], None] | None = None
    ) -> dict[str, Answer]:
        """See `Executor`."""
        waiting, answers = list(tasks), dict[str, Answer]()
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self.workers and progress.signal_number is None:
                    name = waiting.pop(0)
                    self._running[name] = _Child(tasks[name], self.quiet)
                if progress.signal_number is not None:
                    self._stop(progress)
                for name in [name for name, child in self._running.items() if child.ended]:
                    answers[name] = self._running.pop(name).answer()
                    if done:
                        done(name, answers[name])
                time.sleep(POLL_S if self._running else 0)
        finally:
            for child in self._running.values():
                child.kill()
            self._running.clear()
        return {name: answers[name] for name in tasks}

    def _stop(self, progress: Progress) -> None:
        """Let the workers finish their step, then raise Interrupted."""
        for child in self._running.values():
            child.send(progress.signal_number or signal.SIGINT)
        while any(not child.ended for child in self._running.values()):
            time.sleep(POLL_S)
        progress.check()


class _Child:
    """A worker at work. Its standard error is ours; its session its own, so that Ctrl-C reaches it through us alone."""

    def __init__(self, task: Task, quiet: bool) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *WORKER, *(["--quiet"] if quiet else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._output: list[str] = []
        assert self._process.stdin is not None and self._process.stdout is not None
        self._reader = threading.Thread(target=lambda out: self._output.append(out.read()), args=[self._process.stdout])
        self._reader.start()  # else a long answer would fill the pipe
        with suppress(BrokenPipeError):  # it has died, which its exit code will tell
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()  # and stays open: see `_end_with_parent`

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._close()

    def answer(self) -> Answer:
        self._close()
        return read_answer(self._process.returncode, "".join(self._output))

    def _close(self) -> None:
        self._process.wait()
        self._reader.join()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdout.close()
        with suppress(BrokenPipeError):
            self._process.stdin.close()


@dataclass(frozen=True)
class Ray:
    """Ray's own workers, on one machine or on many that share the folders the tasks name. address: of a cluster, as
    ray.init takes it [default: RAY_ADDRESS]; without one Ray is started here, for as many tasks at a time as
    `workers`."""

    address: str | None = None
    workers: int = 1

    def map(
        self, tasks: Mapping[str, Task], progress: Progress, done: Callable[[str, Answer], None] | None = None
    ) -> dict[str, Answer]:
        """See `Executor`. An interruption leaves each worker at its last finished step."""
        ray = require_ray()
        was_up = ray.is_initialized()
        if not was_up:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
            address = self.address or os.environ.get("RAY_ADDRESS")
            mine = {} if address else {"num_cpus": self.workers, "include_dashboard": False}
            ray.init(address=address, log_to_driver=False, **mine)
        try:
            remote = ray.remote(num_cpus=1, max_retries=0)(run_worker)
            names = {remote.remote(json.dumps(task), WORKER): name for name, task in tasks.items()}
            answers, left = dict[str, Answer](), list(names)
            while left:
                progress.check()
                ready, left = ray.wait(left, num_returns=1, timeout=1.0)
                for each in ready:
                    name = names[each]
                    answers[name] = _fetch(ray, each)
                    if done:
                        done(name, answers[name])
            return {name: answers[name] for name in tasks}
        finally:
            if not was_up:
                ray.shutdown()


def run_worker(task: str, command: tuple[str, ...]) -> tuple[int, str]:
    """One worker from beginning to end: its exit code and what it printed. task: JSON; command: after `python`."""
    with subprocess.Popen(
        [sys.executable, *command, "--quiet"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(task + "\n")
        child.stdin.flush()
        output = child.stdout.read()
        return child.wait(), output


def read_answer(code: int, output: str) -> Answer:
    """What a worker's exit code and its output say."""
    if code < 0 or code in (128 + signal.SIGKILL, 128 + signal.SIGSEGV):
        number = -code if code < 0 else code - 128
        why = "for want of memory, most likely" if number == signal.SIGKILL else f"by signal {number}"
        return ResourceError(f"Its process was killed, {why}.")
    try:
        found = json.loads(output.strip().splitlines()[-1])
        if code == 0 and isinstance(found, dict):
            return found
        message = str(found["error"]["message"])
    except (IndexError, KeyError, TypeError, ValueError):
        return InputError(f"Its process ended with exit code {code} and no answer.")
    if code - 128 in SIGNALS:
        return Interrupted(message, code - 128)
    return error_of(message, code)


def error_of(message: str, code: int) -> CompressError:
    """The error that ends `compress` with this exit code."""
    return _ERRORS.get(code, InputError)(message)


def read_task() -> dict[str, Any]:
    """In a worker: the task, from the first line of standard input. Afterwards the worker ends with its parent."""
    try:
        task = parse_json(sys.stdin.readline())
    except ValueError as error:
        raise UsageError(f"A worker reads its task, one line of JSON, from standard input ({error}).") from error
    if not isinstance(task, dict):
        raise UsageError("A worker reads its task, a JSON object, from standard input.")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return task


def _end_with_parent() -> None:
    """Wait for the end of standard input, which only the parent's end brings."""
    sys.stdin.read()
    os._exit(128 + signal.SIGTERM)


def workers_that_fit(wanted: int, bytes_each: int, room: int | None) -> int:
    """As many workers as memory holds, at least one. bytes_each: the most that one takes; room: None: not known."""
    if room is None or bytes_each <= 0:
        return wanted
    return max(1, min(wanted, room // bytes_each))


def _fetch(ray: Any, reference: Any) -> Answer:
    try:
        return read_answer(*ray.get(reference))
    except ray.exceptions.RayError as error:
        return ResourceError(f"Its Ray worker was lost: {str(error).splitlines()[0]}")


def require_ray() -> Any:
    """The package. Raises: UnsupportedError naming the extra."""
    try:
        import ray
    except ImportError as error:
        raise UnsupportedError(
            "The executor ray needs Ray, which is not installed. pip install 'compress[distributed]', or use "
            "--executor processes."
        ) from error
    return ray
