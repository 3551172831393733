"""Which pass touches which layer: patterns, counts, order checks, and tied weights that part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import regex  # with a time limit, which re has not

from compress.engine.layerpass import LayerPass, Pass
from compress.engine.part import WORDS, Part
from compress.engine.zeros import check_kept
from compress.errors import UsageError, nearest
from compress.layer import LayerKind, LayerSpec
from compress.models.skeleton import Structure

KINDS = ("conv", "embedding", "expert", "head", "linear")
LONGEST_S = 1.0
"""Of comparing one name with a `re:` pattern."""
MOST_REPEATS = 10_000
"""That the counts in a pattern may multiply to: the library writes them all out before its time limit begins."""


@dataclass(frozen=True)
class Resolution:
    """The pipeline laid over a model.

    structure: the model's, with tied weights parted where a pass treats users unlike; passes: per layer, in order,
    (index in the pipeline, the pass with its overrides); matches: per pass laid, pattern → layers; skipped: per pass
    laid, layer → reason; untied: layers that got a weight of their own.
    """

    structure: Structure
    passes: dict[str, tuple[tuple[int, Pass], ...]]
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
        return _fits(pattern, user)
    return fnmatchcase(user, pattern)


@cache
def _expression(pattern: str) -> Any:
    """A `re:` pattern, compiled. Raises: UsageError for a bad one, or one that would take too long to compile."""
    counts = regex.findall(r"[{,](\d+)(?=[,}])", pattern)
    if math.prod(max(1, int(count)) if len(count) < 6 else MOST_REPEATS + 1 for count in counts) > MOST_REPEATS:
        raise UsageError(f"'{pattern}' repeats its parts more than {MOST_REPEATS} times. Give smaller counts.")
    try:
        return regex.compile(pattern.removeprefix("re:"))
    except regex.error as error:
        raise UsageError(f"'{pattern}' is not a regular expression: {error}.") from error


def _fits(pattern: str, user: str) -> bool:
    try:
        return _expression(pattern).fullmatch(user, timeout=LONGEST_S) is not None
    except TimeoutError as error:
        raise UsageError(
            f"'{pattern}' takes too long to compare with '{user}' (over {LONGEST_S:g} s). Repeat no group that repeats."
        ) from error


def resolve(passes: Sequence[Pass], structure: Structure, places: range | None = None) -> Resolution:
    """Lay passes over a structure. One that changes the shape of the model, or is about the cache, chooses no layers.

    Args: places: of those that meet it; all by default. Raises: UsageError for a pattern that matches nothing, or a
    part filled twice.
    """
    places = range(len(passes)) if places is None else places
    structure, untied = _part_ties([passes[place] for place in places if passes[place].chooses()], structure)
    assigned: dict[str, list[tuple[int, Pass]]] = {name: [] for name in structure.layers}
    counts, skipped = [], []
    for index in places:
        item = passes[index]
        chosen, left_out, count = _select(item, structure) if item.chooses() else ([], {}, {})
        for name in chosen:
            later = passes[index + 1 : places.stop]
            _check_part(item, assigned[name], name, _later(later, structure.layers[name], structure))
            one = _with_overrides(item, structure.layers[name], name, structure)
            check_kept(one, (other for _, other in assigned[name]), name)
            assigned[name].append((index, one))
        if item.rescales:
            _check_reach(item, chosen, assigned, structure)
        _settle(item, chosen, assigned, structure)
        counts.append(count)
        skipped.append(left_out)
    done = {name: tuple(items) for name, items in assigned.items()}
    return Resolution(structure, done, tuple(counts), tuple(skipped), untied)


def _settle(
    item: Pass, chosen: Sequence[str], assigned: Mapping[str, list[tuple[int, Pass]]], structure: Structure
) -> None:
    """Let a pass settle what depends on which layers of a segment it treats together (`Pass.settle`)."""
    segments: dict[int, dict[str, tuple[Pass, LayerSpec]]] = {}
    for name in chosen:
        spec = structure.layers[name]
        segments.setdefault(spec.segment, {})[name] = (assigned[name][-1][1], spec)
    for together in segments.values():
        for name, settled in item.settle(together).items():
            assigned[name][-1] = (assigned[name][-1][0], settled)


def _hits(pattern: str, structure: Structure) -> dict[str, set[str]]:
    """Layer → its users that a pattern names."""
    hits: dict[str, set[str]] = {}
    for name, spec in structure.layers.items():
        users = {user for user in spec.users if matches(pattern, user, structure.user_kind(spec, user))}
        if users:
            hits[name] = users
    return hits


def _require(pattern: str, hits: dict[str, set[str]], item: Pass, where: str, structure: Structure) -> None:
    if hits:
        return
    if pattern.startswith("kind:"):
        raise UsageError(_no_such_kind(pattern, item, where, structure))
    names = [user for spec in structure.layers.values() for user in spec.users]
    raise UsageError(
        f"{item.name}: the pattern '{pattern}' in {where} matches no layer of the model. Layers are named like "
        f"'{names[len(names) // 2]}'; `compress plan` lists them all. "
        f"{nearest(pattern.replace('*', ''), names).split(' Allowed')[0].strip()}".strip()
    )


def _no_such_kind(pattern: str, item: Pass, where: str, structure: Structure) -> str:
    kinds = {structure.user_kind(spec, user) for spec in structure.layers.values() for user in spec.users}
    told = (
        f"{item.name}: '{pattern}' in {where} matches no layer: the model has {', '.join(sorted(kinds))} layers only."
    )
    if pattern not in ("kind:embedding", "kind:head"):
        return told
    return (
        f"{told} Recipes for language models name embeddings and heads. For an ONNX file or an image model take passes "
        "that name none, such as --recipe encoder-int8 or --passes 'rtn(format=int8(channel)), act_quant'."
    )


def _part_ties(passes: Sequence[Pass], structure: Structure) -> tuple[Structure, tuple[str, ...]]:
    """Give users of a tied weight that a pass treats unlike its first user a layer of their own."""
    layers: dict[str, LayerSpec] = {}
    untied: list[str] = []
    for name, spec in structure.layers.items():
        first, *apart = _alike(passes, spec, structure)  # the first user's group keeps the stored weight
        layers[name] = replace(spec, users=first)
        for users in apart:
            layers[users[0]] = replace(spec, name=users[0], kind=LayerKind.LINEAR, users=users)
            untied.append(users[0])
    return (replace(structure, layers=layers), tuple(untied)) if untied else (structure, ())


def _alike(passes: Sequence[Pass], spec: LayerSpec, structure: Structure) -> list[tuple[str, ...]]:
    """The users of a layer in groups that every pass treats alike, the first user's group first."""
    if len(spec.users) == 1 or any(item.whole for item in passes):
        return [(user,) for user in spec.users]
    treatments = [_treatments(item, spec, structure) for item in passes]
    groups: dict[tuple[str, ...], list[str]] = {}
    for user in spec.users:
        groups.setdefault(tuple(texts[user] for texts in treatments), []).append(user)
    return [tuple(users) for users in groups.values()]


