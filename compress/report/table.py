"""What a page shows, as text: tables, warnings and code blocks. The renderers add only markup."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

MAX_ROWS = 120
Row = tuple[str, ...]
Tone = Literal["good", "bad", "even", "open", "quiet"]


@dataclass(frozen=True)
class Table:
    """Rows of text. `align` holds `l` or `r` per column; the first `keys` columns name the row.

    group: heading that it stands under, with those of the same group next to it; level: 0 to 6 per cell but those of
    the first column, for a page that can tint cells, or nothing; folded: a page that can may hide it at first.
    """

    key: str
    title: str
    columns: tuple[str, ...]
    align: str
    rows: tuple[Row, ...]
    keys: int = 1
    notes: tuple[str, ...] = ()
    empty: str = "not measured"
    group: str = ""
    levels: tuple[tuple[int | None, ...], ...] = ()
    folded: bool = False


@dataclass(frozen=True)
class Block:
    """A text that is shown as it is: a recipe, a command."""

    title: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class Tile:
    """One figure of the first screen: what it is of, the figure, and its interval or what it is made of."""

    label: str
    value: str
    detail: str = ""
    tone: Tone = "even"


@dataclass(frozen=True)
class Page:
    """A whole report: what the eye needs first, then the evidence.

    next_steps: what one may do now, a sentence each; evidence: tables too long for a terminal.
    """

    title: str
    verdict: str
    failed: bool
    facts: tuple[tuple[str, str], ...]
    main: tuple[Table, ...]
    warnings: tuple[str, ...]
    details: tuple[Table, ...]
    blocks: tuple[Block, ...]
    tiles: tuple[Tile, ...] = ()
    next_steps: tuple[str, ...] = ()
    evidence: tuple[Table, ...] = ()


def grouped(page: Page) -> list[tuple[str, list[Table]]]:
    """Details and evidence under their headings: of each heading first what is drawn, then what is only told."""
    names = dict.fromkeys(table.group for table in (*page.details, *page.evidence))
    found = {name: [table for table in page.evidence if table.group == name] for name in names}
    for table in page.details:
        found[table.group].append(table)
    return [(name or "Details", tables) for name, tables in found.items()]


def capped(
    rows: Iterable[Row], notes: tuple[str, ...] = (), *, limit: int = MAX_ROWS, where: str = "report.json"
) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """The first `limit` rows, and the notes with a word on those left out: no model makes an endless page."""
    kept = tuple(rows)
    if len(kept) <= limit:
        return kept, notes
    return kept[:limit], (*notes, f"{len(kept) - limit} more rows are in {where}.")
