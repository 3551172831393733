"""A Report as tables of text. Every renderer prints these, so no two pages can disagree on a figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from compress.records import Footprint, Gate, Metric, Quality, Report, Speed, Timing
from compress.report import format as fmt
from compress.report.detail_rows import detail_tables, operator_table
from compress.report.format import NOT_MEASURED, clean
from compress.report.table import Block, Page, Table, capped
from compress.report.verdict import RELATIVE, metric_name

_METRIC_ORDER = ("perplexity", "accuracy", "accuracy_change", "kl", "top1_agreement", "nll_change")
_NONE = "-"  # a cell that does not apply, as against one that was not measured


def build_page(report: Report) -> Page:
    """Everything that any page shows of this report."""
    unmet = any(not gate.met for gate in report.gates)
    disagrees = report.verification is not None and not report.verification.agrees
    sizes = report.source_bytes, report.artifact_bytes
    main = (
        quality_table(report.baseline_quality, report.artifact_quality, report.memory_quality, sizes),
        gate_table(report.gates),
        speed_table(report.speed),
        footprint_table(report.speed),
        operator_table(report),
    )
    return Page(
        title=clean(report.title),
        verdict=clean(report.verdict, limit=2000),
        failed=unmet or disagrees,
        facts=_facts(report),
        main=tuple(table for table in main if table.rows or table.empty),
        warnings=_warnings(report),
        details=tuple(table for table in detail_tables(report) if table.rows or table.empty),
        blocks=_blocks(report),
    )


def quality_table(
    baseline: Quality | None, artifact: Quality | None, memory: Quality | None, sizes: tuple[int, int] | None = None
) -> Table:
    """The baseline on top, then the artifact as its runtime computes it, then the model before lowering.

    Args: sizes: bytes of the source and of the artifact; without them there is no such column.
    """
    arms = (("baseline", baseline), ("artifact in runtime", artifact), ("in memory", memory))
    known = [quality for _, quality in arms if quality]
    keys = _metric_keys(known)
    rows = [
        (_arm_name(name, quality), *([_metric_cell(key, quality) for key in keys] or [NOT_MEASURED]))
        for name, quality in arms
    ]
    columns = ("model", *([_metric_header(key, known) for key in keys] or ["quality"]))
    title = "Quality"
    if sizes:
        title, columns = "Size and quality", (columns[0], "size", *columns[1:])
        counts = (*map(_size, sizes), _NONE)
        rows = [(row[0], count, *row[1:]) for row, count in zip(rows, counts, strict=True)]
    notes = _quality_notes(known, keys)
    return Table("quality", title, columns, "l" + "r" * (len(columns) - 1), tuple(rows), notes=notes)


def gate_table(gates: Sequence[Gate]) -> Table:
    """What the recipe asked for and what was found, at the worse end of the interval."""
    rows = [
        (metric_name(gate.name), *reversed(fmt.told_apart(gate.found, gate.bound)), "met" if gate.met else "FAILED")
        for gate in gates
    ]
    columns = ("gate", "bound", "found, worse end of the interval", "result")
    return Table("gates", "Gates", columns, "lrrl", tuple(rows), empty="no gates were set")


def speed_table(speed: Speed | None) -> Table:
    """One row per setting, both arms in it, with the noise floor beside the speed-up."""
    timings = speed.timings if speed else ()
    unit = "images" if any(timing.phase == "infer" for timing in timings) else "tokens"
    columns = (
        "phase", "batch", "prompt", "baseline ms", "variant ms", f"baseline {unit}/s", f"variant {unit}/s", "speed-up",
        "noise floor", "verdict",
    )  # fmt: skip
    rows, notes = capped((_timing_row(timing) for timing in timings), _speed_notes(speed))
    return Table("speed", "Speed", columns, "lrrrrrrrrl", rows, keys=3, notes=notes)


def footprint_table(speed: Speed | None) -> Table:
    """Disk, load time and peak memory of both arms in the runtime, and the change."""
    if speed is None:
        return Table("footprint", "Footprint", (), "", ())
    before, after = speed.baseline, speed.variant
    rows = (_footprint_row("baseline", before), _footprint_row("variant", after), _footprint_change(before, after))
    note = "Files as they are deployed in the runtime, which may differ from the source file."
    columns = ("arm", "disk", "load time", "peak memory")
    return Table("footprint", "Footprint", columns, "lrrr", rows, notes=(note,))


def speed_warnings(speed: Speed | None) -> list[str]:
    """What the timing had to say, each with its setting."""
    return [f"{timing.name}: {text}" for timing in speed.timings for text in timing.warnings] if speed else []


def speedup_text(timing: Timing) -> str:
    """`1.62x (1.55 to 1.69)`."""
    return fmt.with_interval(fmt.speedup(timing.speedup, timing.interval), timing.interval)


def _facts(report: Report) -> tuple[tuple[str, str], ...]:
    facts = (
        ("source", report.source),
        ("recipe", report.recipe if len(report.recipe.splitlines()) == 1 else ""),
        ("profile", report.profile),
        ("target", report.target),
        ("created", report.created),
    )
    return tuple((name, clean(value, limit=120)) for name, value in facts if value.strip())


def _arm_name(name: str, quality: Quality | None) -> str:
    # The row's own name says "in memory" already.
    return f"{name} ({clean(quality.where.removesuffix(', in memory'))})" if quality else name


def _metric_keys(known: list[Quality]) -> list[str]:
    found = list(dict.fromkeys(key for quality in known for key in quality.metrics))
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
        return fmt.with_interval(fmt.metric_parts(metric), metric.interval)
    is_reference = quality is not None and quality.subject == "baseline" and key in RELATIVE
    return "reference" if is_reference else NOT_MEASURED


def _first_metric(key: str, known: Iterable[Quality]) -> Metric:
    return next(quality.metrics[key] for quality in known if key in quality.metrics)


def _quality_notes(known: list[Quality], keys: list[str]) -> tuple[str, ...]:
    if not known:
        return ()
    notes = ["Intervals in brackets are 95% unless they name another level."]
    grouped: dict[str, list[str]] = {}
    for key in keys:
        metric = _first_metric(key, known)
        how = f"{metric.better} is better, {metric.samples} independent samples, protocol {clean(metric.protocol)}"
        grouped.setdefault(how, []).append(metric_name(key))
    notes += [f"{', '.join(names)}: {how}." for how, names in grouped.items()]
    digests = list(dict.fromkeys(clean(quality.data_digest) for quality in known))
    if len(digests) > 1:
        notes.append(f"CAUTION: these rows were not computed on the same data ({', '.join(digests)}).")
    return tuple(notes)


def _timing_row(timing: Timing) -> tuple[str, ...]:
    noise = fmt.speedup(1.0, timing.control)[1]
    return (
        timing.phase,
        str(timing.batch),
        _NONE if timing.phase == "infer" else str(timing.prompt),
        fmt.significant(1000 * timing.baseline_s),
        fmt.significant(1000 * timing.variant_s),
        fmt.significant(timing.baseline_tokens_per_s),
        fmt.significant(timing.variant_tokens_per_s),
        speedup_text(timing),
        noise,
        timing.verdict,
    )


def _speed_notes(speed: Speed | None) -> tuple[str, ...]:
    if speed is None:
        return ()
    rounds = sorted({timing.rounds for timing in speed.timings})
    span = f", {' to '.join(str(count) for count in dict.fromkeys((rounds[0], rounds[-1])))} rounds" if rounds else ""
    threads = fmt.count(speed.threads, "thread")
    return (
        f"Both arms in {clean(speed.runtime)} with {threads}{span}; times are medians per call.",
        "Speed-up with its interval, 95% unless another level is named; above 1 the variant is faster. "
        "The noise floor is the baseline timed against itself: no smaller difference counts.",
    )


def _footprint_row(name: str, arm: Footprint) -> tuple[str, ...]:
    load = NOT_MEASURED if arm.load_s is None else fmt.duration(arm.load_s)
    peak = NOT_MEASURED if arm.peak_memory_bytes is None else fmt.size(arm.peak_memory_bytes)
    return name, _size(arm.disk_bytes), load, peak


def _footprint_change(before: Footprint, after: Footprint) -> tuple[str, ...]:
    load = ""
    if before.load_s and after.load_s:
        ratio = before.load_s / after.load_s
        load = f"{fmt.short(ratio)}x faster" if ratio >= 1 else f"{fmt.short(1 / ratio)}x slower"
    peak = fmt.times_smaller(before.peak_memory_bytes or 0, after.peak_memory_bytes or 0)
    return "change", fmt.times_smaller(before.disk_bytes, after.disk_bytes) or _NONE, load or _NONE, peak or _NONE


def _size(count: int) -> str:
    return fmt.size(count) if count > 0 else NOT_MEASURED


def _warnings(report: Report) -> tuple[str, ...]:
    planned = (*report.plan.warnings, *report.plan.refusals) if report.plan else ()
    texts = [text for text in report.warnings if text not in planned]
    texts += [*speed_warnings(report.speed), *(f"plan: {text}" for text in planned)]
    shown = [clean(text, limit=600) for text in dict.fromkeys(texts)]
    limit = 40
    return tuple(shown) if len(shown) <= limit else (*shown[:limit], f"{len(shown) - limit} more are in report.json.")


def _blocks(report: Report) -> tuple[Block, ...]:
    command = Block("Exact command", fmt.clean_block(report.command) or "not recorded")
    recipe = Block("Recipe", fmt.clean_block(report.recipe) or "not recorded")
    verify = Block(
        "How to verify",
        "compress verify OUT",
        "OUT is the folder that holds this report. The command holds every file against the sizes and sha256 digests "
        "of manifest.json and runs the artifact again in its runtime, on the machine it was made for.",
    )
    return command, recipe, verify
