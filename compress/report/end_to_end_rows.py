"""The tables of whole requests (spans, both speed-ups, the ceiling) and of energy."""

from __future__ import annotations

from compress.records import Speed
from compress.records.speed import END_TO_END, ENERGY, EndToEnd
from compress.report import format as fmt
from compress.report.format import NOT_MEASURED, clean
from compress.report.table import Row, Table

_COLUMNS = ("part of a request", "baseline", "variant", "speed-up")


def end_to_end_table(speed: Speed) -> Table:
    """One row per span, the whole, and what the whole would gain by a model that takes no time."""
    found = speed.end_to_end
    if found is not None:
        rows = _rows(found)
        notes = (f"One request: {clean(found.what)}. Medians of {found.rounds} rounds.", *_notes(found))
    elif END_TO_END in speed.unavailable:
        rows = (("whole request", NOT_MEASURED, NOT_MEASURED, NOT_MEASURED),)
        notes = (clean(f"Not measured: {speed.unavailable[END_TO_END]}", limit=600),)
    else:
        rows, notes = (), ()
    return Table("end-to-end", "End to end", _COLUMNS, "lrrr", rows, notes=notes)


def energy_table(speed: Speed) -> Table:
    """Joules of both arms, and what was counted."""
    found = speed.energy
    if found is not None:
        cells = (
            fmt.significant(found.baseline_j),
            fmt.significant(found.variant_j),
            fmt.speedup_text(found.saving, found.interval),
        )
        rows: tuple[Row, ...] = ((clean(found.setting), *cells, found.verdict),)
        notes: tuple[str, ...] = (
            f"Joules per {clean(found.unit)} by {clean(found.counter)}: {found.rounds} rounds of blocks of "
            f"{found.block_s:g} s or more; noise floor {fmt.speedup(1.0, found.control)[1]}. The counter counts all "
            "that runs there, other programs too.",
        )
    elif ENERGY in speed.unavailable:
        rows, notes = (), (clean(f"Unavailable: {speed.unavailable[ENERGY]}", limit=600),)
    else:
        rows, notes = (), ()
    columns = ("setting", "baseline J", "variant J", "baseline / variant", "verdict")
    return Table("energy", "Energy", columns, "lrrrl", rows, notes=notes)


def _rows(found: EndToEnd) -> tuple[Row, ...]:
    spans = tuple(
        (
            clean(span.what),
            fmt.duration(span.baseline_s),
            fmt.duration(span.variant_s),
            fmt.speedup_text(found.compute_speedup, found.compute_interval) if span.name == "compute" else "-",
        )
        for span in found.spans
    )
    whole = (
        fmt.duration(found.baseline_s),
        fmt.duration(found.variant_s),
        fmt.speedup_text(found.speedup, found.interval),
    )
    return (
        *spans,
        ("whole request", *whole),
        ("ceiling", "-", "-", fmt.speedup_text(found.ceiling, found.ceiling_interval)),
    )


def _notes(found: EndToEnd) -> tuple[str, ...]:
    floor = fmt.speedup(1.0, found.control)[1]
    return (
        f"The whole request is {found.verdict}; noise floor {floor}. Ceiling: its speed-up if the model took no time "
        "at all.",
        *(clean(text, limit=600) for text in found.warnings),
    )
