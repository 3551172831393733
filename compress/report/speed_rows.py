"""Tables of speed: settings, footprint, what each arm took at which moment, percentiles, rounds, grids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from compress.records import Footprint, Speed, SpeedVerdict, Timing
from compress.records.speed import LONGER, ArmTiming, BestAgainstBest
from compress.report import format as fmt
from compress.report.end_to_end_rows import end_to_end_table, energy_table
from compress.report.format import NOT_MEASURED, clean
from compress.report.operator_rows import operator_table
from compress.report.table import Row, Table, capped
from compress.speed.disturbance import WORDS

GROUP = "Speed in detail"
_NONE = "-"  # a cell that does not apply, as against one that was not measured
_LEGEND: dict[SpeedVerdict, str] = {
    "faster": "faster: the whole interval lies above 1 and beyond the noise floor.",
    "slower": "slower: the whole interval lies below 1 and beyond the noise floor.",
    "same": "same: the whole interval lies within 1% of 1, or within a noise floor of at most 5%.",
    "inconclusive": "inconclusive: none of faster, slower and same can be said; more rounds "
    f"({LONGER}) or a quieter machine would narrow the interval.",
}


def speed_table(speed: Speed | None) -> Table:
    """One row per setting, both arms in it, with the noise floor beside the speed-up."""
    timings = speed.timings if speed else ()
    unit = "samples" if any(timing.phase == "infer" for timing in timings) else "tokens"
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
    note = (
        "Disk: files as the runtime loads them. The baseline's are not the source's: it is exported as the variant is."
    )
    columns: tuple[str, ...] = ("arm", "disk", "load time", "peak memory")
    old, new = before.cache_bytes, after.cache_bytes
    if not old or not new or old == new:
        return Table("footprint", "Footprint", columns, "lrrr", rows, notes=(note,))
    cells = fmt.size(old), fmt.size(new), fmt.times_smaller(old, new) or _NONE
    told = f"Cache: keys and values of one sequence of {after.cache_tokens} tokens, with scales, scores and positions."
    wider = tuple((*row, cell) for row, cell in zip(rows, cells, strict=True))
    return Table("footprint", "Footprint", (*columns, "cache"), "lrrrr", wider, notes=(note, told))


def speed_details(speed: Speed | None) -> tuple[Table, ...]:
    """Where a request's time goes, the grids and best batches, percentiles, and what disturbed the rounds."""
    if speed is None:
        return ()
    grids = (_grid_table(phase, speed.timings) for phase in dict.fromkeys(timing.phase for timing in speed.timings))
    energy = energy_table(speed)
    made = (
        _span_table(speed),
        operator_table(speed),
        end_to_end_table(speed),
        energy,
        *grids,
        _best_table(speed.best),
        _percentile_table(speed),
        _round_table(speed),
    )
    # without a figure of energy its note says why
    return tuple(replace(table, group=GROUP) for table in made if table.rows or (table is energy and table.notes))


def speed_warnings(speed: Speed | None) -> list[str]:
    """What the timing had to say, each with its setting; the same words at several settings once."""
    if speed is None:
        return []
    groups: dict[str, list[tuple[str, str]]] = {}
    for timing in speed.timings:
        for text in timing.warnings:
            # what differs only in its figures is one thing to know
            kind = re.sub(r"[\d.]+", "#", text.partition(" (")[0])
            groups.setdefault(kind, []).append((timing.name, text))
    return [_warning(found) for found in groups.values()]


def speedup_text(timing: Timing) -> str:
    """`1.62x (1.55 to 1.69)`."""
    return fmt.speedup_text(timing.speedup, timing.interval)


def spans(speed: Speed) -> list[tuple[str, float, float]]:
    """Name, and seconds of the baseline and of the variant, of each part of a request that was timed in both."""
    made: list[tuple[str, float | None, float | None]] = [
        ("load", speed.baseline.load_s, speed.variant.load_s),
        ("first call after loading", speed.baseline.first_call_s, speed.variant.first_call_s),
    ]
    timed = [(each, each.baseline_arm, each.variant_arm) for each in speed.timings]
    arms = [(each, before, after) for each, before, after in timed if before and after]
    for each, before, after in arms:
        made.append((f"first token, prompt {each.prompt}", before.first_token_s, after.first_token_s))
    for each, before, after in arms:
        made.append((_per_token(each), before.per_token_s, after.per_token_s))
    calls = [each for each in speed.timings if each.phase in ("infer", "encode")]
    made += [(f"one call, batch {each.batch}", each.baseline_s, each.variant_s) for each in calls]
    return [(name, before, after) for name, before, after in made if before and after]


