"""One run, as the list of its steps (design §1). Each step is a function of its own, and a verb of the command line."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from compress import data, hwprofiles, manifest
from compress.data import Calibration, Windows
from compress.errors import UnsupportedError, UsageError
from compress.evaluate import MIN_POSITIONS, Evaluation, agreement, evaluate
from compress.export import find as find_target
from compress.export.onnx.runtime import Session, peak_memory
from compress.hwprofiles import Profile
from compress.measure import BUDGET_S, deployable_bytes, measure, thread_count
from compress.model import Model, load
from compress.pipeline import Pipeline, Result
from compress.plan import make_plan
from compress.progress import Progress
from compress.quality import gates_met
from compress.recipe import Recipe
from compress.records import Bounds, Plan, Report, RunCost, Speed, Verification
from compress.report import to_html, to_markdown, verdict_sentence
from compress.store import write_text
from compress.workspace import Workspace, disk_errors, require_space

KEPT = ("manifest.json", "model", "onnx", "report.html", "report.json", "report.md")
QUALITY_SAMPLES = 128
GREEDY_TOKENS = 64
PROMPT_TOKENS = 16


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
    """
    progress = progress or Progress(quiet=True)
    started = time.monotonic()
    model = load(request.model)
    pipeline = Pipeline.parse(request.recipe.passes)
    plan = make_plan(model, request.recipe, request.profile, pipeline)
    refuse(plan)
    calibration, windows = _data(model, request)
    space = Workspace(request.out, request.overwrite)
    try:
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
            verification = verify_export(result.model, lowered.folder, request.profile, windows.ids, lowered.bounds)
            evaluation = _evaluate(space.folder, result, request.profile, windows, progress)
            speed = _measure(space.folder, request, model, progress)
            cost = RunCost(
                seconds=time.monotonic() - started,
                passes_peak_memory_bytes=compress_memory,
                peak_memory_bytes=peak_memory(),
            )
            report = _report(request, model, plan, result, lowered, verification, evaluation, speed, cost)
            _write(space.folder, report, _facts(request, model, result, windows, verification))
            space.commit(KEPT)
    finally:
        space.close()
    return report


def refuse(plan: Plan) -> None:
    """Raises: UsageError or UnsupportedError where the target cannot store what the recipe makes."""
    if not plan.refusals:
        return
    kind = UsageError if any("group" in reason for reason in plan.refusals) else UnsupportedError
    raise kind(f"The recipe cannot be exported for profile {plan.profile}. {' '.join(r + '.' for r in plan.refusals)}")


def _data(model: Model, request: Request) -> tuple[Calibration | None, Windows]:
    """Calibration and quality windows from --data (split) or from the recipe's own files."""
    recipe, seed = request.recipe, request.recipe.seed
    cal, qual = recipe.calibration, recipe.quality
    samples = qual.samples or QUALITY_SAMPLES
    if request.data and not (cal.data or qual.data):
        return data.split(
            model, request.data, samples=cal.samples, quality_samples=samples, length=cal.length, seed=seed
        )
    calibration_file, quality_file = cal.data or request.data, qual.data or request.data
    if quality_file is None:
        raise UsageError("No data to judge the result by. Give --data FILE, or quality.data in the recipe.")
    windows = data.quality_windows(model, quality_file, samples=samples, length=qual.length, seed=seed)
    if calibration_file is None:
        return None, windows
    calibration = data.calibrate(model, calibration_file, samples=cal.samples, length=cal.length, seed=seed)
    data.check_disjoint(calibration.windows, windows)
    return calibration, windows


def _fingerprint(model: Model, request: Request, calibration: Calibration | None, windows: Windows) -> dict[str, str]:
    return {
        "model": model.digest,
        "recipe": request.recipe.passes,
        "seed": str(request.recipe.seed),
        "profile": hwprofiles.digest(request.profile),
        "calibration": calibration.windows.digest if calibration else "none",
        "quality": windows.digest,
        "device": request.device,
        "threads": str(torch.get_num_threads()),
        "versions": ", ".join(f"{name} {number}" for name, number in manifest.versions().items()),
    }


def _export_both(result: Result, profile: Profile, folder: Path, progress: Progress) -> Any:
    """The artifact in `onnx/` and the baseline in `baseline/`, from one capture."""
    target = find_target(profile.target)
    for name in ("onnx", "baseline"):
        shutil.rmtree(folder / name, ignore_errors=True)
    progress.tick("Exporting", 0, 3)
    graph: bytes = target.capture(result.model, profile.runtime(target.RUNTIME).opset)
    progress.tick("Exporting", 1, 3)
    target.write(result.source, profile, folder / "baseline", graph)
    progress.tick("Exporting", 2, 3)
    lowered = target.write(result.model, profile, folder / "onnx", graph)
    progress.tick("Exporting", 3, 3)
    return lowered


def verify_export(model: Model, folder: Path, profile: Profile, ids: torch.Tensor, bounds: Bounds) -> Verification:
    """Load an exported folder in its runtime, run it, and compare it with the in-memory model.

    Args: ids (N, length) int64, at least 512 tokens; bounds: what its lowerings publish.
    Raises: CompressError when the runtime does not load it.
    """
    session = Session(folder, thread_count(profile))
    rows = -(-MIN_POSITIONS // ids.shape[1])
    found = agreement(session, model, ids[:rows], bounds, Session(folder, thread_count(profile), exact=True))
    if not session.is_decoder:
        return found
    prompt = ids[0, : min(PROMPT_TOKENS, ids.shape[1])].tolist()
    return found.model_copy(update={"greedy_tokens": tuple(session.greedy(prompt, GREEDY_TOKENS))})


def _evaluate(folder: Path, result: Result, profile: Profile, windows: Windows, progress: Progress) -> Evaluation:
    threads = thread_count(profile)
    baseline, artifact = Session(folder / "baseline", threads), Session(folder / "onnx", threads)
    return evaluate(baseline, artifact, result.source, result.model, windows, progress)


def _measure(folder: Path, request: Request, model: Model, progress: Progress) -> Speed:
    return measure(
        folder / "baseline",
        folder / "onnx",
        request.profile,
        vocabulary=model.vocabulary,
        longest=model.longest,
        seed=request.recipe.seed,
        budget_s=request.budget_s,
        progress=progress,
    )


def _report(
    request: Request,
    model: Model,
    plan: Plan,
    result: Result,
    lowered: Any,
    verification: Verification,
    evaluation: Evaluation,
    speed: Speed,
    cost: RunCost,
) -> Report:
    gates = gates_met(evaluation.artifact, request.recipe.quality.gates)
    pieces: dict[str, Any] = {
        "source_bytes": model.source_bytes,
        "artifact_bytes": deployable_bytes(lowered.folder),
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


def _facts(
    request: Request, model: Model, result: Result, windows: Windows, verification: Verification
) -> dict[str, Any]:
    """What the manifest records beside the files."""
    rows = -(-MIN_POSITIONS // windows.ids.shape[1])
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
            "ids": windows.ids[:rows].tolist(),
            "greedy_tokens": list(verification.greedy_tokens),
        },
    }


def _write(folder: Path, report: Report, facts: Mapping[str, Any]) -> None:
    write_text(folder / "report.json", report.model_dump_json(indent=1) + "\n")
    write_text(folder / "report.md", to_markdown(report))
    write_text(folder / "report.html", to_html(report))
    manifest.write(folder, facts, KEPT)
