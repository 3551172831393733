"""The tables of labelled tasks: scores side by side, and gates."""

from __future__ import annotations

from compress.records.task import Tasks, TaskScore
from compress.report import format as fmt
from compress.report.format import clean
from compress.report.table import Row, Table, capped

_COLUMNS = ("task", "metric", "samples", "original", "compressed", "change", "recovery", "p (Holm)", "detectable")
_NONE = "-"


def task_table(found: Tasks) -> Table:
    """One row per task and metric."""
    rows, notes = capped((_row(score) for score in found.scores), _notes(found))
    return Table("tasks", "Tasks", _COLUMNS, "llrrrrrrr", rows, keys=2, notes=notes)


def _row(score: TaskScore) -> Row:
    metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
    return (
        clean(score.task),
        clean(metric + (", nats" if score.unit == "nats" else "")),
        str(score.samples),
        f"{score.baseline:.4f}",
        f"{score.variant:.4f}",
        _change(score),
        _recovery(score),
        _NONE if score.p_holm is None else f"{score.p_holm:.2g}",
        _NONE if score.detectable is None else f"{score.detectable:.4f}",
    )


def _change(score: TaskScore) -> str:
    if score.interval is None:
        return f"{score.change:+.4f}"
    return f"{score.change:+.4f} ({score.interval.low:+.4f} to {score.interval.high:+.4f})"


def _recovery(score: TaskScore) -> str:
    if score.recovery is None:
        return _NONE
    bounds = score.recovery_interval
    # never rounded up to what a reader may take for a whole
    return f"{score.recovery:.2f}%" + ("" if bounds is None else f" ({bounds.low:.2f} to {bounds.high:.2f})")


def _notes(found: Tasks) -> tuple[str, ...]:
    some = "" if found.limit is None else f", the first {fmt.count(found.limit, 'sample')} of each task"
    chat = ", through the chat template" if found.chat_template else ""
    return (
        f"{clean(found.harness)}, both models in {clean(found.where)} on the same samples{some}{chat}.",
        "Change with its 95% interval, paired by sample; p: exact McNemar for right or wrong, paired t otherwise, "
        "after Holm over all rows.",
        *(clean(text, limit=600) for text in found.notes),
        "Recovery: compressed in percent of the original; none where the original may as well be guessing. Detectable: "
        "the least true change that so many samples show in 80% of all cases.",
    )