def _per_token(timing: Timing) -> str:
    return f"further token, batch {timing.batch} prompt {timing.prompt}"


def _warning(found: Sequence[tuple[str, str]]) -> str:
    name, text = found[0]
    names = [name for name, _ in found[1:]]
    if not names:
        return f"{name}: {text}"
    return f"{name}: {text}; likewise at {fmt.count(len(names), 'other setting')}"


def _timing_row(timing: Timing) -> Row:
    return (
        timing.phase,
        str(timing.batch),
        _NONE if timing.phase == "infer" else str(timing.prompt),
        fmt.significant(1000 * timing.baseline_s),
        fmt.significant(1000 * timing.variant_s),
        fmt.significant(timing.baseline_tokens_per_s),
        fmt.significant(timing.variant_tokens_per_s),
        speedup_text(timing),
        fmt.speedup(1.0, timing.control)[1],
        timing.verdict,
    )


def _speed_notes(speed: Speed | None) -> tuple[str, ...]:
    if speed is None:
        return ()
    rounds = sorted({timing.rounds for timing in speed.timings})
    span = f", {' to '.join(str(count) for count in dict.fromkeys((rounds[0], rounds[-1])))} rounds" if rounds else ""
    threads = fmt.count(speed.threads, "thread")
    processes = f" in {speed.processes} fresh processes" if speed.processes > 1 else ""
    loads = _loads_note(speed.timings)
    words = dict.fromkeys(timing.verdict for timing in speed.timings)
    return (
        f"Both arms in {clean(speed.runtime)} with {threads}{span}{processes}; times are medians per call.",
        "Speed-up with its interval, 95% unless another level is named; above 1 the variant is faster. "
        "The noise floor is the interval of the baseline timed against itself: no smaller difference counts.",
        *((loads,) if loads else ()),
        *(_LEGEND[word] for word in _LEGEND if word in words),
    )


def _loads_note(timings: Sequence[Timing]) -> str:
    """Empty where everything was loaded once."""
    several = [timing for timing in timings if timing.loads > 1]
    if not several:
        return ""
    counts = sorted({timing.loads for timing in several})
    loads = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    spreads = [timing.load_spread for timing in several if timing.load_spread is not None]
    apart = f", which alone moved it by {fmt.percent(max(spreads))} (one standard deviation)" if spreads else ""
    return f"Speed-up over {loads} loads of both arms per setting{apart}; the interval takes loads for clusters."


def _footprint_row(name: str, arm: Footprint) -> Row:
    load = NOT_MEASURED if arm.load_s is None else fmt.duration(arm.load_s)
    peak = NOT_MEASURED if arm.peak_memory_bytes is None else fmt.size(arm.peak_memory_bytes)
    return name, fmt.size(arm.disk_bytes) if arm.disk_bytes > 0 else NOT_MEASURED, load, peak


def _footprint_change(before: Footprint, after: Footprint) -> Row:
    load = _ratio(before.load_s, after.load_s) if before.load_s and after.load_s else _NONE
    peak = fmt.times_smaller(before.peak_memory_bytes or 0, after.peak_memory_bytes or 0)
    return "change", fmt.times_smaller(before.disk_bytes, after.disk_bytes) or _NONE, load, peak or _NONE


def _ratio(before: float, after: float) -> str:
    ratio = before / after
    if 0.995 < ratio < 1.005:
        return "the same"
    return f"{fmt.short(ratio)}x faster" if ratio >= 1 else f"{fmt.short(1 / ratio)}x slower"


