"""The reports of a sweep: each variant's own, as `compress run` writes it, and the one over all of them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from compress import hwprofiles, manifest
from compress.errors import CompressError, InputError
from compress.export import find as find_target
from compress.files import write_text
from compress.quality.metrics import headline
from compress.records import Report, Timing
from compress.records.base import Interval
from compress.report.verdict import headline_timing
from compress.run_report import Found, write_report
from compress.speed.measure import thread_count
from compress.sweep.bench import Outcome
from compress.sweep.front import Axis, Candidate, Choice, Differences, Estimate, choose
from compress.sweep.judge import loss_of
from compress.sweep.limits import resolve
from compress.sweep.page import to_html, to_markdown
from compress.sweep.records import Figure, Picked, Sweep, Variant
from compress.sweep.setup import VARIANTS, Setup, SweepRequest

KEPT = ("manifest.json", "report.html", "report.json", "report.md", VARIANTS)
"""What a sweep's folder holds."""


def write_variants(folder: Path, setup: Setup, outcome: Outcome) -> dict[str, Report]:
    """Report and manifest of every variant that is whole; the folders of the others are removed."""
    reports = {}
    for name, planned in setup.planned.items():
        own = folder / VARIANTS / name
        if name not in outcome.evaluations:
            shutil.rmtree(own, ignore_errors=True)
            continue
        request, prepared = planned.request, outcome.prepared[name]
        deployed = own / find_target(request.profile.target).FOLDER
        found = Found(
            plan=planned.plan,
            result=outcome.results[name],
            lowered=prepared.lowered(deployed),
            verification=prepared.verification,
            evaluation=outcome.evaluations[name],
            speed=outcome.speeds.get(name),
            cost=prepared.cost,
        )
        reports[name] = write_report(own, request, setup.model, setup.windows, found)
    return reports


def write_sweep(
    folder: Path, request: SweepRequest, setup: Setup, outcome: Outcome, reports: Mapping[str, Report]
) -> Sweep:
    """The sweep's report in its three forms, and a manifest over everything."""
    found = _sweep(request, setup, outcome, reports)
    write_text(folder / "report.json", found.model_dump_json(indent=1) + "\n")
    write_text(folder / "report.md", to_markdown(found))
    write_text(folder / "report.html", to_html(found))
    facts = {"kind": found.kind, "source": request.model, "source_digest": found.source_digest}
    manifest.write(folder, facts, KEPT)
    return found


def exit_code(found: Sweep) -> int:
    """0 where a variant meets its gates and the limits, 5 where none agrees with its model, else 3: the results are
    kept, and none may be taken."""
    if found.choice.allowed:
        return 0
    agree = any(each.verification is not None and each.verification.agrees for each in found.done)
    return 3 if agree else InputError.exit_code


def _sweep(request: SweepRequest, setup: Setup, outcome: Outcome, reports: Mapping[str, Report]) -> Sweep:
    model, target = setup.model, request.profile.target
    variants = tuple(
        _done(name, reports[name], outcome) if name in reports else _failed(name, each.recipe.passes, outcome)
        for name, each in request.requests().items()
    )
    first = next(iter(reports.values()))
    lead = headline_timing(first.speed)
    metric = loss_of(first.artifact_quality) if first.artifact_quality else None
    choice = _choose(request, setup, variants, lead, outcome)
    return Sweep(
        title=f"{model.name}, {len(variants)} recipes, {request.profile.id}",
        source=model.source,
        source_digest=model.digest,
        source_bytes=model.source_bytes,
        profile=request.profile.id,
        target=target,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=manifest.versions(),
        seed=request.recipes[0].seed,
        loss_metric=metric[0] if metric else "",
        setting=lead.name if lead else "",
        baseline_s=lead.baseline_s if lead else None,
        baseline_quality=headline(first.baseline_quality) if first.baseline_quality else None,
        baseline_footprint=outcome.footprints.get(""),
        runtime=outcome.runtime,
        threads=thread_count(request.profile),
        machine=hwprofiles.machine_summary(),
        variants=variants,
        differences=tuple(outcome.differences),
        limits=request.limits,
        choice=choice,
        notes=_notes(outcome),
        command=request.command,
    )


