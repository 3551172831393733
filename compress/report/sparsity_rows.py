"""What became zero, as measured on the final weights."""

from __future__ import annotations

from collections.abc import Sequence

from compress.records import Report
from compress.records.sparsity import LayerSparsity, Sparsity
from compress.report import format as fmt
from compress.report.detail_rows import pattern
from compress.report.format import clean
from compress.report.table import Table, capped

NOT_SPEED = (
    "A mask alone is size only at best: zeros make files smaller where they are stored as a mask and values, and "
    "nothing faster unless the runtime skips them. Speed is what was measured, and nothing else."
)


def sparsity_table(report: Report) -> Table:
    """A row per kind of layer and pattern, and one for the whole model; no rows where nothing was pruned."""
    found = report.sparsity
    columns = ("layer", "count", "pattern", "asked", "zero", "smallest", "largest", "pattern met")
    if found is None:
        return Table("sparsity", "Sparsity", columns, "lrlrrrrl", (), empty="", group="Layers")
    groups: dict[tuple[str, str, float | None], list[LayerSparsity]] = {}
    for layer in found.layers:
        groups.setdefault((pattern(layer.layer), layer.pattern, layer.asked), []).append(layer)
    rows, notes = capped(
        (*(_row(group) for group in groups.values()), _pruned(found), _whole(found)),
        ("Shares of zeros are counted in the final weights; what rounding made zero counts too.", NOT_SPEED),
    )
    return Table("sparsity", "Sparsity", columns, "lrlrrrrl", rows, notes=notes, group="Layers")


def sparsity_note(report: Report) -> tuple[str, ...]:
    """A sentence for the first table."""
    found = report.sparsity
    if found is None:
        return ()
    pruned, whole = fmt.percent(found.zeros / found.pruned_weights), fmt.percent(found.zeros / found.weights)
    broken = any(layer.met is False for layer in found.layers)
    told = " The final weights do NOT have the pattern asked for." if broken else ""
    return (
        f"{pruned} of the weights of {fmt.count(len(found.layers), 'pruned layer')} are zero, {whole} of the model's;"
        f" a mask alone is size only at best.{told}",
    )


def _row(group: Sequence[LayerSparsity]) -> tuple[str, ...]:
    first, shares = group[0], [layer.zeros / layer.weights for layer in group]
    name = first.layer if len(group) == 1 else pattern(first.layer)
    asked = "-" if first.asked is None else fmt.percent(first.asked)
    total = sum(layer.zeros for layer in group) / sum(layer.weights for layer in group)
    ends = fmt.percent(min(shares)), fmt.percent(max(shares))
    return clean(name), str(len(group)), clean(first.pattern) or "-", asked, fmt.percent(total), *ends, _met(group)


def _met(group: Sequence[LayerSparsity]) -> str:
    known = [layer for layer in group if layer.met is not None]
    missed = [layer for layer in known if not layer.met]
    if not known:
        return "-"
    return "yes" if not missed else f"NO: {len(missed)} of {len(known)}, {clean(missed[0].layer)} first"


def _pruned(found: Sparsity) -> tuple[str, ...]:
    share = fmt.percent(found.zeros / found.pruned_weights)
    return "all pruned layers", str(len(found.layers)), "-", "-", share, "-", "-", _met(found.layers)


def _whole(found: Sparsity) -> tuple[str, ...]:
    return "whole model, zeros of pruned layers", "-", "-", "-", fmt.percent(found.zeros / found.weights), "-", "-", "-"
