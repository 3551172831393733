"""The report on a terminal: the sentence, the tables of the first screen and the warnings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from compress.records import Report
from compress.report import format as fmt
from compress.report.rows import build_page
from compress.report.table import Block, Page, Table

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
_FEW = 4  # rows of a table that may be turned on its side
_WARNINGS = 4  # of the short page


def to_terminal(report: Report, console: Console, *, full: bool = False, folder: Path | None = None) -> None:
    """Print the report; `full` adds the skipped and changed layers, the environment and the commands. folder: where it
    lies."""
    print_page(build_page(report, folder), console, full=full, most_warnings=None if full else _WARNINGS)


def print_page(page: Page, console: Console, *, full: bool = False, most_warnings: int | None = None) -> None:
    """Print any page; of its warnings the first `most_warnings`, and how many more there are."""
    print_line(console, page.title, "bold")
    print_line(console, page.verdict, "bold red" if page.failed else "bold")
    for table in page.main:
        print_table(console, table)
    if page.warnings:
        console.print()
    shown = page.warnings[:most_warnings]
    for text in shown:
        print_line(console, f"warning: {text}", "yellow")
    if len(shown) < len(page.warnings):
        print_line(console, f"{fmt.count(len(page.warnings) - len(shown), 'more warning')} in the report.", "yellow")
    if page.next_steps:
        console.print()
        print_line(console, "What to do next", "bold")
    for text in page.next_steps:
        print_line(console, f"- {text}")
    if full:
        _print_rest(page, console)


def _print_rest(page: Page, console: Console) -> None:
    for table in page.details:
        print_table(console, table)
    if page.evidence:
        console.print()
        titles = ", ".join(table.title for table in page.evidence)
        print_line(console, f"Only in the pages for a browser and in Markdown: {titles}.", "dim")
    for block in page.blocks:
        _print_block(console, block)


def print_table(console: Console, table: Table) -> None:
    """Columns where they fit, intervals on a second line or the table on its side where that helps, else a paragraph
    per row."""
    console.print()
    print_line(console, table.title, "bold")
    turned = [_turned(table)] if 1 < len(table.rows) <= _FEW and table.keys == 1 else []
    ways = [table, _two_lines(table), *turned, *map(_two_lines, turned)]
    fitting = next((way for way in ways if sum(_widths(way)) <= console.width + _PADDING), None)
    if not table.rows:
        print_line(console, table.empty, "dim")
    elif fitting is not None:
        _grid(console, fitting)
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
        named = (f"{title} {cell}" for title, cell in keys if cell != "-")  # an image has no prompt
        print_line(console, ", ".join([row[0], *named]), "bold")
        line = ""
        for title, cell in zip(table.columns[table.keys :], row[table.keys :], strict=True):
            if cell == "-":  # does not apply
                continue
            item = f"{title}: {cell}"
            if line and len(line) + len(item) + 3 > console.width:  # a figure stays in one piece
                print_line(console, line)
                line = ""
            line = f"{line} | {item}" if line else f"  {item}"
        print_line(console, line)


def _turned(table: Table) -> Table:
    """The same on its side: a row per column."""
    columns = (table.columns[0], *(row[0] for row in table.rows))
    rows = tuple(zip(table.columns[1:], *(row[1:] for row in table.rows), strict=True))
    return replace(table, columns=columns, align="l" + "r" * len(table.rows), rows=rows, levels=())


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
