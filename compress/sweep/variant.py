"""One recipe of a sweep up to an exported, verified folder: what a worker does, told and answered in JSON."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue

from compress import files
from compress.engine import store
from compress.engine.disk import disk_errors
from compress.engine.journal import Journal
from compress.engine.shared_stages import SharedStages
from compress.engine.stages import SHARED
from compress.engine.workspace import FINGERPRINT, JOURNAL
from compress.errors import UsageError
from compress.export import find as find_target
from compress.hwprofiles import Profile
from compress.inputs.datasets import Calibration, Samples
from compress.memory import peak_memory
from compress.models.loading import load
from compress.models.model import Model
from compress.pipeline import Pipeline, Result
from compress.progress import Named, Progress
from compress.quality.verification import verification_inputs, verify_export
from compress.recipe import Recipe
from compress.records import Bounds, PassResult, Record, RunCost, Verification
from compress.records.sparsity import Sparsity
from compress.run import fingerprint, load_data
from compress.run_report import Request
from compress.sweep.graphs import shared_graph
from compress.target import Lowered

PREPARED = "prepared"


class VariantTask(Record):
    """What a worker is given. folder: of the artifact; work: of its journal; stages: where finished stages are shared;
    directory: that relative paths are of; fingerprint: what the run depends on, as the sweep found it."""

    name: str
    model: str
    recipe: Recipe
    profile: Profile
    data: str | None
    device: str
    threads: int
    folder: Path
    work: Path
    stages: Path
    directory: Path
    fingerprint: dict[str, str]

    def request(self) -> Request:
        """The same as `compress run` takes it."""
        return Request(self.model, self.recipe, self.profile, self.folder, data=self.data, device=self.device)


class Prepared(Record):
    """What it answers: everything of the report that is known before quality and speed are."""

    passes: tuple[PassResult, ...]
    untied: tuple[str, ...]
    sparsity: Sparsity | None = None
    operators: dict[str, int]
    float_layers: tuple[str, ...]
    bounds: Bounds
    deployed_bytes: int | None
    verification: Verification
    cost: RunCost
    reused: tuple[str, ...] = ()

    def lowered(self, folder: Path) -> Lowered:
        """What the target wrote."""
        return Lowered(folder, self.operators, self.float_layers, self.bounds, self.deployed_bytes)

    def result(self, folder: Path, source: Model, pipeline: Pipeline, calibration: Calibration | None) -> Result:
        """The compressed model, read again from its store."""
        model = store.open_store(folder / "model")
        return Result(model, source, self.passes, pipeline, calibration, self.untied, self.sparsity)


def work(given: Mapping[str, Any], progress: Progress) -> dict[str, JsonValue]:
    """Compress, export, verify. Raises: CompressError; what was finished stays for the next try."""
    task = VariantTask.model_validate(given)
    with _alone(task.work):
        journal = Journal(task.work / JOURNAL)
        found = journal.get(PREPARED)
        if found is None:
            found = _prepare(task, journal, progress).model_dump(mode="json")
            journal.add(PREPARED, found)
    return dict(found)


def read_prepared(folder: Path) -> Prepared | None:
    """What a variant's journal says; None of one that is not finished."""
    path = folder / JOURNAL
    found = Journal(path).get(PREPARED) if path.is_file() else None
    return None if found is None else Prepared.model_validate(found)


def settle(task: VariantTask) -> None:
    """Make the task's folders, or leave those that an earlier try of the same recipe made; those of another are
    removed."""
    path, now = task.work / FINGERPRINT, json.dumps(task.fingerprint, indent=1, sort_keys=True) + "\n"
    if path.is_file() and path.read_text(encoding="utf8") == now:
        return
    for folder in (task.work, task.folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    files.write_text(path, now)


def _prepare(task: VariantTask, journal: Journal, progress: Progress) -> Prepared:
    started, progress = time.monotonic(), Named(progress, task.name)
    torch.set_num_threads(task.threads)
    request, model = task.request(), load(task.model)
    pipeline = Pipeline.parse(task.recipe.passes)
    calibration, windows = load_data(model, request)
    _require_same(task.fingerprint, fingerprint(model, request, calibration, windows))
    with disk_errors(task.folder):
        result = pipeline.run(
            model,
            calibration,
            folder=task.folder / "model",
            journal=journal,
            device=task.device,
            progress=progress,
            shared=SharedStages(task.stages),
        )
        in_passes = peak_memory()
        progress.begin("Exporting")
        lowered = _export(result, task)
        verification = _verify(result, lowered, task, windows, progress)
    return Prepared(
        passes=result.passes,
        untied=result.untied,
        sparsity=result.sparsity,
        operators=lowered.operators,
        float_layers=lowered.float_layers,
        bounds=lowered.bounds,
        deployed_bytes=lowered.deployed_bytes,
        verification=verification,
        cost=RunCost(
            seconds=time.monotonic() - started, passes_peak_memory_bytes=in_passes, peak_memory_bytes=peak_memory()
        ),
        reused=tuple(str(data) for step, data in journal.steps.items() if step.endswith(f"/{SHARED}")),
    )


def _export(result: Result, task: VariantTask) -> Lowered:
    target = find_target(task.profile.target)
    folder = task.folder / target.FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    graph = shared_graph(target, result.model, task.profile, task.stages)
    lowered = target.write(result.model, task.profile, folder, graph)
    result.model.release()
    return lowered


def _verify(result: Result, lowered: Lowered, task: VariantTask, windows: Samples, progress: Progress) -> Verification:
    inputs = verification_inputs(windows)
    return verify_export(result.model, lowered.folder, task.profile, inputs, lowered.bounds, progress)


def _require_same(stated: Mapping[str, str], found: Mapping[str, str]) -> None:
    changed = [key for key in sorted({*stated, *found}) if stated.get(key) != found.get(key)]
    if changed:
        raise UsageError(
            f"The worker found another {', '.join(changed)} than the sweep that it works for. Repeat the command; on "
            "several machines, give all of them the same files and versions."
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for a worker of a killed sweep, which ends within moments."""
    with (folder / "worker.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
