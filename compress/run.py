"""One run, as the list of its steps (design §1). Each step is a function of its own, and a verb of the command line."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from compress import data, hwprofiles, manifest
from compress.data import Calibration, Samples
from compress.errors import InputError, UsageError
from compress.evaluate import Evaluation, evaluate, kept_inputs, verification_inputs, verify_export
from compress.export import find as find_target
from compress.hwprofiles import Profile
from compress.measure import BUDGET_S, deployable_bytes, measure, thread_count
from compress.memory import peak_memory
from compress.model import Model, load
from compress.pipeline import Pipeline, Result
from compress.plan import make_plan, refusal
from compress.progress import Progress
from compress.quality import check_gates, gates_met
from compress.recipe import Recipe
from compress.records import Plan, Report, RunCost, Speed, Verification
from compress.report import to_html, to_markdown, verdict_sentence
from compress.store import write_text
from compress.target import Lowered, require_tools, timed_here, write_baseline
from compress.workspace import Workspace, disk_errors, require_space

KEPT = ("manifest.json", "model", "report.html", "report.json", "report.md")
"""What an artifact holds beside its target's folder."""
QUALITY_SAMPLES = 128
"""Windows; images are all taken unless a number is given."""


@dataclass(frozen=True)
class Request:
    """What `compress run` was asked for."""

    model: str
    recipe: Recipe
    profile: Profile
    out: Path
    data: str | None = None
    device: str = "cpu"
    overwrite: bool = False
    command: str = ""
    budget_s: float = BUDGET_S


def run(request: Request, progress: Progress | None = None) -> Report:
    """Load, plan, calibrate, compress, export, verify, evaluate, measure, report.

    Returns the report; the artifact is at `request.out`. Raises: any CompressError; nothing half-written is left there.
    InputError with the result kept where the artifact does not agree with its model.
    """
    progress = progress or Progress(quiet=True)
    started = time.monotonic()
    request = replace(request, recipe=request.recipe.for_target(request.profile.target))
    require_tools(find_target(request.profile.target), request.profile)
    model = load(request.model)
    pipeline = Pipeline.parse(request.recipe.passes)
    plan = make_plan(model, request.recipe, request.profile, pipeline)
    refuse(plan)
    check_gates(request.recipe.quality.gates, model.task)
    calibration, windows = _data(model, request)
    with Workspace(request.out, request.overwrite) as space:
        journal = space.open(_fingerprint(model, request, calibration, windows))
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
            verification = verify_export(result.model, lowered.folder, request.profile, inputs, lowered.bounds)
            evaluation = _evaluate(space.folder, result, request.profile, windows, progress)
            speed = _measure(space.folder, request, model, progress)
            cost = RunCost(
                seconds=time.monotonic() - started,
                passes_peak_memory_bytes=compress_memory,
                peak_memory_bytes=peak_memory(),
            )
            report = _report(request, model, plan, result, lowered, verification, evaluation, speed, cost)
            kept = (*KEPT, find_target(request.profile.target).FOLDER)
            _write(space.folder, report, _facts(request, model, result, windows, report), kept)
            space.commit(kept)
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


def _data(model: Model, request: Request) -> tuple[Calibration | None, Samples]:
    """Calibration and quality windows, or images, the former in the recipe's type."""
    calibration, windows = _read_data(model, request)
    dtype = getattr(torch, request.recipe.calibration.dtype)
    return calibration and replace(calibration, dtype=dtype), windows


def _read_data(model: Model, request: Request) -> tuple[Calibration | None, Samples]:
    """Calibration and quality windows, or images, from --data (split) or from the recipe's own files."""
    recipe, seed = request.recipe, request.recipe.seed
    cal, qual = recipe.calibration, recipe.quality
    samples = qual.samples or (QUALITY_SAMPLES if model.image is None else None)
    wanted = cal.samples if "samples" in cal.model_fields_set else None
    if request.data and not (cal.data or qual.data):
        return data.split(
            model,
            request.data,
            samples=wanted,
            quality_samples=samples,
            length=cal.length,
            quality_length=qual.length,
            seed=seed,
        )
    calibration_file, quality_file = cal.data or request.data, qual.data or request.data
    if quality_file is None:
        raise UsageError("No data to judge the result by. Give --data FILE, or quality.data in the recipe.")
    windows = data.quality_windows(model, quality_file, samples=samples, length=qual.length, seed=seed)
    if calibration_file is None:
        return None, windows
    calibration = data.calibrate(model, calibration_file, samples=wanted, length=cal.length, seed=seed)
    data.check_disjoint(calibration.windows, windows)
    return calibration, windows


def _fingerprint(model: Model, request: Request, calibration: Calibration | None, windows: Samples) -> dict[str, str]:
    return {
        "model": model.digest,
        "recipe": request.recipe.passes,
        "seed": str(request.recipe.seed),
        "profile": hwprofiles.digest(request.profile),
        "calibration": calibration.windows.digest if calibration else "none",
        "calibration dtype": request.recipe.calibration.dtype,
        "quality": windows.digest,
        "device": request.device,
        "threads": str(torch.get_num_threads()),
        "code": manifest.code_digest(),
        "versions": ", ".join(f"{name} {number}" for name, number in manifest.versions().items()),
    }


