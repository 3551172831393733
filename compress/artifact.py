"""What can be done with a finished artifact: open, verify, export again, evaluate, profile."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from compress import hwprofiles, manifest
from compress.completion import build_missing, complete_report
from compress.defaults import BUDGET_S, LENGTH
from compress.engine import store
from compress.engine.disk import disk_errors, require_space
from compress.engine.workspace import Workspace
from compress.errors import InputError, UnsupportedError, UsageError
from compress.export import find as find_target
from compress.files import copy_folder, scratch_folder
from compress.hwprofiles import Profile
from compress.inputs import datasets
from compress.models.loading import load
from compress.models.model import Model
from compress.pipeline import Result
from compress.plan import check_storable
from compress.profiles import as_profile
from compress.progress import Progress
from compress.quality.continuations import Amount
from compress.quality.evaluate import Evaluation, evaluate, runners_of
from compress.quality.harness import Arm, TaskRequest, require_tasks, score_tasks
from compress.quality.verification import MIN_POSITIONS, read_inputs, verify_export
from compress.records import Bounds, Speed, Verification
from compress.records.task import Tasks
from compress.run import require_agreement
from compress.speed.artifact_speed import measure_artifact
from compress.speed.end_to_end import Material, read_material
from compress.speed.footprint import deployable_bytes
from compress.speed.measure import check_processes, thread_count
from compress.target import (
    Lowered,
    Session,
    Target,
    misfit,
    require_caches,
    require_graphs,
    require_tools,
    timed_here,
    write_baseline,
)


@dataclass(frozen=True)
class Artifact:
    """An exported folder and what its manifest says."""

    folder: Path
    facts: Mapping[str, Any]

    @property
    def deployable(self) -> Path:
        """The folder that the runtime loads."""
        return self.folder / self.target.FOLDER

    @cached_property
    def profile(self) -> Profile:
        """The profile it was made for, as the manifest holds it. Raises: InputError."""
        try:
            return Profile.model_validate(self.facts["profile"])
        except (KeyError, ValueError) as error:
            path = self.folder / manifest.NAME
            raise InputError(f"{path} holds no valid profile ({error}). Run `compress run` again.") from error

    @property
    def target(self) -> Target:
        """What wrote it."""
        return find_target(self.profile.target)

    def check(self, *more: str) -> None:
        """Hold what the runtime loads, and `more`, against the manifest. Raises: InputError naming what differs."""
        manifest.check_files(self.folder, keep=(self.target.FOLDER, *more))

    def model(self) -> Model:
        """The compressed model in the store."""
        return store.open_store(self.folder / "model")

    def session(self) -> Session:
        """The artifact in its runtime."""
        return self.target.session(self.deployable, thread_count(self.profile))


def open_artifact(folder: str | Path | Artifact) -> Artifact:
    """Read an artifact's manifest; of one that is open already, nothing. Raises: UsageError for no such folder,
    InputError for a malformed manifest."""
    if isinstance(folder, Artifact):
        return folder
    path = Path(folder)
    if not path.is_dir():
        raise UsageError(f"No such artifact: {path}. Give the -o folder of an earlier `compress run`.")
    facts = manifest.read(path)
    if facts.get("kind") == "sweep":
        names = ", ".join(sorted(each.name for each in (path / "variants").glob("*")))
        raise UsageError(
            f"{path} is a sweep of several recipes. Give one of its artifacts: {path / 'variants'}/ has {names}."
        )
    return Artifact(path, facts)


def verify(
    folder: str | Path, *, timing_cache: str | Path | None = None, progress: Progress | None = None
) -> Verification:
    """Check every file against the manifest, then run the artifact here and compare it with its model.

    What only this machine can add is added: an engine for its GPU, and to the report how far the check got.
    timing_cache: what TensorRT's builder reads and writes [default: one in the user's cache folder].
    Raises: InputError naming files that differ. The result says whether the outputs agree.
    """
    progress, artifact = progress or Progress(quiet=True), open_artifact(folder)
    progress.begin(f"Checking the files of {artifact.folder}")
    manifest.check_files(artifact.folder)
    kept, bounds = _kept(artifact)
    if hasattr(artifact.target, "complete"):
        progress.begin("Building what only this machine can build, where it is missing")
    build_missing(artifact.folder, artifact.target, None if timing_cache is None else Path(timing_cache))
    model = artifact.model()
    ids = read_inputs(model, kept["ids"])
    found = verify_export(model, artifact.deployable, artifact.profile, ids, bounds, progress)
    notes = [complete_report(artifact.folder, artifact.target, found)]
    if kept.get("greedy_tokens", []) != list(found.greedy_tokens):
        notes += [
            "the greedy tokens differ from those recorded when the artifact was made (another machine or runtime?)"
        ]
    return found.model_copy(update={"notes": (*found.notes, *filter(None, notes))})


def _kept(artifact: Artifact) -> tuple[Mapping[str, Any], Bounds]:
    """What the manifest keeps of the first verification. Raises: InputError."""
    kept = artifact.facts.get("verification")
    if not isinstance(kept, Mapping) or "ids" not in kept:
        raise InputError(f"{artifact.folder}: the manifest has no tokens to verify with. Export it again.")
    try:
        return kept, Bounds.model_validate(kept["bounds"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{artifact.folder}: the manifest has no bounds to verify by ({error}).") from error


def export(
    result: Result | Artifact | str | Path,
    *,
    profile: str | Profile | None = None,
    target: str | None = None,
    out: str | Path,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Write an artifact from a pipeline's result, or from the store of an earlier artifact, for a profile.

    Nothing is calibrated again. Args: profile: id, file or Profile (default: this machine's);
    target: its export target, where not the profile's own.
    Raises: UsageError, UnsupportedError where the target cannot store what the model holds; ResourceError; InputError
    with the artifact kept where it does not agree with its model.
    """
    progress = progress or Progress(quiet=True)
    result = open_artifact(result) if isinstance(result, str | Path) else result
    progress.begin("Checking what is to be exported")
    if isinstance(result, Artifact):  # a damaged model must not get a fresh manifest
        manifest.check_files(result.folder)
    machine = as_profile(profile, target)
    exporter = find_target(machine.target)
    model, facts = _of(result)
    specs = model.structure.layers
    require_graphs(exporter, model, machine)
    require_caches(exporter, model.kv, machine)
    check_storable(specs, machine)
    require_tools(exporter, machine)
    space = Workspace(Path(out), overwrite)
    needed = deployable_bytes(model.path) + exporter.predict_bytes(specs.values(), model, machine)
    require_space(space.folder.absolute(), needed)
    with space:
        space.spare(result.folder if isinstance(result, Artifact) else None)
        space.open(
            {"store": model.digest, "profile": hwprofiles.digest(machine), "code": manifest.code_digest()},
        )
        with disk_errors(space.folder):
            for name in (exporter.FOLDER, "model"):
                shutil.rmtree(space.folder / name, ignore_errors=True)
            copy_folder(model.path, space.folder / "model")
            progress.begin("Exporting")
            lowered = exporter.write(model, machine, space.folder / exporter.FOLDER)
            found = _check(lowered, model, machine, facts, progress)
            kept = (manifest.NAME, "model", exporter.FOLDER)
            manifest.write(space.folder, {**facts, "profile": machine.model_dump(mode="json")}, kept)
            space.commit(kept)
    require_agreement(Path(out), found)
    return open_artifact(out)


