"""Which layers lost most: the error of every layer, blocks down and kinds of layers across."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from compress.records import LayerResult, PassResult
from compress.report import format as fmt
from compress.report.detail_rows import INDEX, pattern
from compress.report.format import clean
from compress.report.table import Table

LEVELS = 7
MAX_ROWS, MAX_COLUMNS = 100, 14
MOST_NAMED = 3
_NONE = "-"
_EXPERT = re.compile(r"\bexperts?\.\d+(?=\.|$)")  # one of many alike: the worst of them stands for all


@dataclass(frozen=True)
class Cell:
    """A layer, or the worst of those that share a place. level: 0 (least error) to 6; None: no error is known."""

    layer: str
    error: float | None
    bits: float | None
    level: int | None
    format: str
    count: int


@dataclass(frozen=True)
class Heat:
    """rows: of blocks, by their numbers; cells[row][column], None where a block has no such layer.

    worst: the layers of largest error, the largest first; bounds: error at which each level but the first begins.
    """

    measure: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[Cell | None, ...], ...]
    worst: tuple[Cell, ...]
    bounds: tuple[float, ...]
    notes: tuple[str, ...]


def heat_of(passes: Sequence[PassResult]) -> Heat | None:
    """None where fewer than two blocks have a layer with an error."""
    layers = last_results(passes)
    measure = _measure(layers)
    places: dict[tuple[tuple[int, ...], str], list[LayerResult]] = {}
    for layer in layers:
        block, kind = _place(layer.layer)
        if block and error_of(layer, measure) is not None:
            places.setdefault((block, kind), []).append(layer)
    blocks = sorted({block for block, _ in places})
    if len(blocks) < 2:
        return None
    kinds, notes = _columns(places, measure)
    groups, told = _row_groups(blocks)
    scale = _bounds([error_of(layer, measure) for found in places.values() for layer in found])
    cells = tuple(tuple(_cell(_at(places, group, kind), measure, scale) for kind in kinds) for group in groups)
    found = [cell for row in cells for cell in row if cell]
    return Heat(
        measure=measure,
        rows=tuple(_row_name(group) for group in groups),
        columns=_short(kinds),
        cells=cells,
        worst=tuple(sorted(found, key=lambda cell: cell.error or 0.0, reverse=True)[:MOST_NAMED]),
        bounds=scale,
        notes=(*told, *notes),
    )


def heat_table(heat: Heat | None) -> Table:
    """The error of every cell, with the bits where a column has several."""
    if heat is None:
        return Table("heat", "Error by layer", (), "", ())
    shared = [_shared_bits(cells) for cells in zip(*heat.cells, strict=True)]
    headers = zip(heat.columns, shared, strict=True)
    named = (f"{name} ({fmt.short(bits)} bits)" if bits else name for name, bits in headers)
    rows = tuple(
        (name, *(_text(cell, bits is None) for cell, bits in zip(cells, shared, strict=True)))
        for name, cells in zip(heat.rows, heat.cells, strict=True)
    )
    levels = tuple(tuple(cell.level if cell else None for cell in cells) for cells in heat.cells)
    columns = ("block", *named)
    what = {
        "output error": "Relative squared error of what a layer puts out, on the calibration data.",
        "weight error": "Relative squared error of a layer's weight; the output error was not taken.",
    }
    worst = ", ".join(f"{clean(cell.layer)} ({fmt.significant(cell.error or 0.0)})" for cell in heat.worst)
    notes = (f"{what[heat.measure]} Largest: {worst}.", *heat.notes)
    return Table(
        "heat", f"{heat.measure.capitalize()} by layer", columns, "r" * len(columns), rows,
        notes=notes, group="Layers", levels=levels, folded=True,
    )  # fmt: skip


def last_results(passes: Sequence[PassResult]) -> list[LayerResult]:
    """Each changed layer as the last pass that says an error left it."""
    found: dict[str, LayerResult] = {}
    for result in passes:
        for layer in result.layers:
            if layer.changed and (layer.output_error is not None or layer.error_after is not None):
                found[layer.layer] = layer
    return list(found.values())


def error_of(layer: LayerResult, measure: str) -> float | None:
    """A finite figure, or None."""
    found = layer.output_error if measure == "output error" else layer.error_after
    return found if found is not None and math.isfinite(found) else None


def _at(
    places: dict[tuple[tuple[int, ...], str], list[LayerResult]], group: Sequence[tuple[int, ...]], kind: str
) -> list[LayerResult]:
    return [layer for block in group for layer in places.get((block, kind), ())]


def _measure(layers: Sequence[LayerResult]) -> str:
    known = sum(layer.output_error is not None for layer in layers)
    return "output error" if 2 * known >= len(layers) else "weight error"


def _place(name: str) -> tuple[tuple[int, ...], str]:
    """Numbers of the block, and the name without them: `(12,)`, `model.layers.*.mlp.up_proj`."""
    plain = _EXPERT.sub(lambda hit: hit[0].partition(".")[0], name)
    return tuple(int(number) for number in INDEX.findall(plain)), pattern(plain)


def _columns(
    places: dict[tuple[tuple[int, ...], str], list[LayerResult]], measure: str
) -> tuple[list[str], tuple[str, ...]]:
    """Kinds in the order of the model; the worst ones where there are too many."""
    kinds = list(dict.fromkeys(kind for _, kind in places))
    if len(kinds) <= MAX_COLUMNS:
        return kinds, ()
    worst = dict.fromkeys(kinds, 0.0)
    for (_, kind), layers in places.items():
        worst[kind] = max(worst[kind], *(error_of(layer, measure) or 0.0 for layer in layers))
    kept = set(sorted(kinds, key=lambda kind: worst[kind], reverse=True)[:MAX_COLUMNS])
    note = f"{len(kinds) - MAX_COLUMNS} kinds of layers with smaller errors are left out; report.json has them."
    return [kind for kind in kinds if kind in kept], (note,)


def _row_groups(blocks: list[tuple[int, ...]]) -> tuple[list[list[tuple[int, ...]]], tuple[str, ...]]:
    """A block per row, or so many neighbours that no more than `MAX_ROWS` rows are left: the worst is shown."""
    size = -(-len(blocks) // MAX_ROWS)
    groups = [blocks[start : start + size] for start in range(0, len(blocks), size)]
    note = f"Each row stands for {size} neighbouring blocks and shows the worst of them; report.json has them all."
    return groups, (note,) if size > 1 else ()


def _row_name(group: Sequence[tuple[int, ...]]) -> str:
    ends = [".".join(map(str, block)) for block in dict.fromkeys((group[0], group[-1]))]
    return " to ".join(ends)


def _short(kinds: Sequence[str]) -> tuple[str, ...]:
    """Their last parts, as many as tell them apart."""
    parts = [[part for part in kind.split(".") if part != "*"] or ["layer"] for kind in kinds]
    for length in range(1, max(map(len, parts)) + 1):
        names = [".".join(found[-length:]) for found in parts]
        if len(set(names)) == len(names):
            return tuple(clean(name, limit=40) for name in names)
    return tuple(clean(kind, limit=60) for kind in kinds)


def _bounds(errors: Iterable[float | None]) -> tuple[float, ...]:
    """Levels of equal width on a log scale between the smallest and the largest error above zero."""
    known = [error for error in errors if error is not None and error > 0]
    if not known or min(known) == max(known):
        return ()
    low, high = math.log(max(min(known), max(known) * 1e-6)), math.log(max(known))
    return tuple(math.exp(low + (high - low) * step / LEVELS) for step in range(1, LEVELS))


def _cell(layers: Sequence[LayerResult], measure: str, bounds: Sequence[float]) -> Cell | None:
    if not layers:
        return None
    worst = max(layers, key=lambda layer: error_of(layer, measure) or 0.0)
    error = error_of(worst, measure)
    level = None if error is None else sum(error >= bound for bound in bounds)
    return Cell(worst.layer, error, worst.bits_per_weight, level, worst.format, len(layers))


def _shared_bits(cells: Iterable[Cell | None]) -> float | None:
    found = {None if cell.bits is None else round(cell.bits, 2) for cell in cells if cell}
    return found.pop() if len(found) == 1 else None


def _text(cell: Cell | None, with_bits: bool) -> str:
    if cell is None or cell.error is None:
        return _NONE
    bits = f" ({fmt.short(cell.bits)} bits)" if with_bits and cell.bits is not None else ""
    return f"{fmt.significant(cell.error)}{bits}"
