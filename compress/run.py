"""One run, as the list of its steps (design §1). Each step is a function of its own, and a verb of the command line."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch

from compress import defaults, hwprofiles, manifest
from compress.engine.disk import disk_errors, require_space
from compress.engine.workspace import Workspace
from compress.errors import InputError, UsageError
from compress.export import find as find_target
from compress.hwprofiles import Profile
from compress.inputs import datasets
from compress.inputs.datasets import Calibration, Samples
from compress.memory import peak_memory
from compress.models.loading import load
from compress.models.model import Model
from compress.pipeline import Pipeline, Result
from compress.plan import make_plan, refusal
from compress.progress import Progress
from compress.quality.continuations import Amount
from compress.quality.evaluate import Evaluation, evaluate, runners_of
from compress.quality.harness import request_of, require_tasks, score_exported
from compress.quality.metrics import check_gates
from compress.quality.verification import verification_inputs, verify_export
from compress.records import Plan, Report, RunCost, Speed, Verification
from compress.run_report import Found, Request, kept, write_report
from compress.speed.artifact_speed import measure_artifact
from compress.speed.end_to_end import material_of
from compress.speed.measure import thread_count
from compress.target import Lowered, require_any_cache, require_tools, timed_here, write_baseline


def run(request: Request, progress: Progress | None = None) -> Report:
    """Load, plan, calibrate, compress, export, verify, evaluate, measure, report.

    Returns the report; the artifact is at `request.out`. Raises: any CompressError; nothing half-written is left there.
    InputError with the result kept where the artifact does not agree with its model.
    """
    progress = progress or Progress(quiet=True)
    started = time.monotonic()
    request = replace(request, recipe=request.recipe.for_target(request.profile.target))
    pipeline = Pipeline.parse(request.recipe.passes)
    target = find_target(request.profile.target)
    if any(item.caches for item in pipeline.passes):  # no tool that is installed changes that
        require_any_cache(target, request.profile)
    require_tools(target, request.profile)
    progress.begin(f"Reading the model {request.model}")
    model = load(request.model)
    plan = make_plan(model, request.recipe, request.profile, pipeline)
    refuse(plan)
    check_gates(request.recipe.quality.gates, model.task, generation=request.recipe.quality.generation > 0)
    if request.recipe.tasks is not None:
        require_tasks(model.task, target, request_of(request.recipe.tasks))
    progress.begin("Reading the data")
    calibration, windows = load_data(model, request)
    with Workspace(request.out, request.overwrite) as space:
        space.spare(request.model, request.data, request.recipe.calibration.data, request.recipe.quality.data)
        journal = space.open(fingerprint(model, request, calibration, windows))
        with disk_errors(space.folder):
            require_space(space.folder, plan.predicted_disk_bytes)
            result = pipeline.run(
                model,
                calibration,
                folder=space.folder / "model",
                journal=journal,
                device=request.device,
                progress=progress,
            )
            compress_memory = peak_memory()
            lowered = _export_both(result, request.profile, space.folder, progress)
            inputs = verification_inputs(windows)
            verification = verify_export(
                result.model, lowered.folder, request.profile, inputs, lowered.bounds, progress
            )
            evaluation = _evaluate(space.folder, result, request, windows, progress)
            tasks = score_exported(space.folder, request.recipe.tasks, request.profile, model.digest, progress)
            speed = _measure(space.folder, request, model, windows, progress)
            cost = RunCost(
                seconds=time.monotonic() - started,
                passes_peak_memory_bytes=compress_memory,
                peak_memory_bytes=peak_memory(),
            )
            found = Found(plan, result, lowered, verification, evaluation, speed, cost, tasks)
            progress.begin("Writing the report")
            report = write_report(space.folder, request, model, windows, found)
            space.commit(kept(request))
    require_agreement(request.out, verification)
    return report


def refuse(plan: Plan) -> None:
    """Raises: UsageError, UnsupportedError or ResourceError for a plan that cannot be carried out (see `refusal`)."""
    error = refusal(plan)
    if error is not None:
        raise error


def require_agreement(out: Path, found: Verification) -> None:
    """Raises: InputError where a finished artifact does not compute what its model does."""
    if found.agrees:
        return
    exact = found.exact_relative_difference
    alone = "" if exact is None else f", {exact:.2g} without the kernels' own rounding (bound {found.exact_bound:g})"
    raise InputError(
        f"{out} was written and is kept, but must not be used: it does not agree with its model in {found.runtime}. "
        f"Relative difference {found.max_relative_difference:.2g} (bound {found.bound:g}){alone}. Please report this."
    )


def load_data(model: Model, request: Request) -> tuple[Calibration | None, Samples]:
    """Calibration and quality windows, or images, the former in the recipe's type."""
    calibration, windows = _read_data(model, request)
    dtype = getattr(torch, request.recipe.calibration.dtype)
    return calibration and replace(calibration, dtype=dtype), windows


