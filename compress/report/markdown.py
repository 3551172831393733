"""The report as GitHub Markdown, for a pull request or a model card."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from compress.records import Report
from compress.report.rows import build_page
from compress.report.table import Block, Page, Table, grouped

_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKUP = re.compile(r"([\\`*\[\]|~#])")
_EDGE_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")  # inside a word an underscore is plain text
_RULES = {"l": ":--", "r": "--:"}


def to_markdown(report: Report, folder: Path | None = None) -> str:
    """The whole report; every text of the model's is escaped. folder: where it lies."""
    return page_markdown(build_page(report, folder))


def page_markdown(page: Page) -> str:
    """Any page; every text is escaped."""
    facts = [f"- {name}: {_text(value)}" for name, value in page.facts]
    parts = [f"# {_text(page.title) or 'compress report'}", f"**{_text(page.verdict)}**", "\n".join(facts)]
    if page.next_steps:
        parts += ["## What to do next", "\n".join(f"- {_spans(text)}" for text in page.next_steps)]
    if page.warnings:
        parts += ["## Warnings", "\n".join(f"- {_text(text)}" for text in page.warnings)]
    for table in page.main:
        parts += _table(table)
    for name, tables in grouped(page):
        parts.append(f"## {_text(name)}")
        for table in tables:
            parts += _table(table, "###")
    for block in page.blocks:
        parts += _block(block)
    return "\n\n".join(part for part in parts if part) + "\n"


def table_markdown(table: Table) -> str:
    """One table under its heading."""
    return "\n\n".join(part for part in _table(table) if part)


def escaped(text: str) -> str:
    """A text that Markdown shows as it is."""
    return _text(text)


def _table(table: Table, rank: str = "##") -> list[str]:
    heading = f"{rank} {_text(table.title)}"
    notes = "\n".join(f"- {_text(note)}" for note in table.notes)
    if not table.rows:
        return [heading, _text(table.empty), notes]
    lines = [_row(table.columns), _row([_RULES[side] for side in table.align], raw=True)]
    lines += [_row(row) for row in table.rows]
    return [heading, "\n".join(lines), notes]


def _spans(text: str) -> str:
    """Escaped, but for what stands between backquotes."""
    pieces = text.split("`")
    if len(pieces) % 2 == 0:
        return _text(text)
    return "".join(f"`{piece}`" if place % 2 else _text(piece) for place, piece in enumerate(pieces))


def _row(cells: Sequence[str], *, raw: bool = False) -> str:
    return f"| {' | '.join(cells if raw else [_text(cell) for cell in cells])} |"


def _block(block: Block) -> list[str]:
    return [f"## {_text(block.title)}", fenced(block.text), _text(block.note)]


def fenced(text: str) -> str:
    """A text as it is, in a fence longer than any run of backquotes in it, which none can close."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _text(text: str) -> str:
    safe = _MARKUP.sub(r"\\\1", text)
    safe = _EDGE_UNDERSCORE.sub(r"\\_", safe)
    return "".join(_HTML.get(char, char) for char in safe)