def _done(name: str, report: Report, outcome: Outcome) -> Variant:
    prepared = outcome.prepared[name]
    return Variant(
        name=name,
        recipe=report.recipe,
        state="done",
        folder=f"{VARIANTS}/{name}",
        artifact_bytes=report.artifact_bytes,
        quality=headline(report.artifact_quality) if report.artifact_quality else None,
        timings=report.speed.timings if report.speed else (),
        footprint=outcome.footprints.get(name),
        verification=report.verification,
        gates=report.gates,
        figures=_figures(report),
        passes=len(report.passes),
        operators=len(report.operators),
        seconds=prepared.cost.seconds,
        reused=prepared.reused,
    )


def _failed(name: str, recipe: str, outcome: Outcome) -> Variant:
    error: CompressError = outcome.failures[name]
    return Variant(name=name, recipe=recipe, state="failed", reason=str(error), exit_code=error.exit_code)


def _figures(report: Report) -> dict[Axis, Figure]:
    """On the axes of the front; what was not measured is left out."""
    size = float(report.artifact_bytes)
    found: dict[Axis, Figure] = {"size": Figure(value=size, low=size, high=size, unit="bytes")}
    lead = headline_timing(report.speed)
    if lead is not None:
        share = f"of the baseline's time, {lead.name}"
        bounds = 1 / lead.interval.high, 1 / lead.interval.low
        found["latency"] = Figure(value=1 / lead.speedup, low=bounds[0], high=bounds[1], unit=share)
    loss = loss_of(report.artifact_quality) if report.artifact_quality else None
    if loss is not None:
        label, value, interval = loss
        ends = (value, value) if interval is None else (interval.low, interval.high)
        found["loss"] = Figure(value=value, low=ends[0], high=ends[1], unit=label)
    return found


def _choose(
    request: SweepRequest, setup: Setup, variants: tuple[Variant, ...], lead: Timing | None, outcome: Outcome
) -> Picked:
    limits = resolve(request.limits, setup.model.source_bytes, lead.baseline_s if lead else None)
    bounded = any(recipe.quality.gates for recipe in request.recipes)
    candidates = [_candidate(each) for each in variants]
    found: Choice = choose(candidates, _differences(outcome), limits, request.limits.prefer, bounded=bounded)
    return Picked(
        front=found.front,
        recommended=found.recommended,
        sentence=found.sentence,
        tied=found.tied,
        allowed=found.allowed,
        reasons=found.reasons,
    )


def _differences(outcome: Outcome) -> Differences:
    return {
        (each.axis, each.first, each.second): Estimate.of(each.value, each.interval) for each in outcome.differences
    }


def _candidate(variant: Variant) -> Candidate:
    estimates = {
        axis: Estimate.of(each.value, Interval(low=each.low, high=each.high) if math.isfinite(each.value) else None)
        for axis, each in variant.figures.items()
    }
    return Candidate(variant.name, estimates, (variant.passes, variant.operators), _refused(variant))


def _refused(variant: Variant) -> str:
    if variant.state == "failed":
        return f"failed: {variant.reason}"
    if variant.verification is not None and not variant.verification.agrees:
        return "the artifact does not agree with its model"
    unmet = [f"{gate.name} {gate.found:.3g} (bound {gate.bound:g})" for gate in variant.gates if not gate.met]
    return f"gate not met: {', '.join(unmet)}" if unmet else ""


def _notes(outcome: Outcome) -> tuple[str, ...]:
    found = []
    if outcome.groups > 1:
        found.append(f"Memory did not hold all variants at once: they were timed in {outcome.groups} groups.")
    if not outcome.speeds:
        found.append("Nothing was timed: what is deployed does not run on this machine.")
    return tuple(found)