def _read_data(model: Model, request: Request) -> tuple[Calibration | None, Samples]:
    """Calibration and quality windows, or images, from --data (split) or from the recipe's own files."""
    recipe, seed = request.recipe, request.recipe.seed
    cal, qual = recipe.calibration, recipe.quality
    samples = qual.samples or (defaults.QUALITY_SAMPLES if model.image is None else None)
    rest = any(item.trains_rest for item in Pipeline.parse(recipe.passes).passes)
    wanted = cal.samples if "samples" in cal.model_fields_set else None
    if request.data and not (cal.data or qual.data):
        return datasets.split(
            model,
            request.data,
            samples=wanted,
            quality_samples=samples,
            length=cal.length,
            quality_length=qual.length,
            seed=seed,
            rest=rest,
        )
    calibration_file, quality_file = cal.data or request.data, qual.data or request.data
    if quality_file is None:
        raise UsageError("No data to judge the result by. Give --data FILE, or quality.data in the recipe.")
    windows = datasets.quality_windows(model, quality_file, samples=samples, length=qual.length, seed=seed)
    if calibration_file is None:
        return None, windows
    calibration = datasets.calibrate(model, calibration_file, samples=wanted, length=cal.length, seed=seed, rest=rest)
    datasets.check_calibration(calibration, windows)
    return calibration, windows


def fingerprint(model: Model, request: Request, calibration: Calibration | None, windows: Samples) -> dict[str, str]:
    """What a run depends on: what an earlier try began is taken up only where all of it is the same."""
    return {
        "model": model.digest,
        "recipe": request.recipe.passes,
        "seed": str(request.recipe.seed),
        "profile": hwprofiles.digest(request.profile),
        "calibration": calibration.windows.digest if calibration else "none",
        "training": calibration.rest.digest if calibration and calibration.rest else "none",
        "calibration dtype": request.recipe.calibration.dtype,
        "quality": windows.digest,
        "device": request.device,
        "threads": str(torch.get_num_threads()),
        "code": manifest.code_digest(),
        "versions": ", ".join(f"{name} {number}" for name, number in manifest.versions().items()),
    }


def _export_both(result: Result, profile: Profile, folder: Path, progress: Progress) -> Lowered:
    """The artifact in its target's folder and the baseline in `baseline/`, from one capture where they are alike."""
    target = find_target(profile.target)
    for name in (target.FOLDER, "baseline"):
        shutil.rmtree(folder / name, ignore_errors=True)
    progress.begin("Exporting: tracing the model")
    graph = target.capture(result.model, profile)
    progress.begin("Exporting: writing the baseline")
    of_baseline = None if any(item.reshapes for item in result.pipeline.passes) else graph
    write_baseline(target, result.source, profile, folder / "baseline", of_baseline)
    result.source.release()
    progress.begin("Exporting: writing the artifact")
    lowered = target.write(result.model, profile, folder / target.FOLDER, graph)
    result.model.release()
    return lowered


def _evaluate(folder: Path, result: Result, request: Request, windows: Samples, progress: Progress) -> Evaluation:
    profile, settings = request.profile, request.recipe.quality
    target, threads = find_target(profile.target), thread_count(profile)
    progress.begin("Loading the baseline and the artifact")
    baseline = target.session(folder / "baseline", threads)
    artifact = target.session(folder / target.FOLDER, threads)
    runners = runners_of(target, (baseline, folder / "baseline"), (artifact, folder / target.FOLDER))
    amount = Amount(settings.generation, settings.generation_tokens)
    return evaluate(baseline, artifact, result.source, result.model, windows, progress, runners, amount)


def _measure(folder: Path, request: Request, model: Model, windows: Samples, progress: Progress) -> Speed | None:
    """None where what is deployed does not run here: a time of anything else would be mistaken for its own."""
    if not timed_here(find_target(request.profile.target), request.profile):
        return None
    return measure_artifact(
        folder / "baseline",
        folder / find_target(request.profile.target).FOLDER,
        request.profile,
        model,
        material_of(windows, request.recipe.quality.data or request.data),
        seed=request.recipe.seed,
        budget_s=request.budget_s,
        progress=progress,
    )