def _check(lowered: Lowered, model: Model, machine: Profile, facts: dict[str, Any], progress: Progress) -> Verification:
    """Verify what was written, and note in `facts` what `verify` will need."""
    kept = facts["verification"]["ids"]
    ids = read_inputs(model, kept)
    found = verify_export(model, lowered.folder, machine, ids, lowered.bounds, progress)
    facts["verification"] = {
        "bounds": {"shipped": found.bound, "exact": found.exact_bound},
        "ids": kept,
        "greedy_tokens": list(found.greedy_tokens),
    }
    return found


def _of(result: Result | Artifact) -> tuple[Model, dict[str, Any]]:
    if isinstance(result, Artifact):
        # what is of the files, or was measured on what was exported before
        drop = ("files", manifest.ADDED, "schema_version", "versions", "metrics")
        return result.model(), {key: value for key, value in result.facts.items() if key not in drop}
    calibration = result.calibration
    facts = {
        "source": result.source.source,
        "source_digest": result.source.digest,
        "task": str(result.source.task),
        "recipe": {"name": "", "passes": str(result.pipeline)},
        "seed": calibration.seed if calibration else 0,
        "calibration": calibration.summary() if calibration else {},
        "verification": {"ids": _random_ids(result.model)},
    }
    return result.model, facts