def _export_both(result: Result, profile: Profile, folder: Path, progress: Progress) -> Lowered:
    """The artifact in its target's folder and the baseline in `baseline/`, from one capture."""
    target = find_target(profile.target)
    for name in (target.FOLDER, "baseline"):
        shutil.rmtree(folder / name, ignore_errors=True)
    progress.tick("Exporting", 0, 3)
    graph = target.capture(result.model, profile)
    progress.tick("Exporting", 1, 3)
    write_baseline(target, result.source, profile, folder / "baseline", graph)
    result.source.release()
    progress.tick("Exporting", 2, 3)
    lowered = target.write(result.model, profile, folder / target.FOLDER, graph)
    result.model.release()
    progress.tick("Exporting", 3, 3)
    return lowered


def _evaluate(folder: Path, result: Result, profile: Profile, windows: Samples, progress: Progress) -> Evaluation:
    target, threads = find_target(profile.target), thread_count(profile)
    baseline = target.session(folder / "baseline", threads)
    artifact = target.session(folder / target.FOLDER, threads)
    return evaluate(baseline, artifact, result.source, result.model, windows, progress)


def _measure(folder: Path, request: Request, model: Model, progress: Progress) -> Speed | None:
    """None where what is deployed does not run here: a time of anything else would be mistaken for its own."""
    if not timed_here(find_target(request.profile.target)):
        return None
    return measure(
        folder / "baseline",
        folder / find_target(request.profile.target).FOLDER,
        request.profile,
        vocabulary=model.vocabulary,
        longest=model.longest,
        image=model.image.shape if model.image else None,
        seed=request.recipe.seed,
        budget_s=request.budget_s,
        progress=progress,
    )


def _report(
    request: Request,
    model: Model,
    plan: Plan,
    result: Result,
    lowered: Lowered,
    verification: Verification,
    evaluation: Evaluation,
    speed: Speed | None,
    cost: RunCost,
) -> Report:
    gates = gates_met(evaluation.artifact, request.recipe.quality.gates)
    pieces: dict[str, Any] = {
        "source_bytes": model.source_bytes,
        "artifact_bytes": lowered.deployed_bytes or deployable_bytes(lowered.folder),
        "speed": speed,
        "baseline_quality": evaluation.baseline,
        "artifact_quality": evaluation.artifact,
        "memory_quality": evaluation.memory,
        "verification": verification,
        "gates": gates,
    }
    return Report(
        title=f"{model.name}, {request.recipe.name}, {request.profile.id}",
        source=model.source,
        source_digest=model.digest,
        recipe=str(result.pipeline),
        profile=request.profile.id,
        target=request.profile.target,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=manifest.versions(),
        seed=request.recipe.seed,
        calibration=result.calibration.summary() if result.calibration else {},
        passes=result.passes,
        plan=plan,
        operators=lowered.operators,
        float_layers=lowered.float_layers,
        cost=cost,
        verdict=verdict_sentence(**pieces),
        command=request.command,
        **pieces,
    )


def _facts(request: Request, model: Model, result: Result, windows: Samples, report: Report) -> dict[str, Any]:
    """What the manifest records beside the files."""
    verification = report.verification
    assert verification is not None
    return {
        "source": request.model,
        "source_digest": model.digest,
        "task": str(model.task),
        "recipe": {"name": request.recipe.name, "passes": str(result.pipeline)},
        "profile": request.profile.model_dump(mode="json"),
        "seed": request.recipe.seed,
        "calibration": result.calibration.summary() if result.calibration else {},
        "quality_digest": windows.digest,
        "verification": {
            "bounds": {"shipped": verification.bound, "exact": verification.exact_bound},
            "ids": kept_inputs(model, windows),
            "greedy_tokens": list(verification.greedy_tokens),
        },
        "metrics": _metrics(report),
    }


def _metrics(report: Report) -> dict[str, Any]:
    """The figures that lead the report, JSON-able: quality by metric, speed-up by setting, bytes."""
    of = {"baseline": report.baseline_quality, "artifact": report.artifact_quality, "memory": report.memory_quality}
    # through JSON text, where not-a-number is a string
    quality = {name: json.loads(found.model_dump_json())["metrics"] for name, found in of.items() if found}
    timings = report.speed.timings if report.speed else ()
    speed = {each.name: {"speedup": each.speedup, "verdict": each.verdict} for each in timings}
    return {"quality": quality, "speed": speed, "artifact_bytes": report.artifact_bytes}


def _write(folder: Path, report: Report, facts: Mapping[str, Any], kept: tuple[str, ...]) -> None:
    write_text(folder / "report.json", report.model_dump_json(indent=1) + "\n")
    write_text(folder / "report.md", to_markdown(report))
    write_text(folder / "report.html", to_html(report))
    manifest.write(folder, facts, kept)
