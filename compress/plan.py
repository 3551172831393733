"""`plan`: what a run will touch, store and cost, before anything expensive and without the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from compress.engine.applying import describe
from compress.engine.layerpass import Pass
from compress.engine.matching import Resolution
from compress.engine.reshape import ReshapePass
from compress.errors import CompressError, ResourceError, UnsupportedError, UsageError
from compress.export import TARGETS
from compress.export import find as find_target
from compress.hwprofiles import Profile, ProfileError
from compress.kv.footprint import held_bytes
from compress.kv.spec import KvSpec
from compress.layer import LayerKind, LayerSpec
from compress.memory import allowed_memory
from compress.models import cache_tensors
from compress.models.model import Model, Task
from compress.pipeline import Pipeline, planned, planned_caches, possible_caches
from compress.predict import (
    Sizes,
    artifact_bytes,
    deployed_bytes,
    disk_bytes,
    model_bytes,
    peak_memory,
    predicted_parts,
    seconds,
)
from compress.recipe import Recipe
from compress.records import Plan, PlannedLayer, PredictedLatency
from compress.runtime.probing import LONG
from compress.speed import roofline
from compress.speed.measure import thread_count
from compress.target import Choice, Refusal, plan_layers, require_caches, require_graphs

Choices = Mapping[str, Choice | Refusal]


def make_plan(model: Model, recipe: Recipe, profile: Profile, pipeline: Pipeline | None = None) -> Plan:
    """Lay the recipe over the model for a profile.

    Raises: UsageError for patterns that match nothing or passes that collide. What the target cannot store is listed
    in `refusals`; a run stops there.
    """
    recipe = recipe.for_target(profile.target)
    pipeline = pipeline or Pipeline.parse(recipe.passes)
    pipeline.check_dtype(model, getattr(torch, recipe.calibration.dtype))
    sections = pipeline.lay(model)
    resolution = sections[-1].resolution
    shaped = replace(sections[-1].model, kv=planned_caches(pipeline.passes, sections))
    specs = planned(resolution)
    target = find_target(profile.target)
    require_graphs(target, shaped, profile)
    require_caches(target, possible_caches(pipeline.passes, shaped.kv), profile)
    choices = plan_layers(target, specs, profile)
    layers = tuple(_row(name, spec, choices[name], resolution) for name, spec in specs.items())
    sizes = Sizes.of(model, specs.values(), recipe, pipeline.needs_data, pipeline.passes)
    artifact = artifact_bytes(target, specs.values(), shaped, profile)
    stored = model_bytes(specs.values(), shaped)
    memory = peak_memory(sizes, artifact)
    refused = [choice for choice in choices.values() if isinstance(choice, Refusal)]
    deployed = deployed_bytes(target, specs.values(), shaped, profile, artifact)
    about_weights = any(not item.caches for item in pipeline.passes)
    larger = _larger(deployed, model.source_bytes) if about_weights and not refused else ()
    return Plan(
        model=model.source,
        profile=profile.id,
        recipe=str(pipeline),
        layers=layers,
        matches=_matches(
            [str(item) for item in pipeline.passes], [found for part in sections for found in part.resolution.matches]
        ),
        warnings=(*model.warnings, *_warnings(layers, resolution, pipeline.passes), *larger, *_too_large(memory)),
        notes=(
            *(
                f"{item}: {item.undecided}."
                for item in pipeline.passes
                if isinstance(item, ReshapePass) and item.undecided
            ),
            *_cache_notes(shaped),
            *_notes(layers, predicted_parts(target, specs.values(), shaped, profile)),
        ),
        target=profile.target,
        refusals=_refusals(choices),
        other_targets=other_targets(specs, profile) if refused else (),
        refused_settings=bool(refused) and all(choice.usage for choice in refused),
        source_bytes=model.source_bytes,
        predicted_artifact_bytes=deployed,
        predicted_model_bytes=stored,
        predicted_peak_memory_bytes=memory,
        predicted_disk_bytes=disk_bytes(sizes, specs.values(), model, artifact),
        predicted_seconds=seconds(sizes, profile),
        predicted_latency=() if refused else _latency(shaped, specs, choices, profile, model),
    )


def _latency(
    model: Model, specs: Mapping[str, LayerSpec], choices: Choices, profile: Profile, source: Model
) -> tuple[PredictedLatency, ...]:
    """Over the profile's grid; none for image classifiers, whose layers are met more than once a call."""
    if model.image is not None:
        return ()
    arms = latency_arms(model, specs, choices, profile, source)
    return roofline.predict(*arms, profile, decodes=model.task is Task.CAUSAL_LM)


