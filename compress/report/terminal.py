"""The report on a terminal: the sentence, the tables of the first screen and the warnings."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from compress.records import Report
from compress.report.rows import build_page
from compress.report.table import Block, Table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Blue and yellow are told apart by all eyes, and the word is there as well.
_STYLES = {
    "faster": "bold blue",
    "slower": "bold yellow",
    "fast": "bold blue",
    "works": "bold yellow",
    "no": "bold red",
    "FAILED": "bold red",
    "NO": "bold red",
    "not measured": "dim",
    "reference": "dim",
    "-": "dim",
}
_PADDING = 2  # columns between two cells
_FOLD = 24  # a text may be folded to this


def to_terminal(report: Report, console: Console, *, full: bool = False) -> None:
    """Print the report; `full` adds the skipped and changed layers, the environment and the commands."""
    page = build_page(report)
    print_line(console, page.title, "bold")
    print_line(console, page.verdict, "bold red" if page.failed else "bold")
    for text in page.warnings:
        print_line(console, f"warning: {text}", "yellow")
    for table in (*page.main, *(page.details if full else ())):
        print_table(console, table)
    for block in page.blocks if full else ():
        _print_block(console, block)


def print_table(console: Console, table: Table) -> None:
    """Columns where they fit, intervals on a second line where that helps, else a paragraph per row."""
    console.print()
    print_line(console, table.title, "bold")
    split = _two_lines(table)
    if not table.rows:
        print_line(console, table.empty, "dim")
    elif sum(_widths(table)) <= console.width + _PADDING:
        _grid(console, table)
    elif sum(_widths(split)) <= console.width + _PADDING:
        _grid(console, split)
    else:
        _stack(console, table)
    for note in table.notes:
        print_line(console, note, "dim")


def _print_block(console: Console, block: Block) -> None:
    console.print()
    print_line(console, block.title, "bold")
    for line in (*block.text.splitlines(), block.note):
        print_line(console, line)


def _grid(console: Console, table: Table) -> None:
    from rich.table import Table as Grid

    grid = Grid(box=None, pad_edge=False, padding=(0, _PADDING, 0, 0), header_style="dim")
    widths = _widths(table, console.width + _PADDING)
    for title, side, width in zip(table.columns, table.align, widths, strict=True):
        justify: Literal["right", "left"] = "right" if side == "r" else "left"
        grid.add_column(_text(console, title), justify=justify, overflow="fold", width=width - _PADDING)
    for row in table.rows:
        grid.add_row(*(_text(console, cell, _STYLES.get(cell, "")) for cell in row))
    console.print(grid)


def _stack(console: Console, table: Table) -> None:
    """A row per paragraph, for terminals too narrow for the columns."""
    for row in table.rows:
        keys = zip(table.columns[1 : table.keys], row[1 : table.keys], strict=True)
        print_line(console, ", ".join([row[0], *(f"{title} {cell}" for title, cell in keys)]), "bold")
        line = ""
        for title, cell in zip(table.columns[table.keys :], row[table.keys :], strict=True):
            item = f"{title}: {cell}"
            if line and len(line) + len(item) + 3 > console.width:  # a figure stays in one piece
                print_line(console, line)
                line = ""
            line = f"{line} | {item}" if line else f"  {item}"
        print_line(console, line)


def _two_lines(table: Table) -> Table:
    """The same with the intervals on a second line of their cell."""

    def split(cell: str, side: str) -> str:
        return cell.replace(" (", "\n(", 1) if side == "r" else cell

    rows = tuple(tuple(split(cell, side) for cell, side in zip(row, table.align, strict=True)) for row in table.rows)
    return replace(table, rows=rows)


def _widths(table: Table, room: int = 0) -> list[int]:
    """Per column, padding included: figures whole, headers broken at spaces, texts folded; then what `room` allows."""
    from rich.cells import cell_len

    needs, wants = [], []
    for index, side in enumerate(table.align):
        header = table.columns[index]
        lines = [line for row in table.rows for line in row[index].splitlines()]
        longest = max(map(cell_len, lines), default=0)
        needs.append(max(longest if side == "r" else min(longest, _FOLD), *map(cell_len, header.split())) + _PADDING)
        wants.append(max(longest, cell_len(header)) + _PADDING)
    spare = room - sum(needs)
    for index, want in enumerate(wants):
        grown = max(0, min(spare, want - needs[index]))
        needs[index] += grown
        spare -= grown
    return needs


def print_line(console: Console, text: str, style: str = "") -> None:
    """One paragraph; nothing for an empty text."""
    if text:
        console.print(_text(console, text, style))


def _text(console: Console, text: str, style: str = "") -> Text:
    """Plain text, never console markup, in characters that the terminal's encoding has."""
    from rich.text import Text

    encoding = console.encoding or "utf-8"
    return Text(text.encode(encoding, "backslashreplace").decode(encoding), style=style)