def _random_ids(model: Model) -> list[list[int]]:
    """Tokens to verify with; none for an image classifier."""
    if model.image is not None:
        return []
    length = min(256, model.longest)
    shape = (-(-MIN_POSITIONS // length), length)
    return torch.randint(0, model.vocabulary, shape, generator=torch.Generator().manual_seed(0)).tolist()


def source_of(artifact: Artifact, against: Model | str | Path | None) -> Model:
    """The uncompressed model of an artifact. Raises: UsageError when it is not where it was, or is another one."""
    model = against if isinstance(against, Model) else load(against or str(artifact.facts["source"]))
    if model.digest != artifact.facts["source_digest"]:
        raise UsageError(f"{model.source} is not the model that {artifact.folder} was made from: their weights differ.")
    return model


def evaluate_artifact(
    folder: str | Path | Artifact,
    quality_data: str | Path,
    *,
    against: Model | str | Path | None = None,
    samples: int | None = None,
    length: int = LENGTH,
    progress: Progress | None = None,
) -> Evaluation:
    """Quality of an artifact in its runtime on other data, beside its uncompressed model."""
    artifact, progress = open_artifact(folder), progress or Progress(quiet=True)
    progress.begin(f"Checking the files of {artifact.folder}")
    artifact.check("model")
    source = source_of(artifact, against)
    windows = datasets.quality_windows(source, quality_data, samples=samples, length=length)
    progress.begin("Exporting the baseline and loading both")
    with scratch_folder() as scratch:
        baseline, session = baseline_session(source, artifact.profile, scratch), artifact.session()
        runners = runners_of(artifact.target, (baseline, scratch), (session, artifact.deployable))
        return evaluate(baseline, session, source, artifact.model(), windows, progress, runners, Amount())


def evaluate_tasks(
    folder: str | Path | Artifact,
    request: TaskRequest,
    *,
    against: Model | str | Path | None = None,
    progress: Progress | None = None,
) -> Tasks:
    """Labelled tasks of lm-evaluation-harness for an artifact and its uncompressed model, in the same runtime.

    Raises: as `compress.quality.harness.score_tasks`.
    """
    artifact = open_artifact(folder)
    artifact.check()
    require_tasks(str(artifact.facts.get("task", "")), artifact.target, request)
    source, machine = source_of(artifact, against), artifact.facts["profile"]
    with scratch_folder() as scratch:
        session = baseline_session(source, artifact.profile, scratch)
        baseline = Arm(session, scratch, {"model": source.digest, "profile": machine})
        identity = {name: artifact.facts.get(name) for name in ("files", "recipe", "profile")}
        variant = Arm(artifact.session(), artifact.deployable, identity)
        return score_tasks(baseline, variant, artifact.target, request, progress)


def profile(
    folder: str | Path | Artifact,
    *,
    against: Model | str | Path | None = None,
    inputs: str | Path | None = None,
    budget_s: float = BUDGET_S,
    processes: int = 1,
    progress: Progress | None = None,
) -> Speed:
    """Paired latency of an artifact against its uncompressed model in the same runtime, measured here.

    inputs: a text, or an image file or folder, that whole requests begin with [default: the text that the artifact
    keeps]; processes: as in `measure`. Raises: UnsupportedError for an artifact that runs on another machine only.
    """
    check_processes(processes)
    progress, artifact = progress or Progress(quiet=True), open_artifact(folder)
    progress.begin(f"Checking the files of {artifact.folder}")
    artifact.check()
    if not timed_here(artifact.target, artifact.profile):
        raise UnsupportedError(
            f"{artifact.folder} was made for {artifact.profile.name}: its speed can be measured there only."
        )
    unfit = misfit(artifact.target, artifact.deployable)
    if unfit:
        raise UnsupportedError(f"{artifact.folder} cannot be timed here: {unfit}")
    source = source_of(artifact, against)
    if inputs is not None:
        material = read_material(inputs, artifact.deployable, source.task)
    else:  # the tokens that the artifact is verified with are the first of its quality data
        kept = (artifact.facts.get("verification") or {}).get("ids") or [[]]
        material = Material(ids=tuple(kept[0]))
    progress.begin("Exporting the baseline")
    with scratch_folder() as scratch:
        find_target(artifact.profile.target).write(source, artifact.profile, scratch)
        return measure_artifact(
            scratch,
            artifact.deployable,
            artifact.profile,
            source,
            material,
            budget_s=budget_s,
            processes=processes,
            progress=progress,
        )


def baseline_session(source: Model, machine: Profile, folder: Path) -> Session:
    """The uncompressed model, written to a folder and loaded in the profile's runtime."""
    target = find_target(machine.target)
    write_baseline(target, source, machine, folder)
    return target.session(folder, thread_count(machine))
