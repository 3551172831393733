"""The report of a run as one HTML file, ending with the report itself as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from compress.records import Report
from compress.report.drawings import drawings_of
from compress.report.html_page import page_html
from compress.report.rows import build_page


def to_html(report: Report, folder: Path | None = None) -> str:
    """The whole page, under 300 kB: of a very large model without its list of layers, which report.json has. folder:
    where the report lies."""
    return page_html(build_page(report, folder), drawings_of(report), _data(report))


def _data(report: Report) -> Iterator[tuple[str, str]]:
    """The report for machines, then without its long lists where they would make the page too heavy."""
    yield report.model_dump_json(), "The whole report is embedded in this page as JSON."
    passes = tuple(result.model_copy(update={"layers": ()}) for result in report.passes)
    plan = report.plan.model_copy(update={"layers": ()}) if report.plan else None
    shorter = report.model_copy(update={"passes": passes, "plan": plan})
    told = "The report is embedded in this page as JSON without its lists of layers; report.json has them."
    yield shorter.model_dump_json(), told