def latency_arms(
    model: Model, specs: Mapping[str, LayerSpec], choices: Choices, profile: Profile, source: Model | None = None
) -> tuple[roofline.Arm, roofline.Arm]:
    """The variant and the uncompressed baseline of a language model or encoder, as their latency is predicted.

    Args: source: what it was made of, where its shape is another.
    """
    runtime = profile.runtimes.get(find_target(profile.target).RUNTIME)
    # of a chip whose engines are built elsewhere, and of torch, the machine's own type still tells what is fastest
    float_dtype = (runtime or next(iter(profile.runtimes.values()))).float_dtype
    taken = {name: choice for name, choice in choices.items() if not isinstance(choice, Refusal)}
    lowered = roofline.Lowered(
        stored={name: choice.stored_bytes for name, choice in taken.items()},
        rounded=[name for name, choice in taken.items() if choice.rounds_inputs],
        decoded=[name for name, choice in taken.items() if choice.decodes],
        speeds={name: choice.speed for name, choice in taken.items() if choice.speed is not None},
    )
    machine = roofline.rates(profile, thread_count(profile), runtime, float_dtype)

    def arm(whose: Model, those: Iterable[LayerSpec], how: roofline.Lowered | None) -> roofline.Arm:
        return roofline.arm(those, how, whose.config.get_text_config(), whose.attentions, machine, float_dtype)

    before = specs if source is None else source.structure.layers
    return arm(model, specs.values(), lowered), arm(source or model, before.values(), None)


def refusal(plan: Plan) -> CompressError | None:
    """The error that a run of this plan stops with: UsageError where other settings would do, else UnsupportedError
    where the target cannot store what the recipe makes; ResourceError for more memory than there is."""
    if plan.refusals:
        kind = UsageError if plan.refused_settings else UnsupportedError
        reasons = " ".join(reason + "." for reason in plan.refusals)
        others = f" Target(s) that would store it: {', '.join(plan.other_targets)}." if plan.other_targets else ""
        return kind(
            f"The recipe cannot be exported for target {plan.target}, profile {plan.profile}. {reasons}{others}"
        )
    return next((ResourceError(text) for text in _too_large(plan.predicted_peak_memory_bytes)), None)


def other_targets(specs: Mapping[str, LayerSpec], profile: Profile) -> tuple[str, ...]:
    """The other targets that store every layer and run where the profile does."""
    found = []
    for name in TARGETS:
        if name != profile.target:
            try:
                choices = plan_layers(find_target(name), specs, profile)
            except ProfileError:  # its runtime is none of the profile's
                continue
            found += [] if any(isinstance(choice, Refusal) for choice in choices.values()) else [name]
    return tuple(found)


def _others(specs: Mapping[str, LayerSpec], profile: Profile) -> str:
    found = other_targets(specs, profile)
    return f" Target(s) that would store it: {', '.join(found)}." if found else ""


def check_storable(specs: Mapping[str, LayerSpec], profile: Profile) -> None:
    """Raises: UsageError or UnsupportedError naming what the profile's target cannot store."""
    refused = plan_layers(find_target(profile.target), specs, profile)
    reasons = _refusals(refused)
    if not reasons:
        return
    settings = all(choice.usage for choice in refused.values() if isinstance(choice, Refusal))
    kind = UsageError if settings else UnsupportedError
    raise kind(
        f"The model cannot be exported for target {profile.target}, profile {profile.id}. "
        f"{' '.join(text + '.' for text in reasons)}{_others(specs, profile)} A recipe may choose otherwise by target: "
        f"`compress run` with --target {profile.target} asks it."
    )


def _too_large(predicted: int) -> tuple[str, ...]:
    allowed = allowed_memory()
    if allowed is None or predicted <= allowed:
        return ()
    return (
        f"A run needs about {predicted / 1e9:.1f} GB of memory (predicted), but this machine has "
        f"{allowed / 1e9:.1f} GB. Give fewer or shorter windows (--samples, --length), leave out passes that train the "
        "whole model (tune), or use a larger machine.",
    )


