"""Labelled tasks of lm-evaluation-harness for an artifact and its uncompressed model, paired by sample (extra `eval`).

Both run in the same runtime; the harness builds the requests and judges the answers. Its per-sample figures are what
counts here: the means that it prints are of two models that answered the same questions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from compress import hwprofiles, manifest
from compress.errors import CompressError, InputError, UnsupportedError, UsageError, nearest
from compress.export import find as find_target
from compress.files import write_text
from compress.hwprofiles import Profile
from compress.inputs.prompts import Reader, read_reader
from compress.models.folder import first_line
from compress.models.model import Task
from compress.progress import Progress
from compress.quality.harness_logs import keep_logs, pair_logs
from compress.quality.harness_model import Answers, HarnessModel
from compress.quality.task_pairs import loss_gates, score_pairs
from compress.recipe import TaskSettings
from compress.records.task import Tasks
from compress.speed.measure import thread_count
from compress.target import Runner, Session, Target

LOGS = "tasks"
"""Folder of per-sample logs in the artifact of a recipe that names tasks."""
PACKAGE, RANGE = "lm-eval", ">=0.4.9,<0.5"


@dataclass(frozen=True)
class TaskRequest:
    """What `compress eval --tasks` asks for. folder: of tasks of the user's own; out: where per-sample logs and answers
    are kept; max_loss: gate on every score."""

    tasks: tuple[str, ...]
    limit: int | None = None
    folder: Path | None = None
    chat: bool = False
    out: Path | None = None
    max_loss: float | None = None


def require_harness() -> str:
    """The harness's version. Raises: UnsupportedError naming the extra where it is not installed."""
    try:
        import lm_eval  # noqa: F401

        return metadata.version(PACKAGE)
    except ImportError as error:
        raise UnsupportedError(
            f"Tasks are run by lm-evaluation-harness ({PACKAGE} {RANGE}), which is not installed. Install it with: "
            "pip install 'compress[eval]'"
        ) from error


def require_tasks(task: str, target: Target, request: TaskRequest | None = None) -> str:
    """The harness's version. Raises: UnsupportedError without it or where the target answers no requests here,
    UsageError for a model that is no language model, or a task of the request that the harness does not know."""
    if task != Task.CAUSAL_LM:
        raise UsageError(f"A model of kind {task or 'unknown'} has no tasks: they need a language model.")
    if getattr(target, "runner", None) is None:
        raise UnsupportedError(f"Artifacts for {target.RUNTIME} answer no requests here, so no tasks can be scored.")
    version = require_harness()
    if request is not None:
        _manager(request)
    return version


@dataclass(frozen=True)
class Arm:
    """One of the two models. identity: what tells it from any other, JSON-able: digests, precision, profile."""

    session: Session
    folder: Path
    identity: Mapping[str, Any]


def score_tasks(
    baseline: Arm, variant: Arm, target: Target, request: TaskRequest, progress: Progress | None = None
) -> Tasks:
    """Score both models on the same samples.

    Raises: as `require_tasks`; UsageError for an unknown task, InputError where the harness stops.
    """
    version = require_tasks(Task.CAUSAL_LM, target)
    manager, reader = _manager(request), read_reader(variant.folder)
    progress, logs = progress or Progress(quiet=True), {}
    make: Callable[[Session, Path], Runner] = target.runner  # type: ignore[attr-defined]
    for name, arm in (("baseline", baseline), ("variant", variant)):
        answers = Answers(_answer_path(request, name, answer_key(arm.identity, arm.session.name, reader, version)))
        model = _kind()(arm.session, make(arm.session, arm.folder), reader, answers, name, progress)
        with _silenced(progress.quiet):
            logs[name] = _run(model, request, manager)
    pairs, notes = pair_logs(logs["baseline"], logs["variant"])
    scores = score_pairs(pairs)
    found = Tasks(
        harness=f"{PACKAGE} {version}",
        where=variant.session.name,
        limit=request.limit,
        chat_template=request.chat,
        scores=scores,
        gates=() if request.max_loss is None else loss_gates(scores, request.max_loss),
        notes=notes,
    )
    if request.out is not None:
        keep_logs(request.out, logs)
        write_text(request.out / "tasks.json", found.model_dump_json(indent=1) + "\n")
    return found


