"""The report of a run: one JSON record, and the terminal, Markdown and HTML pages that are pure functions of it."""

from compress.report.html import to_html
from compress.report.load import load
from compress.report.markdown import to_markdown
from compress.report.terminal import to_terminal
from compress.report.verdict import verdict_sentence

__all__ = ["load", "to_html", "to_markdown", "to_terminal", "verdict_sentence"]
