"""A page as one HTML file: no script, no request, every text escaped, readable on paper and on a telephone."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from html import escape

from compress.report.style import STYLE
from compress.report.table import Block, Page, Table, Tile, grouped

MAX_BYTES = 300_000  # of a page with all that is in it
_LONG_NAME, _LONG_TEXT = 14, 24
_SHOWN_WARNINGS = 3  # those after them are folded
# cells with a class of their own
_WORDS = frozenset({"faster", "slower", "same", "inconclusive", "FAILED", "NO", "met"})
_QUIET = frozenset({"not measured", "reference", "-"})


@dataclass(frozen=True)
class Drawing:
    """Inline SVG to stand over a table, and what its marks mean. half: two of them fit beside each other."""

    svg: str
    caption: str
    half: bool = False


def page_html(page: Page, drawings: Mapping[str, Drawing], data: Iterable[tuple[str, str]] = ()) -> str:
    """The whole page.

    Args: drawings: by the key of their table. data: pairs of a JSON text and what to say of it, of which the first that
    fits into `MAX_BYTES` is embedded at the end.
    """
    first, *others = page.main or (None,)
    groups = grouped(page)
    parts = [_head(page), "<body>", _header(page), _nav([name for name, _ in groups]), "<main>"]
    parts.append(_section(first, drawings) if first else "")
    gates, later = [[table for table in others if (table.key == "gates") is wanted] for wanted in (True, False)]
    parts += [*(_section(table, drawings) for table in gates), _warnings(page.warnings)]
    parts += [_section(table, drawings) for table in later]
    parts += [_group(name, tables, drawings) for name, tables in groups]
    parts += [*(_block(block) for block in page.blocks), "</main>"]
    body = "\n".join(part for part in parts if part)
    end = "\n</body>\n</html>\n"
    return f"{body}\n{_embedded(data, MAX_BYTES - len((body + end).encode()))}{end}"


def _head(page: Page) -> str:
    digest = b64encode(sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(page.title)}</title>\n<style>{STYLE}</style>\n</head>"
    )


def _header(page: Page) -> str:
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in page.facts)
    failed = " failed" if page.failed else ""
    tiles = "".join(map(_tile, page.tiles))
    shown = f'\n<dl class="tiles">{tiles}</dl>' if tiles else ""
    shown += f"\n{_next_steps(page.next_steps)}" if page.next_steps else ""
    return (
        f'<header>\n<p class="brand">compress report</p>\n<h1>{escape(page.title)}</h1>\n'
        f'<p class="verdict{failed}">{escape(page.verdict)}</p>{shown}\n<dl class="facts">{facts}</dl>\n</header>'
    )


def _tile(tile: Tile) -> str:
    detail = f'<dd class="detail">{escape(tile.detail)}</dd>' if tile.detail else ""
    value = f'<dd class="value">{escape(tile.value)}</dd>'
    return f'<div class="{tile.tone}"><dt>{escape(tile.label)}</dt>{value}{detail}</div>'


def _nav(names: Sequence[str]) -> str:
    items = "".join(f'<li><a href="#{_anchor(name)}">{escape(name)}</a></li>' for name in names)
    return f'<nav aria-label="On this page"><ul>{items}</ul></nav>' if items else ""


def _anchor(name: str) -> str:
    return "group-" + "".join(char if char.isalnum() else "-" for char in name.lower())


def _next_steps(texts: Sequence[str]) -> str:
    items = "".join(f"<li>{_with_code(text)}</li>" for text in texts)
    return f'<section class="next" aria-labelledby="next"><h2 id="next">What to do next</h2><ul>{items}</ul></section>'


def _with_code(text: str) -> str:
    """Escaped, with what stands between backquotes as code."""
    pieces = escape(text).split("`")
    if len(pieces) % 2 == 0:
        return escape(text)
    return "".join(f"<code>{piece}</code>" if place % 2 else piece for place, piece in enumerate(pieces))


def _warnings(texts: Sequence[str]) -> str:
    if not texts:
        return ""
    shown, more = _listed(texts[:_SHOWN_WARNINGS]), texts[_SHOWN_WARNINGS:]
    if more:
        shown += f"<details><summary>More warnings: {len(more)}</summary>{_listed(more)}</details>"
    return f'<section class="warnings" aria-labelledby="warn"><h2 id="warn">Warnings</h2>{shown}</section>'


def _listed(texts: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def _group(name: str, tables: Sequence[Table], drawings: Mapping[str, Drawing]) -> str:
    sections = "\n".join(_section(table, drawings, heading="h3") for table in tables)
    title = f'<h2 id="{_anchor(name)}">{escape(name)}</h2>'
    return f'<section class="group" aria-labelledby="{_anchor(name)}">\n{title}\n{sections}\n</section>'


def _section(table: Table, drawings: Mapping[str, Drawing], heading: str = "h2") -> str:
    drawing, key = drawings.get(table.key), escape(table.key)
    figure = ""
    if drawing:
        caption = f"<figcaption>{escape(drawing.caption)}</figcaption>"
        figure = f'<figure aria-labelledby="title-{key}">\n{drawing.svg}\n{caption}\n</figure>\n'
    body = _table(table) if table.rows else f'<p class="quiet">{escape(table.empty)}</p>'
    if table.folded and table.rows:
        body = f"<details>\n<summary>As a table: {len(table.rows)} rows</summary>\n{body}\n</details>"
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    listed = f'\n<ul class="notes">{notes}</ul>' if notes else ""
    half = ' class="half"' if drawing and drawing.half else ""
    title = f'<{heading} id="title-{key}">{escape(table.title)}</{heading}>'
    return f'<section id="{key}"{half}>\n{title}\n{figure}{body}{listed}\n</section>'


def _table(table: Table) -> str:
    kind = "facts-table" if table.columns == ("what", "found") else "named" if _is_named(table) else "plain"
    heads = zip(table.columns, table.align, strict=True)
    head = "".join(f'<th scope="col" class="{side}">{escape(title)}</th>' for title, side in heads)
    levels = table.levels or ((),) * len(table.rows)
    cells = zip(table.rows, levels, strict=True)
    rows = "\n".join(f"<tr>{_cells(row, table.align, found)}</tr>" for row, found in cells)
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(table.title)}, table">\n'
        f'<table class="{kind}" aria-labelledby="title-{escape(table.key)}">\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>"
    )


def _is_named(table: Table) -> bool:
    """Whether its rows have long names, which a narrow page must not squeeze."""
    return table.align[0] == "l" and max(len(row[0]) for row in table.rows) > _LONG_NAME


def _cells(row: Sequence[str], align: str, levels: Sequence[int | None]) -> str:
    side = " r" if align[0] == "r" else ""
    first = f'<th scope="row" class="key{side}">{escape(row[0])}</th>'
    found = levels or (None,) * (len(row) - 1)
    return first + "".join(map(_cell, row[1:], align[1:], found))


def _cell(text: str, side: str, level: int | None) -> str:
    word = f" {text}" if text in _WORDS else " quiet" if text in _QUIET else ""
    tint = "" if level is None else f" h{level}"
    word += " long" if side == "l" and len(text) > _LONG_TEXT else ""
    return f'<td class="{side}{word}{tint}">{_parted(text) if side == "r" else escape(text)}</td>'


def _parted(text: str) -> str:
    """A figure with its interval set back a little."""
    value, space, interval = text.partition(" (")
    return f'{escape(value)}<span class="interval"> ({escape(interval)}</span>' if space else escape(value)


def _block(block: Block) -> str:
    note = f'\n<ul class="notes"><li>{escape(block.note)}</li></ul>' if block.note else ""
    return f"<section>\n<h2>{escape(block.title)}</h2>\n<pre>{escape(block.text)}</pre>{note}\n</section>"


def _embedded(data: Iterable[tuple[str, str]], room: int) -> str:
    """For machines."""
    for text, told in data:
        found = f'<footer>{escape(told)}</footer>\n<script type="application/json" id="report">{_script(text)}</script>'
        if len(found) <= room:
            return found
    return "<footer>The report is too long to be embedded in this page; report.json has it.</footer>"


def _script(text: str) -> str:
    # A script element ends at "</script" and turns strange at "<!--"; in pure ASCII nothing hides or breaks a line.
    plain = json.dumps(json.loads(text), separators=(",", ":"))
    for char in "<>&":
        plain = plain.replace(char, f"\\u{ord(char):04x}")
    return plain