def score_exported(
    folder: Path, settings: TaskSettings | None, profile: Profile, source_digest: str, progress: Progress
) -> Tasks | None:
    """The tasks of a recipe for what a run has exported into `folder`, with per-sample logs in `folder/tasks`; None
    where it names none."""
    if settings is None:
        return None
    target, threads, machine = find_target(profile.target), thread_count(profile), hwprofiles.digest(profile)
    names = {"baseline": source_digest, target.FOLDER: manifest.describe_files(folder, (target.FOLDER,))}
    arms = [
        Arm(target.session(folder / name, threads), folder / name, {"model": identity, "profile": machine})
        for name, identity in names.items()
    ]
    return score_tasks(arms[0], arms[1], target, request_of(settings, folder / LOGS), progress)


def request_of(settings: TaskSettings, out: Path | None = None) -> TaskRequest:
    """What a recipe asks for. out: where logs are kept."""
    own = Path(settings.folder) if settings.folder else None
    return TaskRequest(settings.names, settings.limit, own, settings.chat, out, settings.max_loss)


def answer_key(identity: Mapping[str, Any], backend: str, reader: Reader, version: str) -> str:
    """What an answer depends on besides the request: the model and its precision, its runtime, the chat template and
    the harness's version. The harness's own cache knows the request alone, so two models would share their answers."""
    parts = {
        "model": identity,
        "backend": backend,
        "chat template": str(getattr(reader.tokenizer, "chat_template", None)),
        "harness": version,
        "runtimes": manifest.versions(),
        "code": manifest.code_digest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _answer_path(request: TaskRequest, arm: str, key: str) -> Path | None:
    if request.out is None:
        return None
    folder = request.out / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{arm}-{key[:32]}.jsonl"


def _kind() -> type[HarnessModel]:
    """Our model as one of the harness's."""
    from lm_eval.api.model import LM

    return type("CompressModel", (HarnessModel, LM), {})


def _manager(request: TaskRequest) -> Any:
    """Knows the harness's tasks and the user's. Raises: UsageError for one that it does not know."""
    from lm_eval.tasks import TaskManager

    if request.folder is not None and not request.folder.is_dir():
        raise UsageError(f"No such folder of tasks: {request.folder}.")
    manager: Any = None
    if request.folder is not None:  # reading the harness's own thousands of tasks takes a while
        manager = TaskManager(include_path=str(request.folder), include_defaults=False)
    if manager is None or _unknown(manager, request):
        manager = TaskManager(include_path=None if request.folder is None else str(request.folder))
    unknown = _unknown(manager, request)
    if unknown:
        close = nearest(unknown[0], manager.all_tasks).partition(" Allowed:")[0]
        raise UsageError(
            f"The harness has no task '{unknown[0]}'.{close} `lm-eval ls tasks` lists them; --task-path names a folder "
            "of your own."
        )
    return manager


@contextmanager
def _silenced(quiet: bool) -> Iterator[None]:
    """Without what the harness and the programs that it starts say on stderr."""
    if not quiet:
        yield
        return
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _unknown(manager: Any, request: TaskRequest) -> list[str]:
    return [name for name in request.tasks if not manager.match_tasks([name])]


def _run(model: HarnessModel, request: TaskRequest, manager: Any) -> Mapping[str, Any]:
    """One model's results with its samples."""
    import lm_eval

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells of each of its own defaults
    try:
        found: Mapping[str, Any] | None = lm_eval.simple_evaluate(
            model=model,
            tasks=list(request.tasks),
            limit=request.limit,
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
            apply_chat_template=request.chat,
        )
    except CompressError:
        raise
    except Exception as error:  # tasks are programs and data of others, which stop as they like
        raise InputError(f"lm-evaluation-harness stopped: {first_line(error)}") from error
    assert found is not None
    return found
