"""Tables of quality: the arms side by side, every figure, curves, changed answers, continuations, worst samples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

from compress.records import Metric, Quality, Timing
from compress.records.quality import Curve, CurvePoint, Flips, Generation, WorstSample
from compress.report import format as fmt
from compress.report.format import NOT_MEASURED, clean
from compress.report.metric_names import is_relative, metric_name
from compress.report.speed_rows import speedup_text
from compress.report.table import Row, Table, capped

GROUP = "Quality in detail"
MAX_WORST = 20
CURVE_TITLES = {
    "kl_by_position": "KL by the position in a window",
    "kl_by_confidence": "KL by the original's confidence",
    "reliability": "Is it as often right as it is sure?",
}
_METRIC_ORDER = ("perplexity", "accuracy", "accuracy_change", "kl", "top1_agreement", "nll_change")
_NONE = "-"  # a cell that does not apply, as against one that was not measured
_CONTEXT = 60  # characters of the text before a token


def quality_table(
    baseline: Quality | None,
    artifact: Quality | None,
    memory: Quality | None,
    sizes: tuple[int, int] | None = None,
    timing: Timing | None = None,
    predicted: tuple[str, str] | None = None,
) -> Table:
    """The baseline on top, then the artifact as its runtime computes it, then the model before lowering.

    Args: sizes: bytes of the source and of the artifact; timing: the setting whose speed-up is shown; without them
    there are no such columns. predicted: size and speed-up by the plan, which get a row of their own.
    """
    arms = (("baseline", baseline), ("artifact in runtime", artifact), ("in memory", memory))
    known = [quality for _, quality in arms if quality]
    keys = _metric_keys(known)
    columns = ["model"]
    rows = [[_arm_name(name, quality)] for name, quality in arms]
    if sizes:
        columns += ["size", f"speed-up, {timing.name}" if timing else "speed-up"]
        speed = ("reference", speedup_text(timing), _NONE) if timing else (NOT_MEASURED, NOT_MEASURED, _NONE)
        for row, count, ratio in zip(rows, (*map(_size, sizes), _NONE), speed, strict=True):
            row += [count, ratio]
    columns += [_metric_header(key, known) for key in keys] or ["quality"]
    for row, (_, quality) in zip(rows, arms, strict=True):
        row += [_metric_cell(key, quality) for key in keys] or [NOT_MEASURED]
    if sizes and predicted:
        rows.append(["plan, predicted", *predicted, *[_NONE] * (len(columns) - 3)])
    title = "Size, speed and quality" if sizes else "Quality"
    kept = tuple(tuple(row) for row in rows)
    return Table("quality", title, tuple(columns), "l" + "r" * (len(columns) - 1), kept, notes=_notes(known, keys))


def quality_details(baseline: Quality | None, artifact: Quality | None) -> tuple[Table, ...]:
    """All other figures, changed answers and continuations."""
    if artifact is None:
        return ()
    made = (_figure_table(baseline, artifact), _flip_table(artifact.flips), _generation_table(artifact.generation))
    return tuple(replace(table, group=GROUP) for table in made if table.rows)


def quality_evidence(artifact: Quality | None) -> tuple[Table, ...]:
    """Curves and worst samples."""
    if artifact is None:
        return ()
    made = (*map(curve_table, artifact.curves), _worst_table(artifact.worst))
    return tuple(replace(table, group=GROUP) for table in made if table.rows)


def curve_key(curve: Curve) -> str:
    """Of its table and of its drawing."""
    return f"curve-{''.join(char if char.isalnum() else '-' for char in curve.name)}"


def curve_table(curve: Curve) -> Table:
    """A row per part of x."""
    rows, notes = capped((_curve_row(point, curve) for point in curve.points), (f"Protocol {clean(curve.protocol)}.",))
    unit = fmt.unit_text(curve.unit, ", ")
    columns = (clean(curve.x), f"{clean(curve.y)}{unit}", "count")
    title = CURVE_TITLES.get(curve.name) or clean(f"{curve.y} by {curve.x}")
    return Table(curve_key(curve), title, columns, "lrr", rows, notes=notes, folded=True)


def point_text(point: CurvePoint, unit: str) -> str:
    """The figure with its interval."""
    metric = Metric(
        value=point.value, interval=point.interval, samples=point.count, unit=unit, protocol="", better="lower"
    )
    return fmt.with_interval(fmt.metric_parts(metric), point.interval)


def _curve_row(point: CurvePoint, curve: Curve) -> Row:
    return f"{fmt.short(point.low)} to {fmt.short(point.high)}", point_text(point, curve.unit), str(point.count)


def _figure_table(baseline: Quality | None, artifact: Quality) -> Table:
    # continuations have a table of their own
    apart = ("greedy_", "sampled_") if artifact.generation else ()
    found = [key for key, metric in artifact.metrics.items() if metric.detail and not key.startswith(apart)]
    rows, notes = capped(
        (
            (
                _metric_header(key, [artifact]),
                _metric_cell(key, baseline) if baseline or not is_relative(key) else "reference",
                _metric_cell(key, artifact),
                artifact.metrics[key].better,
            )
            for key in found
        ),
        tuple(clean(note, limit=400) for note in artifact.notes),
    )
    return Table("figures", "More figures", ("figure", "baseline", "artifact", "better"), "lrrl", rows, notes=notes)


def _flip_table(flips: Flips | None) -> Table:
    if flips is None:
        return Table("flips", "Changed answers", (), "", ())
    p = NOT_MEASURED if flips.p_value is None else fmt.significant(flips.p_value)
    row = str(flips.samples), str(flips.lost), str(flips.gained), p
    note = f"Test: {clean(flips.test)}. A small p says that more went one way than chance would explain."
    columns = ("answers", "right before, wrong now", "wrong before, right now", "p")
    return Table("flips", "Changed answers", columns, "rrrr", (row,), notes=(note,))


def _generation_table(found: Sequence[Generation]) -> Table:
    rows, notes = capped(
        map(_generation_row, found),
        (
            "Against the original, same prompts and same random numbers. In brackets: interval; control: the original "
            "against itself one prompt at a time, which rounding alone may change.",
        ),
    )
    columns = ("continuations", "prompts", "same token", "control", "wholly alike", "control", "first difference after")
    return Table("continuations", "Continuations", columns, "lrrrrrr", rows, notes=notes)


def _generation_row(one: Generation) -> Row:
    top = f", top {one.top_k}" if one.top_k else ""
    name = "greedy" if one.temperature == 0 else f"temperature {fmt.short(one.temperature)}{top}"
    pairs = (
        (one.compressed.agreement, one.control.agreement),
        (one.compressed.exact_match, one.control.exact_match),
    )
    cells = [_interval_text(metric) for pair in pairs for metric in pair]
    first = f"{_interval_text(one.compressed.first_divergence)} of {one.tokens} tokens"
    return name, str(one.prompts), *cells, first


def _worst_table(found: Sequence[WorstSample]) -> Table:
    told = ("Where the compressed model is furthest from the original. p: probability of what is true.",)
    has_text = any(sample.context_text or sample.target_text for sample in found)
    is_token = any(sample.position is not None for sample in found)
    what = ("window, token", "text before", "true next") if is_token else ("sample", "true class")
    columns = (*what, "original says", "p, original", "compressed says", "p, compressed", "KL")
    rows = [_worst_row(sample, is_token, has_text) for sample in found]
    kept, notes = capped(rows, told, limit=MAX_WORST)
    align = "l" * len(what) + "lrlrr"
    return Table("worst", "Worst samples", columns, align, kept, notes=notes)


def _worst_row(sample: WorstSample, is_token: bool, has_text: bool) -> Row:
    figures = (
        _answer(sample.reference, sample.reference_text, has_text),
        fmt.percent(sample.reference_probability),
        _answer(sample.chosen, sample.chosen_text, has_text),
        fmt.percent(sample.probability),
        fmt.significant(sample.kl),
    )
    if not is_token:
        return str(sample.sample), str(sample.target), *figures
    where = f"{sample.sample}, {sample.position}"
    before = f"... {_quoted(sample.context_text[-_CONTEXT:])}" if has_text else _ids(sample.context)
    return where, before, _answer(sample.target, sample.target_text, has_text), *figures


def _answer(number: int, text: str, has_text: bool) -> str:
    return _quoted(text) if has_text else str(number)


def _quoted(text: str) -> str:
    """With its blanks and line ends seen."""
    return clean(json.dumps(text, ensure_ascii=False).replace("\t", "\\t"))


def _ids(tokens: Sequence[int]) -> str:
    return f"... {' '.join(map(str, tokens[-8:]))}" if tokens else _NONE


def _arm_name(name: str, quality: Quality | None) -> str:
    # The row's own name says "in memory" already.
    return f"{name} ({clean(quality.where.removesuffix(', in memory'))})" if quality else name


def _metric_keys(known: list[Quality]) -> list[str]:
    shown = (key for quality in known for key, metric in quality.metrics.items() if not metric.detail)
    found = list(dict.fromkeys(shown))
    first = [key for key in _METRIC_ORDER if key in found]
    rest = [key for key in found if key not in first]
    # The loss is the logarithm of the perplexity: one of the two is enough on a page.
    return first + [key for key in rest if not (key == "nll" and "perplexity" in first)]


def _metric_header(key: str, known: list[Quality]) -> str:
    unit = fmt.unit_text(_first_metric(key, known).unit)
    return f"{metric_name(key)} ({unit})" if unit else metric_name(key)


def _metric_cell(key: str, quality: Quality | None) -> str:
    metric = quality.metrics.get(key) if quality else None
    if metric is not None:
        return _interval_text(metric)
    is_reference = quality is not None and quality.subject == "baseline" and is_relative(key)
    return "reference" if is_reference else NOT_MEASURED


def _interval_text(metric: Metric) -> str:
    return fmt.with_interval(fmt.metric_parts(metric), metric.interval)


def _first_metric(key: str, known: Iterable[Quality]) -> Metric:
    return next(quality.metrics[key] for quality in known if key in quality.metrics)


def _notes(known: list[Quality], keys: list[str]) -> tuple[str, ...]:
    if not known:
        return ()
    notes = ["Intervals in brackets are 95% unless they name another level."]
    grouped: dict[str, list[str]] = {}
    for key in keys:
        metric = _first_metric(key, known)
        how = f"{metric.better} is better, {metric.samples} independent samples, protocol {clean(metric.protocol)}"
        name = metric_name(key.partition("[")[0])  # of several outputs alike: the figure once
        grouped.setdefault(how, []).append(name)
    notes += [f"{', '.join(dict.fromkeys(names))}: {how}." for how, names in grouped.items()]
    digests = list(dict.fromkeys(clean(quality.data_digest) for quality in known))
    if len(digests) > 1:
        notes.append(f"CAUTION: these rows were not computed on the same data ({', '.join(digests)}).")
    return tuple(notes)


def _size(count: int) -> str:
    return fmt.size(count) if count > 0 else NOT_MEASURED
