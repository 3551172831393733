"""What a run found out, written down: the report in its three forms, and the manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compress import asked, manifest
from compress.defaults import BUDGET_S
from compress.export import find as find_target
from compress.files import write_text
from compress.hwprofiles import Profile
from compress.inputs.datasets import Samples
from compress.models.model import Model
from compress.pipeline import Result
from compress.quality.evaluate import Evaluation
from compress.quality.harness import LOGS
from compress.quality.metrics import gates_met, interval_notes
from compress.quality.verification import kept_inputs
from compress.recipe import Recipe
from compress.records import Plan, Report, RunCost, Speed, Verification
from compress.records.task import Tasks
from compress.report import to_html, to_markdown, verdict_sentence
from compress.speed.footprint import deployable_bytes
from compress.target import Lowered

KEPT = (manifest.NAME, "model", "report.html", "report.json", "report.md")
"""What an artifact holds beside its target's folder."""
THROUGH_CACHE = (
    "The artifact read every token by itself, through its compressed cache, as in generating: its figures hold what "
    "the cache loses, those in memory the weights' loss alone."
)


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


@dataclass(frozen=True)
class Found:
    """What a run found out, of which its report is made."""

    plan: Plan
    result: Result
    lowered: Lowered
    verification: Verification
    evaluation: Evaluation
    speed: Speed | None
    cost: RunCost
    tasks: Tasks | None = None


def kept(request: Request) -> tuple[str, ...]:
    """What is left of the working folder; the target's own folder last."""
    logs = (LOGS,) if request.recipe.tasks else ()
    return (*KEPT, *logs, find_target(request.profile.target).FOLDER)


def write_report(folder: Path, request: Request, model: Model, windows: Samples, found: Found) -> Report:
    """The report in its three forms and the manifest, beside the artifact's files. Returns the report."""
    report = _report(request, model, found)
    folders = kept(request)
    files = manifest.describe_files(folder, ("model", folders[-1]))
    report = report.model_copy(update={"request": asked.record(request, model), "files": manifest.digests(files)})
    _write(folder, request.out, report, _facts(request, model, found.result, windows, report), folders, files)
    return report


def _report(request: Request, model: Model, found: Found) -> Report:
    result, lowered, evaluation, speed = found.result, found.lowered, found.evaluation, found.speed
    of_tasks = found.tasks.gates if found.tasks else ()
    asked_for, quality = request.recipe.quality.gates, evaluation.artifact
    gates = (*gates_met(quality, asked_for), *of_tasks)
    through = (THROUGH_CACHE,) if result.model.kv else ()
    noted = quality.model_copy(update={"notes": (*quality.notes, *through, *interval_notes(quality, asked_for))})
    pieces: dict[str, Any] = {
        "source_bytes": model.source_bytes,
        "artifact_bytes": lowered.deployed_bytes or deployable_bytes(lowered.folder),
        "speed": speed,
        "baseline_quality": evaluation.baseline,
        "artifact_quality": noted,
        "memory_quality": evaluation.memory,
        "verification": found.verification,
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
        plan=found.plan,
        operators=lowered.operators,
        float_layers=lowered.float_layers,
        cost=found.cost,
        tasks=found.tasks,
        sparsity=result.sparsity,
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


def _write(
    folder: Path,
    out: Path,
    report: Report,
    facts: Mapping[str, Any],
    kept: tuple[str, ...],
    files: Mapping[str, manifest.Facts],
) -> None:
    write_text(folder / "report.json", report.model_dump_json(indent=1) + "\n")
    write_text(folder / "report.md", to_markdown(report, out))
    write_text(folder / "report.html", to_html(report, out))
    manifest.write(folder, facts, kept, files)