def _span_table(speed: Speed) -> Table:
    rows, notes = capped(
        ((name, fmt.duration(old), fmt.duration(new), _ratio(old, new)) for name, old, new in spans(speed)),
        ("Medians, without intervals. Load and the first call are of a fresh process each.",),
    )
    columns = ("part of a request", "baseline", "variant", "change")
    return Table("spans", "Where the time goes", columns, "lrrr", rows, notes=notes)


def _grid_table(phase: str, timings: Iterable[Timing]) -> Table:
    """Batches down, prompts across; none where there is only one of either."""
    found = {(timing.batch, timing.prompt): timing for timing in timings if timing.phase == phase}
    batches, prompts = (sorted({key[place] for key in found}) for place in (0, 1))
    if len(batches) < 2 or len(prompts) < 2:
        return Table(f"grid-{phase}", "", (), "", ())
    rows, notes = capped((str(batch), *(_grid_cell(found, batch, prompt) for prompt in prompts)) for batch in batches)
    columns = ("batch", *(f"prompt {prompt}" for prompt in prompts))
    return Table(f"grid-{phase}", f"Speed-up of {phase}", columns, "r" * len(columns), rows, notes=notes)


def _grid_cell(found: dict[tuple[int, int], Timing], batch: int, prompt: int) -> str:
    timing = found.get((batch, prompt))
    return NOT_MEASURED if timing is None else f"{speedup_text(timing)} {timing.verdict}"


def _best_table(best: Sequence[BestAgainstBest]) -> Table:
    rows, notes = capped(map(_best_row, best), ("Each arm at the batch where its throughput is largest.",))
    columns = ("phase", "prompt", "baseline's best", "variant's best", "ratio", "at the same batch")
    return Table("best", "Best against best", columns, "lrrrrl", rows, keys=2, notes=notes)


def _best_row(one: BestAgainstBest) -> Row:
    unit = "samples" if one.phase == "infer" else "tokens"
    before = f"{fmt.significant(one.baseline_tokens_per_s)} {unit}/s, batch {one.baseline_batch}"
    after = f"{fmt.significant(one.variant_tokens_per_s)} {unit}/s, batch {one.variant_batch}"
    same = ", ".join(f"batch {batch}: {fmt.significant(ratio)}x" for batch, ratio in sorted(one.same_setting.items()))
    ratio = f"{fmt.significant(one.ratio)}x (no interval)"
    if one.interval:
        ratio = fmt.speedup_text(one.ratio, one.interval)
    return one.phase, _NONE if one.phase == "infer" else str(one.prompt), before, after, ratio, clean(same)


def _percentile_table(speed: Speed) -> Table:
    rows = [row for timing in speed.timings for row in _percentile_rows(timing)]
    told = "Of single calls. A percentile that the calls are too few for says how many it needs."
    kept, notes = capped(rows, (told,))
    columns = ("setting", "arm", "calls", "p50", "p90", "p95", "p99")
    return Table("percentiles", "Percentiles of latency", columns, "llrrrrr", kept, keys=2, notes=notes)


def _percentile_rows(timing: Timing) -> Iterable[Row]:
    arms: tuple[tuple[str, ArmTiming | None], ...] = (
        ("baseline", timing.baseline_arm),
        ("variant", timing.variant_arm),
    )
    for name, arm in arms:
        if arm and (found := arm.percentiles):
            texts = (found.text(label) if label in found.seconds else _NONE for label in ("p50", "p90", "p95", "p99"))
            yield timing.name, name, str(found.calls), *texts


def _round_table(speed: Speed) -> Table:
    rows, notes = capped(
        _round_row(timing) for timing in speed.timings if timing.every_round and timing.every_round.disturbed
    )
    columns = ("setting", "rounds", "disturbed", "by", "left out", "speed-up with every round")
    return Table("rounds", "Disturbed rounds", columns, "lrrllr", rows, notes=notes)


def _round_row(timing: Timing) -> Row:
    found = timing.every_round
    assert found is not None
    causes = ", ".join(f"{WORDS.get(name) or clean(name)} {count}" for name, count in found.causes.items())
    every = fmt.speedup_text(found.speedup, found.interval)
    return timing.name, str(found.rounds), str(found.disturbed), causes, "yes" if found.left_out else "no", every
