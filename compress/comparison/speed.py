"""The speed of two artifacts: through the baseline where both were timed against the same one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from compress.comparison.changes import Named, changed, uncompared, without_intervals
from compress.comparison.figures import Figure, difference, excludes, exp, mapped, ratio
from compress.comparison.records import Change
from compress.records import Report, Speed, Timing
from compress.report.format import clean, percent

STABLE = ("system", "architecture", "os", "cpu", "cores", "isa", "gpu", "driver")
"""What of a machine's description two latencies must have in common; what changes from hour to hour is not in it."""
_AS_IT_IS = "no interval: compared as it is"


def unlike(before: Speed | None, after: Speed | None) -> list[str]:
    """What of machine, runtime and threads two timings do not have in common; nothing where one was not measured."""
    if before is None or after is None:
        return []
    first, second = _footing(before), _footing(after)
    return [
        f"{key} {clean(first.get(key, 'not recorded'), 80)} against {clean(second.get(key, 'not recorded'), 80)}"
        for key in dict.fromkeys((*first, *second))
        if first.get(key) != second.get(key)
    ]


def speed_changes(before: Report, after: Report, is_cross: bool) -> list[Change]:
    """Latency and speed-up at every setting of either report, peak memory and load time.

    is_cross: the machines differ, so that only speed-ups can be compared.
    """
    if before.speed is None and after.speed is None:
        return []
    first, second = _timings(before.speed), _timings(after.speed)
    names = list(dict.fromkeys((*first, *second)))
    is_shared = before.source_digest == after.source_digest and before.target == after.target
    found = [_latency(name, first.get(name), second.get(name), is_shared, is_cross) for name in names]
    found += [_speedup(name, first.get(name), second.get(name)) for name in names]
    one, two = (report.speed.variant if report.speed else None for report in (before, after))
    peaks = one.peak_memory_bytes if one else None, two.peak_memory_bytes if two else None
    found.append(without_intervals(Named("peak_memory", "memory", "bytes"), peaks[0], peaks[1], _AS_IT_IS))
    loads = one.load_s if one else None, two.load_s if two else None
    named = Named("load_time", "load", "s")
    if is_cross:
        return [*found, uncompared(named, _known(loads[0]), _known(loads[1]), "other machines")]
    return [*found, without_intervals(named, loads[0], loads[1], _AS_IT_IS)]


def drift(before: Report, after: Report) -> str:
    """A remark where the baseline, the same in both, took another time than the noise of both can explain."""
    if before.source_digest != after.source_digest or before.target != after.target:
        return ""
    first, second = _timings(before.speed), _timings(after.speed)
    told = []
    for name in (name for name in first if name in second):
        factor = ratio(Figure(value=first[name].baseline_s), Figure(value=second[name].baseline_s))
        floor = _floor(first[name], second[name])
        if factor is not None and excludes(factor, 1 / floor, floor):
            word = "longer" if factor.value > 1 else "shorter"
            told.append(f"{name} {percent(abs(factor.value - 1))} {word}")
    if not told:
        return ""
    return (
        f"The baseline itself took another time in B: {', '.join(told)}. Either the machine was busier or freer, or "
        "the baseline is written otherwise now. Changes of latency are told against it."
    )


def _latency(name: str, first: Timing | None, second: Timing | None, is_shared: bool, is_cross: bool) -> Change:
    named = Named(f"latency:{name}", "latency", "s")
    if first is None or second is None:
        known = _known(first.variant_s if first else None), _known(second.variant_s if second else None)
        return uncompared(named, known[0], known[1], "not timed in both")
    one, two = Figure(value=first.variant_s), Figure(value=second.variant_s)
    if not is_shared and not is_cross:
        note = "other baselines: medians without an interval, compared as they are"
        return changed(named, one, two, difference(one, two), ratio(one, two), note)
    # latency in units of the baseline's is 1 / speed-up
    factor = ratio(_figure(second), _figure(first))
    note = "by the speed-up over each one's own baseline" if is_cross else "through the baseline of both"
    gap = None if is_cross or factor is None else mapped(factor, lambda value: one.value * (value - 1))
    return changed(named, one, two, gap, factor, note, _floor(first, second))


def _speedup(name: str, first: Timing | None, second: Timing | None) -> Change:
    named = Named(f"speedup:{name}", "speedup", "x", "higher")
    if first is None or second is None:
        known = _figure(first) if first else None, _figure(second) if second else None
        return uncompared(named, known[0], known[1], "not timed in both")
    one, two = _figure(first), _figure(second)
    return changed(named, one, two, difference(one, two), ratio(one, two), "", _floor(first, second))


def _known(value: float | None) -> Figure | None:
    return Figure(value=value) if value else None


def _floor(first: Timing, second: Timing) -> float:
    """The ratio >= 1 that the noise of both runs makes by itself."""
    return exp(math.hypot(*(_noise(timing) for timing in (first, second))))


def _noise(timing: Timing) -> float:
    """How far the baseline lies from itself, on the log scale."""
    low, high = timing.control.low, timing.control.high
    return max(abs(math.log(end)) if end > 0 else math.inf for end in (low, high))


def _footing(speed: Speed) -> dict[str, str]:
    machine = {key: speed.machine[key] for key in STABLE if key in speed.machine}
    return {**machine, "runtime": speed.runtime, "threads": str(speed.threads)}


def _timings(speed: Speed | None) -> Mapping[str, Timing]:
    return {timing.name: timing for timing in speed.timings} if speed else {}


def _figure(timing: Timing) -> Figure:
    return Figure(value=timing.speedup, interval=timing.interval)
