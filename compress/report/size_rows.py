"""Where the bytes of the artifact are: by part of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compress.records import PlannedLayer, Report
from compress.report import format as fmt
from compress.report.detail_rows import pattern
from compress.report.format import clean
from compress.report.table import Table, capped

MAX_PARTS = 8
_REST = "all else"


@dataclass(frozen=True)
class Part:
    """Layers of one kind, with the bytes that they are stored in."""

    name: str
    layers: int
    weights: int
    stored: int
    format: str


def parts_of(report: Report) -> tuple[Part, ...]:
    """Kinds of layers by their size, the largest first; the small ones together, then what is no layer."""
    planned = report.plan.layers if report.plan else ()
    groups: dict[str, list[PlannedLayer]] = {}
    for layer in planned:
        groups.setdefault(pattern(layer.layer), []).append(layer)
    found = sorted((_part(kind, group) for kind, group in groups.items()), key=lambda part: -part.stored)
    if sum(part.stored for part in found) <= 0:
        return ()
    if len(found) > MAX_PARTS:
        small = found[MAX_PARTS - 1 :]
        found = [*found[: MAX_PARTS - 1], _together(small)]
    rest = report.artifact_bytes - sum(part.stored for part in found)
    return (*found, Part(_REST, 0, 0, rest, "")) if rest > 0 else tuple(found)


def size_table(report: Report) -> Table:
    """A row per part."""
    parts = parts_of(report)
    total = sum(part.stored for part in parts)
    rows, notes = capped(
        (
            (
                part.name,
                str(part.layers) if part.layers else "-",
                _millions(part.weights),
                part.format or "-",
                f"{fmt.short(8 * part.stored / part.weights)}" if part.weights else "-",
                fmt.size(part.stored),
                fmt.percent(part.stored / total),
            )
            for part in parts
        ),
        (
            "Layers as the plan counts them, scales and zero points included; the whole as it lies on disk. All else: "
            "norms, graph, tokenizer, settings.",
        ),
    )
    columns = ("part", "layers", "weights", "format", "bits per weight", "bytes", "share")
    return Table("parts", "Where the bytes are", columns, "lrrlrrr", rows, notes=notes, group="Layers")


def _part(kind: str, group: Sequence[PlannedLayer]) -> Part:
    name = group[0].layer if len(group) == 1 else kind
    formats = list(dict.fromkeys(layer.format for layer in group))
    weights = sum(math.prod(layer.shape) for layer in group)
    return Part(
        clean(name), len(group), weights, sum(layer.stored_bytes for layer in group), fmt.listing(formats, limit=2)
    )


def _together(parts: Sequence[Part]) -> Part:
    return Part(
        f"{fmt.count(len(parts), 'smaller kind')} of layers",
        sum(part.layers for part in parts),
        sum(part.weights for part in parts),
        sum(part.stored for part in parts),
        "",
    )


def _millions(weights: int) -> str:
    if not weights:
        return "-"
    for limit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if weights >= limit:
            return f"{fmt.short(weights / limit)}{name}"
    return str(weights)
