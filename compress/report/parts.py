"""Parts of a report on a terminal, for the verbs that compute one part: the report's own tables."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING

from compress.records import Quality, Speed
from compress.records.task import Tasks
from compress.report.end_to_end_rows import end_to_end_table, energy_table
from compress.report.format import clean
from compress.report.operator_rows import operator_table
from compress.report.quality_rows import quality_table
from compress.report.rows import gate_table
from compress.report.speed_rows import footprint_table, speed_table, speed_warnings
from compress.report.task_rows import task_table
from compress.report.terminal import print_line, print_table

if TYPE_CHECKING:
    from rich.console import Console


def show_quality(baseline: Quality, artifact: Quality, memory: Quality | None, console: Console) -> None:
    """Print the quality of an artifact beside its uncompressed model."""
    print_table(console, quality_table(baseline, artifact, memory))


def show_speed(speed: Speed, console: Console) -> None:
    """Print latency, load time and memory of an artifact beside its uncompressed model."""
    for text in dict.fromkeys(speed_warnings(speed)):
        print_line(console, f"warning: {clean(text, limit=600)}", "yellow")
    print_table(console, speed_table(speed))
    print_table(console, footprint_table(speed))
    for table in (end_to_end_table(speed), energy_table(speed), operator_table(speed)):
        if table.rows or table.notes:  # a note alone says why there is no figure
            print_table(console, table)


def show_tasks(found: Tasks, console: Console) -> None:
    """Print scores of labelled tasks beside those of the uncompressed model, and gates."""
    print_table(console, task_table(found))
    if found.gates:
        print_table(console, gate_table(found.gates))


def speed_text(speed: Speed, width: int = 140) -> str:
    """The same as plain text."""
    from rich.console import Console

    console = Console(file=StringIO(), width=width, no_color=True)
    show_speed(speed, console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()
