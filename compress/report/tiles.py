"""The few figures that the first screen shows large. Their text is that of the tables."""

from __future__ import annotations

from collections.abc import Sequence

from compress.records import Gate, Report, Timing, Verification
from compress.report import format as fmt
from compress.report.format import NOT_MEASURED, clean
from compress.report.metric_names import metric_name
from compress.report.table import Tile, Tone
from compress.report.verdict import headline_metric, headline_timing

TONES: dict[str, Tone] = {"faster": "good", "slower": "bad", "same": "even", "inconclusive": "open"}


def tiles_of(report: Report) -> tuple[Tile, ...]:
    """Speed, size, quality, gates, agreement."""
    return (
        _speed(headline_timing(report.speed)),
        _size(report),
        _quality(report),
        _gates(report.gates),
        _agreement(report.verification),
    )


def _speed(timing: Timing | None) -> Tile:
    if timing is None:
        return Tile("Speed", NOT_MEASURED, tone="quiet")
    value, bounds = fmt.speedup(timing.speedup, timing.interval)
    detail = f"{timing.verdict}, {bounds}, {timing.name}"
    detail += f"; provisional: {timing.provisional}" if timing.provisional else ""
    return Tile("Speed", value, detail, TONES[timing.verdict])


def _size(report: Report) -> Tile:
    change = fmt.times_smaller(report.source_bytes, report.artifact_bytes)
    if not change:
        return Tile("Size", NOT_MEASURED, tone="quiet")
    value, _, word = change.partition(" ")
    tone: Tone = "good" if word == "smaller" else "bad" if word == "larger" else "even"
    detail = f"{fmt.size(report.artifact_bytes)} from {fmt.size(report.source_bytes)}"
    if word == "same":
        return Tile("Size", change, detail, tone)
    return Tile("Size", value, f"{word} than the source, {detail}", tone)


def _quality(report: Report) -> Tile:
    found = headline_metric(report.artifact_quality or report.memory_quality)
    if found is None:
        return Tile("Quality", NOT_MEASURED, tone="quiet")
    key, metric = found
    value, bounds = fmt.metric_parts(metric)
    where = "" if report.artifact_quality else "in memory, before lowering"
    details = (fmt.unit_text(metric.unit), bounds, where)
    return Tile(_capital(metric_name(key)), value, ", ".join(text for text in details if text))


def _gates(gates: Sequence[Gate]) -> Tile:
    if not gates:
        return Tile("Gates", "none", "no gates were set", "quiet")
    failed = [metric_name(gate.name) for gate in gates if not gate.met]
    if failed:
        return Tile("Gates", f"{len(failed)} FAILED", fmt.listing(failed, limit=3), "bad")
    return Tile("Gates", "met", fmt.listing([metric_name(gate.name) for gate in gates], limit=3), "good")


def _agreement(found: Verification | None) -> Tile:
    if found is None:
        return Tile("Artifact", NOT_MEASURED, "not verified", "quiet")
    words = {"ran": "ran in", "built": "built for, not run in", "checked": "checked against the rules of"}
    detail = f"{words[found.level]} {clean(found.runtime, limit=80)}"
    if found.agrees:
        return Tile("Artifact", "agrees", detail, "good")
    return Tile("Artifact", "does NOT agree", detail, "bad")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
