"""A Plan on a terminal: what a run would store, cost and touch. No figure here was measured, and every one says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compress.records import Plan, PlannedLayer
from compress.report import format as fmt
from compress.report.detail_rows import pattern, patterns
from compress.report.format import clean
from compress.report.predicted_rows import ARTIFACT_SIZE, TIME, predictions
from compress.report.table import Table, capped
from compress.report.terminal import print_line, print_table

if TYPE_CHECKING:
    from rich.console import Console

MAX_KINDS = 24  # rows of one table: a screen
_WHERE = "`compress plan --json`"
_DEFAULT = (
    "default: no targets were given, so every linear layer, convolution and expert inside the blocks but routers."
)
_NONE = "-"


def show_plan(plan: Plan, console: Console) -> None:
    """Print what a run would do: refusals first, then the costs, then layer kinds, matches and what is left alone."""
    print_line(console, f"Plan: {clean(plan.model)} for {clean(plan.profile)} (predicted, nothing has run)", "bold")
    print_line(console, clean(plan.recipe, limit=2000))
    if plan.refusals:
        print_line(console, "A run would stop here: this profile cannot store what the recipe asks for.", "bold red")
    for text in dict.fromkeys(plan.refusals):
        print_line(console, f"refused: {clean(text, limit=600)}", "bold red")
    if plan.refusals and plan.other_targets:
        print_line(console, f"would be stored with: --target {' or '.join(plan.other_targets)}", "bold")
    for text in dict.fromkeys(plan.warnings):
        print_line(console, f"warning: {clean(text, limit=600)}", "yellow")
    for text in dict.fromkeys(plan.notes):
        print_line(console, f"note: {clean(text, limit=600)}")
    for table in plan_tables(plan):
        print_table(console, table)


def plan_tables(plan: Plan) -> tuple[Table, ...]:
    """In the order of the page. What is refused has no costs."""
    costs = () if plan.refusals else (_cost_table(plan), _latency_table(plan))
    return *costs, _layer_table(plan), _match_table(plan), _untouched_table(plan)


def _cost_table(plan: Plan) -> Table:
    found = predictions(plan)
    change = fmt.times_smaller(plan.source_bytes, plan.predicted_artifact_bytes)
    if change:
        words = "the same as" if change == "the same" else f"{change} than"
        found[ARTIFACT_SIZE] += f" ({words} the source, {fmt.size(plan.source_bytes)})"
    found[TIME] += " on idle cores of this machine"
    return Table("cost", "Costs", ("quantity", "predicted"), "ll", tuple(found.items()))


def _latency_table(plan: Plan) -> Table:
    rows = tuple(
        (
            f"{one.phase} batch {one.batch} prompt {one.prompt}",
            fmt.duration(one.baseline_s),
            fmt.duration(one.variant_s),
            one.bound,
        )
        for one in plan.predicted_latency
    )
    notes = (
        "By the profile's figures of its kernels where it has them (`compress hardware calibrate`); else at best: "
        "bytes at its bandwidth, products at its dense peak, nothing else counted.",
    )
    columns = ("setting", "uncompressed", "compressed", "bound by")
    return Table(
        "latency",
        "Latency (predicted)",
        columns,
        "lrrl",
        rows,
        notes=notes if rows else (),
        empty="none for this model",
    )


def _layer_table(plan: Plan) -> Table:
    groups: dict[tuple[str, ...], list[PlannedLayer]] = {}
    whole = _ambiguous(plan.layers)
    for layer in plan.layers:
        key = (pattern(layer.layer), _passes(layer, whole), layer.format, layer.operator, layer.kernel)
        groups.setdefault(key, []).append(layer)
    total = f"{fmt.count(len(plan.layers), 'layer')}, {_stored(plan.layers)} predicted; * stands for numbers."
    made = (_layer_row(key, group) for key, group in groups.items())
    rows, notes = capped(made, (total, *_remarks(plan)), limit=MAX_KINDS, where=_WHERE)
    columns = ("layer", "count", "passes", "format", "operator", "kernel", "predicted size")
    return Table("layers", "Layers by kind", columns, "lrllllr", rows, notes=notes, empty="the model has no layers")


def _layer_row(key: tuple[str, ...], group: Sequence[PlannedLayer]) -> tuple[str, ...]:
    kind, passes, form, operator, kernel = key
    name = kind if len(group) > 1 else group[0].layer
    texts = (clean(text, limit=120) or _NONE for text in (passes, form, operator))
    return clean(name), str(len(group)), *texts, kernel, _stored(group)


def _ambiguous(layers: Sequence[PlannedLayer]) -> set[tuple[str, str]]:
    """Names of passes, with a format, that stand for more than one setting: those need their whole text."""
    found: dict[tuple[str, str], set[tuple[str, ...]]] = {}
    for layer in layers:
        found.setdefault((_names(layer), layer.format), set()).add(layer.passes)
    return {key for key, texts in found.items() if len(texts) > 1}


def _passes(layer: PlannedLayer, whole: set[tuple[str, str]]) -> str:
    return ", ".join(layer.passes) if (_names(layer), layer.format) in whole else _names(layer)


def _names(layer: PlannedLayer) -> str:
    return ", ".join(text.partition("(")[0] for text in layer.passes)


def _stored(layers: Sequence[PlannedLayer]) -> str:
    count = sum(layer.stored_bytes for layer in layers)
    return fmt.size(count) if count else _NONE


def _remarks(plan: Plan) -> tuple[str, ...]:
    """Tied weights, and what the fast kernels have to say; the plan's notes and refusals tell the others' notes."""
    tied = [(layer.layer, [user for user in layer.users if user != layer.layer]) for layer in plan.layers]
    told = [f"{name} also serves {', '.join(users)}" for name, users in tied if users]
    fast = [layer for layer in plan.layers if layer.kernel == "fast" and layer.note]
    noted = list(dict.fromkeys(f"{layer.operator}: {layer.note}" for layer in fast))
    texts = [fmt.listing(told, limit=3), *(clean(text, limit=300) for text in noted[:3])]
    return tuple(text if text.endswith(".") else f"{text}." for text in texts if text)


def _match_table(plan: Plan) -> Table:
    told = (_DEFAULT,) if any("default" in counts for counts in plan.matches.values()) else ()
    pairs = ((text, name, count) for text, counts in plan.matches.items() for name, count in counts.items())
    made = ((clean(text), clean(name), str(count)) for text, name, count in pairs)
    rows, notes = capped(made, told, limit=MAX_KINDS, where=_WHERE)
    return Table("matches", "Layers matched", ("pass", "pattern", "layers"), "llr", rows, keys=2, notes=notes)


def _untouched_table(plan: Plan) -> Table:
    groups: dict[str, list[PlannedLayer]] = {}
    for layer in plan.layers:
        if not layer.passes:
            groups.setdefault(layer.reason, []).append(layer)
    made = (
        (clean(reason) or "no reason", str(len(group)), _stored(group), fmt.listing(_kinds(group)))
        for reason, group in groups.items()
    )
    rows, notes = capped(made, limit=MAX_KINDS, where=_WHERE)
    columns = ("reason", "layers", "predicted size", "names")
    empty = "a pass touches every layer"
    return Table("untouched", "Layers left as they are", columns, "lrrl", rows, notes=notes, empty=empty)


def _kinds(layers: Sequence[PlannedLayer]) -> list[str]:
    return patterns([layer.layer for layer in layers])