def _treatments(item: Pass, spec: LayerSpec, structure: Structure) -> dict[str, str]:
    """User → the pass with this user's overrides as text, empty where it leaves the user alone."""
    chosen = {user: _chooses(item, spec, user, structure) for user in spec.users}
    if item.keeps_ties:
        return dict.fromkeys(spec.users, str(item) if any(chosen.values()) else "")
    texts = {user: str(_with_overrides(item, spec, user, structure)) if chosen[user] else "" for user in spec.users}
    # GPTQ on an embedding: the stored weight stays as it is, and so do the users that are not singled out
    untreated = texts[spec.name] if spec.kind not in item.kinds else ""
    return {user: "" if text == untreated else text for user, text in texts.items()}


def _chooses(item: Pass, spec: LayerSpec, user: str, structure: Structure) -> bool:
    """Whether targets or the default name this user, and ignore does not."""
    is_target = _names(item.targets, spec, user, structure) if item.targets else item.whole or _is_default(spec)
    return is_target and not _names(item.ignore, spec, user, structure)


def _names(patterns: Iterable[str], spec: LayerSpec, user: str, structure: Structure) -> bool:
    return any(matches(pattern, user, structure.user_kind(spec, user)) for pattern in patterns)


def _select(item: Pass, structure: Structure) -> tuple[list[str], dict[str, str], dict[str, int]]:
    counts: dict[str, int] = {}
    for where, patterns in (("targets", item.targets), ("ignore", item.ignore)):
        for pattern in patterns:
            hits = _hits(pattern, structure)
            _require(pattern, hits, item, where, structure)
            counts[pattern if where == "targets" else f"ignore {pattern}"] = len(hits)
    chosen: list[str] = []
    skipped: dict[str, str] = {}
    for name, spec in structure.layers.items():
        if not any(_chooses(item, spec, user, structure) for user in spec.users):
            skipped[name] = _reason(item, spec, structure)
        elif spec.kind not in item.kinds:
            skipped[name] = f"{item.name} does not treat {spec.kind} layers"
        elif item.inside and spec.segment < 0:
            skipped[name] = f"outside the blocks, inside which alone {item.name} works"
        else:
            chosen.append(name)
    if not chosen:
        raise UsageError(f"{item}: no layer is left for this pass. First reason: {next(iter(skipped.values()))}.")
    for pattern in item.overrides:
        counts[f"override {pattern}"] = _count_override(pattern, chosen, item, structure)
    if not item.targets:
        counts["default"] = len(chosen)
    return chosen, skipped, counts


