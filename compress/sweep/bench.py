"""The steps of a sweep, each noted in its journal: baseline, variants by workers, then quality and speed of all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from pydantic import Field

from compress.engine.disk import require_space
from compress.engine.journal import Journal
from compress.errors import CompressError, Interrupted
from compress.export import find as find_target
from compress.memory import allowed_memory
from compress.models.image_source import fitting, timed_shape
from compress.pipeline import Result
from compress.progress import Progress
from compress.quality.continuations import Amount
from compress.quality.evaluate import Evaluation
from compress.records import Footprint, Quality, Record, Speed
from compress.speed.end_to_end import material_of
from compress.speed.footprint import deployable_bytes, footprint
from compress.speed.measure import thread_count
from compress.sweep.executor import Answer, Executor, Processes, error_of, workers_that_fit
from compress.sweep.graphs import shared_graph
from compress.sweep.judge import MEMORY_FACTOR, Artifact, Stand, judge, time_together, together
from compress.sweep.records import Difference
from compress.sweep.setup import VARIANTS, Setup, SweepRequest
from compress.sweep.speeds import Alone, speeds_of
from compress.sweep.variant import Prepared, VariantTask, read_prepared, settle
from compress.target import Target, timed_here, write_baseline

STAGES = "stages"
"""Where variants share stages and graphs."""


@dataclass
class Outcome:
    """What the steps found, by variant. footprints: of the baseline too, under ''."""

    prepared: dict[str, Prepared] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    speeds: dict[str, Speed] = field(default_factory=dict)
    footprints: dict[str, Footprint] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)
    failures: dict[str, CompressError] = field(default_factory=dict)
    runtime: str = ""
    groups: int = 1


class _Kept(Record):
    """One step of the judging, as the journal keeps it."""

    evaluations: dict[str, tuple[Quality, Quality, Quality]] = Field(default_factory=dict)
    failures: dict[str, tuple[str, int]] = Field(default_factory=dict)
    speeds: dict[str, Speed] = Field(default_factory=dict)
    footprints: dict[str, Footprint] = Field(default_factory=dict)
    differences: tuple[Difference, ...] = ()
    runtime: str = ""


@dataclass
class Bench:
    """One sweep at work in `folder`."""

    request: SweepRequest
    setup: Setup
    folder: Path
    journal: Journal
    progress: Progress
    executor: Executor

    def work(self) -> Outcome:
        """Everything but the reports. Raises: the first failure where no variant is left; Interrupted."""
        outcome = Outcome(failures=dict(self.setup.failures))
        require_space(self.folder, sum(each.plan.predicted_disk_bytes for each in self.setup.planned.values()))
        self._write_baseline()
        self._compress(outcome)
        names = [name for name in self.setup.planned if name in outcome.prepared]
        outcome.results = {name: self._result(name, outcome.prepared[name]) for name in names}
        groups = together({name: deployable_bytes(self.deployed(name)) for name in names}, self._room())
        outcome.groups = len(groups)
        for group in groups:
            self._judge(group, outcome)
        for group in groups:
            self._time([name for name in group if name in outcome.evaluations], outcome)
        if not outcome.evaluations:
            raise next(iter(outcome.failures.values()))
        return outcome

    @property
    def target(self) -> Target:
        """What writes and runs the artifacts."""
        return find_target(self.request.profile.target)

    def deployed(self, name: str) -> Path:
        """A variant's exported folder."""
        return self.folder / VARIANTS / name / self.target.FOLDER

    @property
    def baseline(self) -> Path:
        """The exported folder of the uncompressed model."""
        return self.folder / "baseline"

    @property
    def stand(self) -> Stand:
        """What all are judged with."""
        return Stand(self.setup.model, self.baseline, self.request.profile, self.request.recipes[0].seed)

    def _step(self, name: str, group: Sequence[str], compute: Callable[[], _Kept]) -> _Kept:
        """The result for a group of variants: from the journal, or computed and noted there."""
        prints = [{**self.setup.planned[each].fingerprint, "name": each} for each in group]
        step = f"{name} {hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()}"
        if step in self.journal:
            return _Kept.model_validate(self.journal.get(step))
        found = compute()
        self.journal.add(step, found.model_dump(mode="json"))
        return found

    def _write_baseline(self) -> None:
        if "baseline" in self.journal:
            return
        shutil.rmtree(self.baseline, ignore_errors=True)
        self.progress.begin("Exporting the baseline")
        profile, model = self.request.profile, self.setup.model
        graph = shared_graph(self.target, model, profile, (self.folder / STAGES).absolute())
        write_baseline(self.target, model, profile, self.baseline, graph)
        model.release()
        self.journal.add("baseline")

    def _compress(self, outcome: Outcome) -> None:
        """By the executor, every variant that an earlier try did not finish."""
        tasks = {name: self._task(name) for name in self.setup.planned}
        for folder in (self.folder / VARIANTS, self.folder / "work"):
            for path in folder.iterdir() if folder.is_dir() else ():  # of recipes that are not asked for any more
                if path.name not in tasks:
                    shutil.rmtree(path)
        for name, task in tasks.items():
            settle(task)
            if (found := read_prepared(task.work)) is not None:
                outcome.prepared[name] = found
                self.progress.note(f"{name}: was finished before, and is not computed again")
        waiting = {name: task.model_dump(mode="json") for name, task in tasks.items() if name not in outcome.prepared}
        answers = self._fitting().map(waiting, self.progress, self._told) if waiting else {}
        for name, answer in answers.items():
            if isinstance(answer, Interrupted):
                raise answer
            if isinstance(answer, CompressError):
                outcome.failures[name] = answer
            else:
                outcome.prepared[name] = Prepared.model_validate(answer)

    def _told(self, name: str, answer: Answer) -> None:
        if isinstance(answer, CompressError):
            self.progress.note(f"{name}: failed: {answer}")
        else:
            self.progress.note(f"{name}: compressed, exported and checked")

    def _fitting(self) -> Executor:
        """No more processes than memory holds of the variant that takes most."""
        if not isinstance(self.executor, Processes):
            return self.executor
        most = max(each.plan.predicted_peak_memory_bytes for each in self.setup.planned.values())
        count = workers_that_fit(self.executor.workers, most, allowed_memory())
        if count < self.executor.workers:
            self.progress.note(f"{count} of {self.executor.workers} workers: each may take {most / 1e9:.1f} GB")
        return replace(self.executor, workers=count)

    def _task(self, name: str) -> VariantTask:
        planned, folder = self.setup.planned[name], self.folder.absolute()
        request = planned.request
        return VariantTask(
            name=name,
            model=request.model,
            recipe=request.recipe,
            profile=request.profile,
            data=request.data,
            device=request.device,
            threads=torch.get_num_threads(),
            folder=folder / VARIANTS / name,
            work=folder / "work" / name,
            stages=folder / STAGES,
            directory=Path.cwd(),
            fingerprint=planned.fingerprint,
        )

    def _result(self, name: str, prepared: Prepared) -> Result:
        planned = self.setup.planned[name]
        folder = self.folder / VARIANTS / name
        return prepared.result(folder, self.setup.model, planned.pipeline, planned.calibration)

    def _room(self) -> int | None:
        """Half of the memory for loaded artifacts, less the baseline's part."""
        allowed = allowed_memory()
        return None if allowed is None else allowed // 2 - MEMORY_FACTOR * deployable_bytes(self.baseline)

    def _judge(self, group: list[str], outcome: Outcome) -> None:
        """Quality of a group of variants."""

        def compute() -> _Kept:
            settings = self.request.recipes[0].quality
            artifacts = {name: Artifact(self.deployed(name), outcome.results[name].model) for name in group}
            amount = Amount(settings.generation, settings.generation_tokens)
            found = judge(self.stand, artifacts, self.setup.windows, amount, self.progress)
            judged = {name: (each.baseline, each.artifact, each.memory) for name, each in found.evaluations.items()}
            return _Kept(
                evaluations=judged,
                failures={name: (str(error), error.exit_code) for name, error in found.failures.items()},
                differences=tuple(found.differences),
            )

        kept = self._step("judged", group, compute)
        outcome.evaluations |= {name: Evaluation(*each) for name, each in kept.evaluations.items()}
        outcome.differences += kept.differences
        outcome.failures |= {name: error_of(*each) for name, each in kept.failures.items()}

    def _time(self, group: list[str], outcome: Outcome) -> None:
        """Speed and footprints of a group; nothing where what is deployed runs elsewhere."""
        profile, model = self.request.profile, self.setup.model
        if not group or not timed_here(self.target, profile):
            return

        def compute() -> _Kept:
            stand = replace(self.stand, profile=fitting(profile, model.image))
            folders = {name: self.deployed(name) for name in group}
            shape = timed_shape(model.image)
            found = time_together(stand, folders, self.request.budget_s, self.progress, shape)
            arms, threads = {"": self.baseline, **folders}, thread_count(profile)
            footprints = {name: footprint(self.target, arm, threads, model.longest) for name, arm in arms.items()}
            material = material_of(self.setup.windows, self.request.recipes[0].quality.data or self.request.data)
            alone = Alone(stand, model, shape, material, self.request.budget_s)
            return _Kept(
                speeds=speeds_of(found, footprints, folders, alone, self.progress),
                differences=tuple(found.differences),
                runtime=found.runtime,
                footprints=footprints,
            )

        kept = self._step(f"timed {self.request.budget_s:g}", group, compute)
        outcome.speeds |= kept.speeds
        outcome.differences += kept.differences
        outcome.footprints |= kept.footprints
        outcome.runtime = kept.runtime
