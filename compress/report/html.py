"""The report as one HTML file: no script, no request, every text escaped, readable on paper and on a telephone."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from html import escape

from compress.records import Report
from compress.report.chart import MAX_BARS, speed_chart
from compress.report.rows import build_page
from compress.report.style import STYLE
from compress.report.table import Block, Page, Table

MAX_JSON_BYTES = 160_000  # of the 300 kB that a page may have
_WORDS = frozenset({"faster", "slower", "same", "inconclusive", "FAILED", "NO"})  # cells with a class of their own
_QUIET = frozenset({"not measured", "reference", "-"})
_CHART_NOTE = (
    "Mark: estimate; line: its interval; grey band: noise floor, the baseline against itself. Log scale; right of the "
    "dashed line the variant is faster."
)


def to_html(report: Report) -> str:
    """The whole page, ending with the report itself as JSON."""
    page = build_page(report)
    chart = speed_chart(report.speed.timings) if report.speed else ""
    parts = [_head(page), "<body>", _header(page), "<main>", _warnings(page.warnings)]
    parts += [_section(table, chart if table.key == "speed" else "") for table in page.main]
    parts.append("<hr>")
    parts += [_section(table) for table in page.details]
    parts += [_block(block) for block in page.blocks]
    parts += ["</main>", _embedded(report), "</body>", "</html>"]
    return "\n".join(part for part in parts if part) + "\n"


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
    return (
        f'<header>\n<p class="brand">compress report</p>\n<h1>{escape(page.title)}</h1>\n'
        f'<p class="verdict{failed}">{escape(page.verdict)}</p>\n<dl class="facts">{facts}</dl>\n</header>'
    )


def _warnings(texts: Sequence[str]) -> str:
    if not texts:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<section class="warnings" aria-label="Warnings"><h2>Warnings</h2><ul>{items}</ul></section>'


def _section(table: Table, chart: str = "") -> str:
    figure = f"<figure>\n{chart}\n<figcaption>{_CHART_NOTE}</figcaption>\n</figure>\n" if chart else ""
    body = _table(table) if table.rows else f'<p class="quiet">{escape(table.empty)}</p>'
    hidden = len(table.rows) - MAX_BARS
    texts = (*table.notes, f"The chart shows the first {MAX_BARS} settings.") if chart and hidden > 0 else table.notes
    notes = "".join(f"<li>{escape(note)}</li>" for note in texts)
    listed = f'\n<ul class="notes">{notes}</ul>' if notes else ""
    return f'<section id="{escape(table.key)}">\n<h2>{escape(table.title)}</h2>\n{figure}{body}{listed}\n</section>'


def _table(table: Table) -> str:
    facts = ' class="facts-table"' if table.columns == ("what", "found") else ""
    heads = zip(table.columns, table.align, strict=True)
    head = "".join(f'<th scope="col" class="{side}">{escape(title)}</th>' for title, side in heads)
    rows = "\n".join(f"<tr>{_cells(row, table.align)}</tr>" for row in table.rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}">\n<table{facts}>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>"
    )


def _cells(row: Sequence[str], align: str) -> str:
    first = f'<th scope="row" class="key">{escape(row[0])}</th>'
    return first + "".join(_cell(text, side) for text, side in zip(row[1:], align[1:], strict=True))


def _cell(text: str, side: str) -> str:
    word = f" {text}" if text in _WORDS else " quiet" if text in _QUIET else ""
    return f'<td class="{side}{word}">{escape(text)}</td>'


def _block(block: Block) -> str:
    note = f'\n<ul class="notes"><li>{escape(block.note)}</li></ul>' if block.note else ""
    return f"<section>\n<h2>{escape(block.title)}</h2>\n<pre>{escape(block.text)}</pre>{note}\n</section>"


def _embedded(report: Report) -> str:
    """The report for machines, without its long lists where they would make the page too heavy."""
    text, told = _script_text(report.model_dump_json()), "The whole report is embedded in this page as JSON."
    if len(text) > MAX_JSON_BYTES:
        passes = tuple(result.model_copy(update={"layers": ()}) for result in report.passes)
        plan = report.plan.model_copy(update={"layers": ()}) if report.plan else None
        text = _script_text(report.model_copy(update={"passes": passes, "plan": plan}).model_dump_json())
        told = "The report is embedded in this page as JSON without its lists of layers; report.json has them."
    if len(text) > MAX_JSON_BYTES:
        return "<footer>The report is too long to be embedded in this page; report.json has it.</footer>"
    return f'<footer>{told}</footer>\n<script type="application/json" id="report">{text}</script>'


def _script_text(text: str) -> str:
    # A script element ends at "</script" and turns strange at "<!--"; in pure ASCII nothing hides or breaks a line.
    plain = json.dumps(json.loads(text), separators=(",", ":"))
    for char in "<>&":
        plain = plain.replace(char, f"\\u{ord(char):04x}")
    return plain