def _matches(texts: Sequence[str], counts: Sequence[Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Layers per pattern by pass; passes of the same text are told apart by their number."""
    often, found = Counter(texts), {}
    for number, (text, count) in enumerate(zip(texts, counts, strict=True), 1):
        found[f"{text} (pass {number})" if often[text] > 1 else text] = dict(count)
    return found


def _row(name: str, spec: LayerSpec, choice: Choice | Refusal, resolution: Resolution) -> PlannedLayer:
    if isinstance(choice, Refusal):
        stored: dict[str, Any] = {"operator": "", "kernel": "no", "note": choice.reason, "stored_bytes": 0}
    else:
        stored = {key: getattr(choice, key) for key in ("operator", "kernel", "note", "stored_bytes")}
    touched = tuple(str(resolution_pass) for _, resolution_pass in resolution.passes[name])
    return PlannedLayer(
        layer=name,
        users=spec.users,
        kind=str(spec.kind),
        shape=spec.shape,
        passes=touched,
        reason="" if touched else next((skip[name] for skip in resolution.skipped if name in skip), ""),
        format=describe(spec),
        **stored,
    )


def _refusals(choices: Choices) -> tuple[str, ...]:
    """One sentence per reason, with the layers it concerns."""
    grouped: dict[str, list[str]] = {}
    for name, choice in choices.items():
        if isinstance(choice, Refusal):
            grouped.setdefault(choice.reason, []).append(name)
    return tuple(f"{len(names)} layer(s), first {names[0]}: {reason}" for reason, names in grouped.items())


def _notes(layers: tuple[PlannedLayer, ...], parts: Mapping[str, int]) -> tuple[str, ...]:
    """What kernels that are not fast for every use have to say, and what an artifact consists of that holds its model
    in several forms. parts: their bytes by name."""
    grouped: dict[tuple[str, str, str], int] = {}
    for row in layers:
        if row.kernel == "works":
            key = (row.operator, row.format, row.note)
            grouped[key] = grouped.get(key, 0) + 1
    found = [
        f"{count} layer(s) in {form} run through {operator}, whose speed depends on the use: {note}"
        for (operator, form, note), count in grouped.items()
    ]
    if parts:
        told = " + ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in parts.items())
        found.append(f"The artifact's folder holds {told} (predicted); its size above is of what is deployed.")
    return tuple(found)


def _cache_notes(model: Model) -> tuple[str, ...]:
    """How each layer's cache is to be kept, and what that takes."""
    if not model.kv:
        return ()
    tokens, hidden = min(LONG, model.longest), int(model.config.get_text_config().hidden_size)
    held = before = 0
    told: dict[str, list[int]] = {}
    for layer, (spec, attention) in enumerate(zip(model.kv, model.attentions, strict=True)):
        held += held_bytes(spec, *attention, tokens, cache_tensors.wanted(spec, attention, hidden))
        before += held_bytes(KvSpec(), *attention, tokens, {})
        told.setdefault(spec.told(), []).append(layer)
    lines = [
        f"The cache of {'every layer' if len(told) == 1 else 'layers ' + ', '.join(map(str, layers))}: {text}."
        for text, layers in told.items()
    ]
    budget = max(spec.budget for spec in model.kv)
    if budget >= tokens:
        lines.append(f"Nothing is dropped of texts up to {budget} tokens, and the model reads {model.longest}.")
    size = f"about {held / 1e6:,.2f} MB for {tokens} tokens, {before / 1e6:,.2f} MB in float32 without this"
    return (*lines, f"All caches of one sequence take {size} (in torch; before data change anything).")


def _larger(artifact: int, source: int) -> tuple[str, ...]:
    if artifact <= source:
        return ()
    return (
        f"The artifact is predicted larger than the source: {artifact / 1e6:,.1f} MB against {source / 1e6:,.1f} MB. "
        "Fewer bits, or passes for the layers that none touches, would make it smaller.",
    )


def _warnings(layers: tuple[PlannedLayer, ...], resolution: Resolution, passes: Sequence[Pass]) -> tuple[str, ...]:
    found = [
        f"{name} no longer shares its weight: a pass names it alone, which stores it twice."
        for name in resolution.untied
    ]
    whole = sum(row.stored_bytes for row in layers) or 1
    left = [row for row in layers if not row.passes and row.kind != str(LayerKind.EXPERT)]
    share = sum(row.stored_bytes for row in left) / whole
    by_layers = all(item.chooses() for item in passes)  # else the model gets smaller without any layer's pass
    if share > 0.25 and by_layers and not any(row.kernel == "no" for row in layers):  # of which no bytes are known
        more = " and others" if len(left) > 1 else ""
        found.append(
            f"{len(left)} layer(s) that no pass touches take {share:.0%} of the artifact: {left[0].layer}{more}"
        )
    return tuple(found)
