"""A Report as tables of text. Every renderer prints these, so no two pages can disagree on a figure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from compress.records import REMOVED, UNDECIDED, Gate, PassResult, Report
from compress.records.speed import LONGER
from compress.report import format as fmt
from compress.report.detail_rows import float_note, layer_tables, run_tables
from compress.report.format import clean
from compress.report.heat_rows import heat_of, heat_table
from compress.report.metric_names import metric_name
from compress.report.next_steps import UNKNOWN, argument, next_steps
from compress.report.predicted_rows import latency_table, predicted_speedup, prediction_table, ratio
from compress.report.quality_rows import quality_details, quality_evidence, quality_table
from compress.report.size_rows import size_table
from compress.report.sparsity_rows import sparsity_note, sparsity_table
from compress.report.speed_rows import footprint_table, speed_details, speed_table, speed_warnings
from compress.report.table import Block, Page, Table
from compress.report.task_rows import task_table
from compress.report.tiles import tiles_of
from compress.report.verdict import headline_timing


def build_page(report: Report, folder: Path | None = None) -> Page:
    """Everything that any page shows of this report. folder: where it lies, for the commands that name it."""
    unmet = any(not gate.met for gate in report.gates)
    disagrees = report.verification is not None and not report.verification.agrees
    main = (_main_table(report), gate_table(report.gates), speed_table(report.speed), footprint_table(report.speed))
    details = (
        *((task_table(report.tasks),) if report.tasks else ()),
        *speed_details(report.speed),
        *quality_details(report.baseline_quality, report.artifact_quality),
        sparsity_table(report),
        *layer_tables(report),
        *_grouped("The run", [prediction_table(report), latency_table(report), *run_tables(report)]),
    )
    evidence = (*quality_evidence(report.artifact_quality), size_table(report), heat_table(heat_of(report.passes)))
    return Page(
        title=clean(report.title),
        verdict=clean(report.verdict, limit=2000),
        failed=unmet or disagrees,
        facts=_facts(report),
        main=tuple(table for table in main if table.rows or table.empty),
        warnings=_warnings(report, argument(folder)),
        details=tuple(table for table in details if table.rows or table.empty),
        blocks=_blocks(report, argument(folder)),
        tiles=tiles_of(report),
        next_steps=next_steps(report, folder),
        evidence=tuple(table for table in evidence if table.rows),
    )


def gate_table(gates: Sequence[Gate]) -> Table:
    """What the recipe asked for and what was found, at the worse end of the interval."""
    rows = [
        (metric_name(gate.name), *reversed(fmt.told_apart(gate.found, gate.bound)), "met" if gate.met else "FAILED")
        for gate in gates
    ]
    columns = ("gate", "bound", "found, worse end of the interval", "result")
    return Table("gates", "Gates", columns, "lrrl", tuple(rows), empty="")


def _main_table(report: Report) -> Table:
    timing = headline_timing(report.speed)
    predicted = predicted_speedup(report.plan, timing)
    assumed = None
    if predicted is not None and report.plan is not None:
        assumed = fmt.size(report.plan.predicted_artifact_bytes), f"{fmt.significant(ratio(predicted))}x"
    arms = report.baseline_quality, report.artifact_quality, report.memory_quality
    sizes = report.source_bytes, report.artifact_bytes
    table = quality_table(*arms, sizes, timing, assumed)
    gates = () if report.gates else ("No gates were set.",)
    planned = tuple(clean(text, limit=600) for text in (*_decided(report.passes), *_still_true(report)))
    return replace(
        table, notes=(*table.notes, *_size_note(report), *sparsity_note(report), *gates, *float_note(report), *planned)
    )


TRAINED = re.compile(r"\bloss [\d.e+-]+ → ")
"""In a layer's note: of training, which is the same for all of them."""


def _decided(passes: Sequence[PassResult]) -> Iterator[str]:
    """What passes over the whole model decided, each once: the blocks that left, what training regained."""
    for done in passes:
        gone = [row for row in done.layers if row.format == REMOVED]
        yield from (f"{row.layer} left: {'; '.join(row.notes)}" for row in gone)
        notes = dict.fromkeys(note for row in done.layers for note in row.notes)
        yield from (f"{done.pass_text}: {note}" for note in notes if not gone and TRAINED.search(note))


def _still_true(report: Report) -> Iterator[str]:
    """Notes of the plan, but for what was not decided then."""
    for note in report.plan.notes if report.plan else ():
        if UNDECIDED not in note:
            yield note


def _size_note(report: Report) -> tuple[str, ...]:
    """Where the source's files and the exported baseline, from which the footprint counts, take another room."""
    exported = report.speed.baseline.disk_bytes if report.speed else 0
    if exported <= 0 or fmt.size(exported) == fmt.size(report.source_bytes):
        return ()
    return (
        f"Size counts from the source's own files, {fmt.size(report.source_bytes)}; exported for the runtime without "
        f"compression the model takes {fmt.size(exported)}, from which the footprint below counts.",
    )


def _grouped(name: str, tables: Iterable[Table]) -> list[Table]:
    return [replace(table, group=name) for table in tables]


def _facts(report: Report) -> tuple[tuple[str, str], ...]:
    facts = (
        ("source", report.source),
        ("recipe", report.recipe if len(report.recipe.splitlines()) == 1 else ""),
        ("profile", report.profile),
        ("target", report.target),
        ("created", report.created),
    )
    return tuple((name, clean(value, limit=120)) for name, value in facts if value.strip())


def _warnings(report: Report, out: str) -> tuple[str, ...]:
    planned = (*report.plan.warnings, *report.plan.refusals) if report.plan else ()
    texts = [text for text in report.warnings if text not in planned]
    texts += [*speed_warnings(report.speed), *(f"plan: {text}" for text in planned)]
    shown = [clean(text, limit=600).replace(LONGER, LONGER.replace(UNKNOWN, out)) for text in dict.fromkeys(texts)]
    limit = 40
    return tuple(shown) if len(shown) <= limit else (*shown[:limit], f"{len(shown) - limit} more are in report.json.")


def _blocks(report: Report, out: str) -> tuple[Block, ...]:
    command = Block("Exact command", fmt.clean_block(report.command) or "not recorded")
    recipe = Block("Recipe", fmt.clean_block(report.recipe) or "not recorded")
    named = f"{UNKNOWN} is the folder that holds this report. " if out == UNKNOWN else ""
    verify = Block(
        "How to verify and repeat",
        f"compress verify {out}\ncompress reproduce {out}",
        f"{named}The first command holds every file against the sizes and sha256 digests of manifest.json and runs the "
        "artifact again in its runtime, on the machine it was made for; the second makes the artifact anew and "
        "compares.",
    )
    return command, recipe, verify