def _count_override(pattern: str, chosen: list[str], item: Pass, structure: Structure) -> int:
    """Chosen layers that an override names. Raises: UsageError for none, since it would do nothing."""
    hits = _hits(pattern, structure)
    _require(pattern, hits, item, "overrides", structure)
    if not hits.keys() & set(chosen):
        raise UsageError(
            f"{item.name}: the pattern '{pattern}' in overrides names only layers that this pass leaves alone, such as "
            f"'{next(iter(hits))}'. Name them in targets, or change the pattern."
        )
    return len(hits.keys() & set(chosen))


def _is_default(spec: LayerSpec) -> bool:
    """Every linear layer, convolution and expert inside the blocks, routers left out."""
    return spec.segment >= 0 and not spec.routed


def _reason(item: Pass, spec: LayerSpec, structure: Structure) -> str:
    if any(_names(item.ignore, spec, user, structure) for user in spec.users):
        return "named by ignore"
    if item.targets:
        return "not named by targets"
    if spec.routed:
        return "a router; only a pass that names it touches it"
    return "outside the blocks; only a pass that names it touches it"


def _with_overrides(item: Pass, spec: LayerSpec, user: str, structure: Structure) -> Pass:
    """The pass for one user; of two overrides that name it, the later one counts."""
    found = item.with_settings({})
    for pattern, values in item.overrides.items():
        if _names((pattern,), spec, user, structure):
            found = found.with_settings(values)
    return found


def _later(passes: Sequence[Pass], spec: LayerSpec, structure: Structure) -> list[Pass]:
    """Those of the passes that treat a layer."""
    return [
        item
        for item in passes
        if spec.kind in item.kinds and any(_chooses(item, spec, user, structure) for user in spec.users)
    ]


def _check_part(item: Pass, before: list[tuple[int, Pass]], name: str, later: Sequence[Pass]) -> None:
    lacking = item.after.difference(*(other.fills() for _, other in before))
    if lacking:
        found = next((other for other in later if lacking & other.fills()), None)
        told = "there is none. Add one before it, or leave the layer out with ignore."
        if found is not None:
            told = f"{found.name} stands after it. Change the order of the passes."
        raise UsageError(f"{item.name} must come after a pass that sets the {_word(lacking)} of layer {name}; {told}")
    renewed = max((place for place, other in before if other.renews), default=-1)
    for place, other in before:
        early, twice = other.fills() & item.precedes(), other.fills() & item.fills()
        twice -= {Part.VALUES} if place < renewed else set()
        if early:
            raise UsageError(
                f"{item.name} must come before {other.name}, which sets the {_word(early)} of layer {name}. "
                "Change the order of the passes."
            )
        if twice:
            raise UsageError(
                f"{item.name} and {other.name} both set the {_word(twice)} of layer {name}. Give them disjoint targets."
            )


def _check_reach(
    item: Pass, chosen: Iterable[str], before: dict[str, list[tuple[int, Pass]]], structure: Structure
) -> None:
    """Raises: UsageError where rescaling would change values that a pass has set in a layer beside the chosen ones:
    what one layer puts out is scaled along with what reads it."""
    if isinstance(item, LayerPass):  # which changes its own layers alone
        return
    segments = {structure.layers[name].segment for name in chosen}
    for name, spec in structure.layers.items():
        setter = next((other for _, other in before[name] if Part.VALUES in other.fills()), None)
        if setter is not None and spec.segment in segments:
            raise UsageError(
                f"{item.name} must come before {setter.name}, which sets the {WORDS[Part.VALUES]} of layer {name}: "
                f"{item.name} rescales the layers beside it, and may rescale it with them. Change the order of the "
                "passes."
            )


def _word(parts: Iterable[Part]) -> str:
    first = min(parts)
    return WORDS.get(first, first)
