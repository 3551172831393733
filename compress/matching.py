"""Which pass touches which layer: patterns, counts, order checks, and tied weights that part."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from compress.errors import UsageError, nearest
from compress.layer import LayerKind, LayerSpec
from compress.layerpass import LayerPass
from compress.skeleton import Structure

KINDS = ("embedding", "expert", "head", "linear")


@dataclass(frozen=True)
class Resolution:
    """The pipeline laid over a model.

    structure: the model's, with tied weights parted where a pass names one user alone; passes: per layer, in order,
    (index in the pipeline, the pass with its overrides); matches: per pass, pattern → layers; skipped: per pass,
    layer → reason; untied: layers that got a weight of their own.
    """

    structure: Structure
    passes: dict[str, tuple[tuple[int, LayerPass], ...]]
    matches: tuple[dict[str, int], ...]
    skipped: tuple[dict[str, str], ...]
    untied: tuple[str, ...]


def matches(pattern: str, user: str, kind: str) -> bool:
    """Whether a pattern names a module. Raises: UsageError for a bad expression or kind."""
    if pattern.startswith("kind:"):
        wanted = pattern.removeprefix("kind:")
        if wanted not in KINDS:
            raise UsageError(f"Unknown layer kind in '{pattern}'.{nearest(wanted, KINDS)}")
        return kind == wanted
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern.removeprefix("re:"), user) is not None
        except re.error as error:
            raise UsageError(f"'{pattern}' is not a regular expression: {error}.") from error
    return fnmatchcase(user, pattern)


def resolve(passes: Sequence[LayerPass], structure: Structure) -> Resolution:
    """Lay passes over a structure. Raises: UsageError for a pattern that matches nothing, or a part filled twice."""
    structure, untied = _part_ties(passes, structure)
    assigned: dict[str, list[tuple[int, LayerPass]]] = {name: [] for name in structure.layers}
    counts, skipped = [], []
    for index, item in enumerate(passes):
        chosen, left_out, count = _select(item, structure)
        for name in chosen:
            _check_part(item, assigned[name], name)
            assigned[name].append((index, _with_overrides(item, structure.layers[name], structure)))
        counts.append(count)
        skipped.append(left_out)
    done = {name: tuple(items) for name, items in assigned.items()}
    return Resolution(structure, done, tuple(counts), tuple(skipped), untied)


def _hits(pattern: str, structure: Structure) -> dict[str, set[str]]:
    """Layer → its users that a pattern names."""
    hits: dict[str, set[str]] = {}
    for name, spec in structure.layers.items():
        users = {user for user in spec.users if matches(pattern, user, structure.user_kind(spec, user))}
        if users:
            hits[name] = users
    return hits


def _require(pattern: str, hits: dict[str, set[str]], item: LayerPass, where: str, structure: Structure) -> None:
    if hits:
        return
    names = [user for spec in structure.layers.values() for user in spec.users]
    raise UsageError(
        f"{item.name}: the pattern '{pattern}' in {where} matches no layer of the model. Layers are named like "
        f"'{names[len(names) // 2]}'; `compress plan` lists them all. "
        f"{nearest(pattern.replace('*', ''), names).split(' Allowed')[0].strip()}".strip()
    )


def _part_ties(passes: Sequence[LayerPass], structure: Structure) -> tuple[Structure, tuple[str, ...]]:
    """Give users of a tied weight that a pass names alone a layer of their own."""
    parted: dict[str, set[str]] = {}
    for item in passes:
        named: dict[str, set[str]] = {}
        for pattern in item.targets:
            for name, users in _hits(pattern, structure).items():
                named.setdefault(name, set()).update(users)
        for name, users in named.items():
            if users != set(structure.layers[name].users):
                # the first user keeps the stored weight; whoever is apart from it gets a copy
                others = set(structure.layers[name].users) - {name}
                parted.setdefault(name, set()).update(users - {name} if users - {name} else others)
    if not parted:
        return structure, ()
    layers: dict[str, LayerSpec] = {}
    for name, spec in structure.layers.items():
        apart = [user for user in spec.users if user in parted.get(name, ())]
        layers[name] = replace(spec, users=tuple(user for user in spec.users if user not in apart))
        for user in apart:
            layers[user] = replace(spec, name=user, kind=LayerKind.LINEAR, users=(user,))
    return replace(structure, layers=layers), tuple(user for users in parted.values() for user in sorted(users))


def _select(item: LayerPass, structure: Structure) -> tuple[list[str], dict[str, str], dict[str, int]]:
    counts: dict[str, int] = {}
    chosen = set(_default_targets(structure)) if not item.targets else set()
    for pattern in item.targets:
        hits = _hits(pattern, structure)
        _require(pattern, hits, item, "targets", structure)
        counts[pattern] = len(hits)
        chosen |= set(hits)
    for pattern in item.ignore:
        hits = _hits(pattern, structure)
        _require(pattern, hits, item, "ignore", structure)
        counts[f"ignore {pattern}"] = len(hits)
        chosen -= set(hits)
    for pattern in item.overrides:
        hits = _hits(pattern, structure)
        _require(pattern, hits, item, "overrides", structure)
        counts[f"override {pattern}"] = len(hits)
    skipped = {
        name: _reason(item, structure.layers[name], structure) for name in structure.layers if name not in chosen
    }
    for name in sorted(chosen):
        if structure.layers[name].kind not in item.kinds:
            chosen.discard(name)
            skipped[name] = f"{item.name} does not treat {structure.layers[name].kind} layers"
    if not chosen:
        raise UsageError(f"{item}: no layer is left for this pass. First reason: {next(iter(skipped.values()))}.")
    if not item.targets:
        counts["default"] = len(chosen)
    return [name for name in structure.layers if name in chosen], skipped, counts


def _default_targets(structure: Structure) -> list[str]:
    """Every linear layer and expert inside the blocks, routers left out."""
    return [name for name, spec in structure.layers.items() if spec.segment >= 0 and not spec.routed]


def _reason(item: LayerPass, spec: LayerSpec, structure: Structure) -> str:
    if any(matches(p, user, structure.user_kind(spec, user)) for p in item.ignore for user in spec.users):
        return "named by ignore"
    if item.targets:
        return "not named by targets"
    if spec.routed:
        return "a router; only a pass that names it touches it"
    return "outside the blocks; only a pass that names it touches it"


def _with_overrides(item: LayerPass, spec: LayerSpec, structure: Structure) -> LayerPass:
    settings: dict[str, object] = {}
    for pattern, values in item.overrides.items():
        if any(matches(pattern, user, structure.user_kind(spec, user)) for user in spec.users):
            settings |= values
    return item.with_settings(settings)


def _check_part(item: LayerPass, before: list[tuple[int, LayerPass]], name: str) -> None:
    for _, other in before:
        if other.part == item.part:
            raise UsageError(
                f"{item.name} and {other.name} both set the {item.part} of layer {name}. Give them disjoint targets."
            )
