"""`plan`: what a run will touch, store and cost, before anything expensive and without the weights."""

from __future__ import annotations

from typing import Any

from compress.export import find as find_target
from compress.hwprofiles import Profile
from compress.layer import LayerKind, LayerSpec
from compress.matching import Resolution
from compress.model import Model
from compress.pipeline import Pipeline, describe, planned
from compress.predict import Sizes, artifact_bytes, disk_bytes, model_bytes, peak_memory, seconds
from compress.recipe import Recipe
from compress.records import Plan, PlannedLayer


def make_plan(model: Model, recipe: Recipe, profile: Profile, pipeline: Pipeline | None = None) -> Plan:
    """Lay the recipe over the model for a profile.

    Raises: UsageError for patterns that match nothing or passes that collide. What the target cannot store is listed
    in `refusals`; a run stops there.
    """
    pipeline = pipeline or Pipeline.parse(recipe.passes)
    resolution = pipeline.resolve(model)
    specs = planned(resolution)
    target = find_target(profile.target)
    choices = {name: target.plan_layer(spec, profile) for name, spec in specs.items()}
    layers = tuple(_row(name, spec, choices[name], resolution) for name, spec in specs.items())
    sizes = Sizes.of(model, specs.values(), recipe, pipeline.needs_data)
    artifact = artifact_bytes(target, specs.values(), model, profile)
    return Plan(
        model=model.source,
        profile=profile.id,
        recipe=str(pipeline),
        layers=layers,
        matches={str(item): dict(count) for item, count in zip(pipeline.passes, resolution.matches, strict=True)},
        warnings=_warnings(layers, resolution),
        refusals=_refusals(choices),
        source_bytes=model.source_bytes,
        predicted_artifact_bytes=artifact,
        predicted_model_bytes=model_bytes(specs.values(), model),
        predicted_peak_memory_bytes=peak_memory(sizes, artifact),
        predicted_disk_bytes=disk_bytes(sizes, specs.values(), model, artifact),
        predicted_seconds=seconds(sizes, profile),
    )


def _row(name: str, spec: LayerSpec, choice: Any, resolution: Resolution) -> PlannedLayer:
    touched = tuple(str(resolution_pass) for _, resolution_pass in resolution.passes[name])
    refused = hasattr(choice, "reason")
    return PlannedLayer(
        layer=name,
        users=spec.users,
        kind=str(spec.kind),
        shape=spec.shape,
        passes=touched,
        reason="" if touched else next((skip[name] for skip in resolution.skipped if name in skip), ""),
        format=describe(spec),
        operator="" if refused else choice.operator,
        kernel="no" if refused else choice.kernel,
        note=choice.reason if refused else choice.note,
        stored_bytes=0 if refused else choice.stored_bytes,
    )


def _refusals(choices: dict[str, Any]) -> tuple[str, ...]:
    """One sentence per reason, with the layers it concerns."""
    grouped: dict[str, list[str]] = {}
    for name, choice in choices.items():
        if hasattr(choice, "reason"):
            grouped.setdefault(choice.reason, []).append(name)
    return tuple(f"{len(names)} layer(s), first {names[0]}: {reason}" for reason, names in grouped.items())


def _warnings(layers: tuple[PlannedLayer, ...], resolution: Resolution) -> tuple[str, ...]:
    grouped: dict[tuple[str, str, str], int] = {}
    for row in layers:
        if row.kernel == "works":
            key = (row.operator, row.format, row.note)
            grouped[key] = grouped.get(key, 0) + 1
    found = [
        f"{count} layer(s) in {form} work through {operator} but are not fast here: {note}"
        for (operator, form, note), count in grouped.items()
    ]
    found += [
        f"{name} no longer shares its weight: a pass names it alone, which stores it twice."
        for name in resolution.untied
    ]
    whole = sum(row.stored_bytes for row in layers) or 1
    left = [row for row in layers if not row.passes and row.kind != str(LayerKind.EXPERT)]
    share = sum(row.stored_bytes for row in left) / whole
    if share > 0.25:
        found.append(f"{len(left)} layer(s) that no pass touches take {share:.0%} of the artifact: {left[0].layer} …")
    return tuple(found)
