"""The quality of two artifacts: through the original where both were judged on the same samples against it."""

from __future__ import annotations

from compress.comparison.changes import Named, changed, uncompared
from compress.comparison.figures import Figure, difference, exp, mapped, ratio
from compress.comparison.records import Change
from compress.records import Report
from compress.records.base import Interval
from compress.records.quality import Metric

_PAIRED = {"perplexity": "nll_change", "nll": "nll_change"}
"""Where the paired change of a metric has another name than `<metric>_change`."""


def quality_changes(before: Report, after: Report) -> list[Change]:
    """Every metric of either artifact, as its runtime computed it."""
    names = dict.fromkeys((*_metrics(before), *_metrics(after)))
    return [_change(name, before, after) for name in names]


def same_bytes(before: Report, after: Report) -> bool:
    """Whether both artifacts are known to have the same files."""
    return bool(before.files) and before.files == after.files


def _change(name: str, before: Report, after: Report) -> Change:
    first, second = _metrics(before).get(name), _metrics(after).get(name)
    known = second or first
    assert known is not None
    named = Named(name, "quality", known.unit, known.better, known.detail)
    if why := _why_not(first, second, before, after):
        return uncompared(named, _figure(first) if first else None, _figure(second) if second else None, why)
    assert first is not None and second is not None
    one, two = _figure(first), _figure(second)
    if same_bytes(before, after) and one.value == two.value:
        nothing = Figure(value=0.0, interval=Interval(low=0.0, high=0.0))
        return changed(named, one, two, nothing, _relative(nothing, one), "the same files and the same figure")
    gap = _paired(name, before, after)
    if gap is None:
        is_told = one.interval is not None or two.interval is not None
        note = "intervals combined as of independent samples" if is_told else "no interval: compared as it is"
        return changed(named, one, two, difference(one, two), ratio(one, two), note)
    factor = _relative(gap, one)
    if name == "perplexity":  # the exponential of the loss
        factor = mapped(gap, exp)
        gap = mapped(factor, lambda grown: one.value * (grown - 1))
    return changed(named, one, two, gap, factor, "through the original, on the same samples")


def _why_not(first: Metric | None, second: Metric | None, before: Report, after: Report) -> str:
    """Why a metric cannot be compared; empty where it can."""
    one, two = before.artifact_quality, after.artifact_quality
    if first is None or second is None or one is None or two is None:
        return "not measured in both"
    if one.data_digest != two.data_digest:
        return "other data"
    if first.protocol != second.protocol or first.unit != second.unit:
        return "another protocol"
    return ""


def _paired(name: str, before: Report, after: Report) -> Figure | None:
    """The change of a metric by its changes against the original in both reports, which were taken on the same samples.
    None where they are not known, or the originals differ."""
    of = _PAIRED.get(name, f"{name}_change")
    first, second = _metrics(before).get(of), _metrics(after).get(of)
    if first is None or second is None or before.source_digest != after.source_digest:
        return None
    is_share = _metrics(after)[name].unit == "fraction"
    scale = 0.01 if is_share and second.unit == "percentage points" else 1.0
    return mapped(difference(_figure(first), _figure(second)), lambda value: scale * value)


def _relative(gap: Figure, before: Figure) -> Figure | None:
    """A ratio, of a difference against a figure that counts as exact."""
    if not before.value > 0:
        return None
    return mapped(gap, lambda value: 1 + value / before.value)


def _metrics(report: Report) -> dict[str, Metric]:
    return report.artifact_quality.metrics if report.artifact_quality else {}


def _figure(metric: Metric) -> Figure:
    return Figure(value=metric.value, interval=metric.interval)
