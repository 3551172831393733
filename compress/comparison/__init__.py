"""Two reports side by side: `compare(A, B)`, with A the earlier one and B the newer.

What both reports measured against the same original on the same samples, or against the same baseline on the same
machine, is compared through it: each report's difference was paired, so what its run met beside the artifact (hard
windows, a busy machine) cancels. All other figures are combined as independent ones (`figures.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compress.comparison.changes import Named, without_intervals
from compress.comparison.quality import quality_changes, same_bytes
from compress.comparison.records import Change, Comparison, Side
from compress.comparison.speed import drift, speed_changes, unlike
from compress.errors import UsageError
from compress.records import Report
from compress.report.format import clean

__all__ = ["Comparison", "compare", "same_bytes"]


def compare(before: Report, after: Report, *, allow_cross_machine: bool = False) -> Comparison:
    """Every figure of two reports, and what changed.

    Raises: UsageError for latencies of different machines, runtimes or threads, unless allow_cross_machine: then each
    is told by its report's speed-up over its own baseline only.
    """
    apart = unlike(before.speed, after.speed)
    if apart and not allow_cross_machine:
        raise UsageError(
            f"The latencies of these reports cannot be compared: {'; '.join(apart)}. Measure both on one machine, or "
            "add --allow-cross-machine to compare each one's speed-up over its own baseline instead."
        )
    changes = [
        without_intervals(Named("size", "size", "bytes"), before.artifact_bytes, after.artifact_bytes, ""),
        *quality_changes(before, after),
        *speed_changes(before, after, bool(apart)),
    ]
    _require_comparable(before, after, changes)
    notes = tuple(_notes(before, after, apart))
    return Comparison(before=_side(before), after=_side(after), changes=tuple(changes), notes=notes)


def _require_comparable(before: Report, after: Report, changes: Sequence[Change]) -> None:
    """Raises: UsageError for models of two kinds that have no figure of quality or speed in common."""
    kinds = [report.request.task if report.request else "" for report in (before, after)]
    found = [change for change in changes if change.kind in ("quality", "latency", "speedup")]
    if all(kinds) and kinds[0] != kinds[1] and all(change.word == "not compared" for change in found):
        raise UsageError(
            f"These reports have nothing to compare: A is of a model of kind {clean(kinds[0])}, B of kind "
            f"{clean(kinds[1])}, without a figure of quality or a timed setting in common. Give two reports of one "
            "kind of model."
        )


def _side(report: Report) -> Side:
    return Side(
        title=report.title,
        source=report.source,
        source_digest=report.source_digest,
        recipe=report.recipe,
        profile=report.profile,
        target=report.target,
        created=report.created,
    )


def _notes(before: Report, after: Report, apart: list[str]) -> Iterator[str]:
    if same_bytes(before, after):
        yield "Both artifacts have the same files."
    if before.source_digest != after.source_digest:
        yield "They were made from two source models: what changed is not the compression alone."
    one, two = before.artifact_quality, after.artifact_quality
    if one and two and one.data_digest != two.data_digest:
        yield "Quality was not compared: it was computed on other data in B."
    for name, report in (("A", before), ("B", after)):
        if report.verification is not None and not report.verification.agrees:
            yield f"The artifact of {name} did not agree with its model."
    if apart:
        yield f"Not timed alike: {'; '.join(apart)}. Latency is told by each report's speed-up over its own baseline."
    elif told := drift(before, after):
        yield told
