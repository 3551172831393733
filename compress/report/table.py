"""What a page shows, as text: tables, warnings and code blocks. The renderers add only markup."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MAX_ROWS = 120
Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Rows of text. `align` holds `l` or `r` per column; the first `keys` columns name the row."""

    key: str
    title: str
    columns: tuple[str, ...]
    align: str
    rows: tuple[Row, ...]
    keys: int = 1
    notes: tuple[str, ...] = ()
    empty: str = "not measured"


@dataclass(frozen=True)
class Block:
    """A text that is shown as it is: a recipe, a command."""

    title: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    """A whole report: what the eye needs first, then the evidence."""

    title: str
    verdict: str
    failed: bool
    facts: tuple[tuple[str, str], ...]
    main: tuple[Table, ...]
    warnings: tuple[str, ...]
    details: tuple[Table, ...]
    blocks: tuple[Block, ...]


def capped(
    rows: Iterable[Row], notes: tuple[str, ...] = (), *, limit: int = MAX_ROWS, where: str = "report.json"
) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """The first `limit` rows, and the notes with a word on those left out: no model makes an endless page."""
    kept = tuple(rows)
    if len(kept) <= limit:
        return kept, notes
    return kept[:limit], (*notes, f"{len(kept) - limit} more rows are in {where}.")
