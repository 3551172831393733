"""The one sentence on top of a report: bad news first, nothing claimed that was not measured."""

from __future__ import annotations

from collections.abc import Sequence

from compress.records import Gate, Metric, Quality, Speed, Timing, Verification
from compress.report import format as fmt
from compress.report.metric_names import is_relative, metric_name

__all__ = ["headline_metric", "headline_timing", "metric_name", "verdict_sentence"]

_HEADLINE_METRICS = ("kl", "perplexity", "accuracy", "accuracy_change", "cosine")
_MAX_NAMED = 3


def headline_timing(speed: Speed | None) -> Timing | None:
    """See `leading`; None where nothing was timed."""
    return speed.lead if speed is not None and speed.timings else None


def headline_metric(quality: Quality | None) -> tuple[str, Metric] | None:
    """The figure that says what compression cost: one that compares with the original where there is one."""
    if quality is None or not quality.metrics:
        return None
    first = ("accuracy_change", "kl", "cosine", "relative_error")
    key = next((key for key in first if key in quality.metrics), next(iter(quality.metrics)))
    return key, quality.metrics[key]


def verdict_sentence(
    *,
    source_bytes: int,
    artifact_bytes: int,
    speed: Speed | None = None,
    baseline_quality: Quality | None = None,
    artifact_quality: Quality | None = None,
    memory_quality: Quality | None = None,
    verification: Verification | None = None,
    gates: Sequence[Gate] = (),
) -> str:
    """Everything of a report that matters, in one sentence."""
    agrees = verification is not None and verification.agrees
    clauses = [] if verification is None or agrees else [_disagreement(verification)]
    failed = [gate for gate in gates if not gate.met]
    if failed:
        clauses.append(_failed_gates(failed))
    findings = [*_speed(speed), _size(source_bytes, artifact_bytes) + _size_only(speed, source_bytes, artifact_bytes)]
    findings += _cache(speed)
    findings.append(_quality(baseline_quality, artifact_quality, memory_quality))
    clauses.append(", ".join(findings))
    if verification is None:
        clauses.append(f"agreement of the artifact with the model {fmt.NOT_MEASURED}")
    elif agrees:
        clauses.append(_agreement(verification))
    return "; ".join(clauses) + "."


def _disagreement(found: Verification) -> str:
    runtime = fmt.clean(found.runtime)
    if found.level == "checked":
        return f"the artifact was NOT accepted: it breaks the rules of {runtime}"
    difference = fmt.told_apart(found.max_relative_difference, found.bound)
    return (
        f"the artifact {_reached(found.level, runtime)} and did NOT agree with the model "
        "(largest relative difference {}, bound {}, ".format(*difference)
        + f"same top token at {fmt.percent(found.top1_agreement)} "
        f"of {found.positions} positions)"
    )


def _agreement(found: Verification) -> str:
    runtime = fmt.clean(found.runtime)
    if found.level == "checked":
        return f"the artifact was only checked against the rules of {runtime}, it has not run"
    return f"the artifact {_reached(found.level, runtime)} and agreed"


def _reached(level: str, runtime: str) -> str:
    if level == "ran":
        return f"ran in {runtime}"
    return f"was built for {runtime} but not run there, its graph ran elsewhere"


def _failed_gates(failed: Sequence[Gate]) -> str:
    named = ", ".join(
        "{} (found {}, bound {})".format(metric_name(gate.name), *fmt.told_apart(gate.found, gate.bound))
        for gate in failed
    )
    return f"{'gate' if len(failed) == 1 else 'gates'} FAILED: {named}"


def _speed(speed: Speed | None) -> list[str]:
    headline = headline_timing(speed)
    if speed is None or headline is None:
        return [f"speed {fmt.NOT_MEASURED}"]
    findings = [_headline(headline)]
    if all(timing.verdict != "faster" for timing in speed.timings):
        findings.append("no setting was faster")
    others = [timing for timing in speed.timings if timing is not headline]
    for word in ("faster", "slower"):
        named = [timing for timing in others if timing.verdict == word]
        if named and word != headline.verdict:
            findings.append(f"{word} at {_named(named)}")
    open_count = sum(timing.verdict == "inconclusive" for timing in others)
    if open_count:
        findings.append(f"inconclusive at {open_count} other {'setting' if open_count == 1 else 'settings'}")
    return findings


def _headline(timing: Timing) -> str:
    value, bounds = fmt.speedup(timing.speedup, timing.interval)
    interval = f"{fmt.level(timing.interval)} {bounds}"
    interval += f"; provisional: {timing.provisional}" if timing.provisional else ""
    if timing.verdict == "faster":
        return f"{timing.name} is {value} faster ({interval})"
    if timing.verdict == "slower":
        return f"{timing.name} is slower, {value} the baseline's speed ({interval})"
    if timing.verdict == "same":
        return f"{timing.name} is as fast as the baseline, {value} ({interval})"
    return f"the speed at {timing.name} is inconclusive ({value}, {interval})"


def _named(timings: Sequence[Timing]) -> str:
    shown = [f"{timing.name} ({fmt.speedup(timing.speedup, timing.interval)[0]})" for timing in timings]
    if len(shown) <= _MAX_NAMED:
        return " and ".join(shown)
    return f"{', '.join(shown[:_MAX_NAMED])} and {len(shown) - _MAX_NAMED} more settings"


def _size(source_bytes: int, artifact_bytes: int) -> str:
    change = fmt.times_smaller(source_bytes, artifact_bytes)
    if not change:
        return f"size {fmt.NOT_MEASURED}"
    change = "the same size as" if change == "the same" else f"{change} than"
    return f"{change} the source ({fmt.size(artifact_bytes)} from {fmt.size(source_bytes)})"


def _cache(speed: Speed | None) -> list[str]:
    """Where keys and values are kept otherwise than the baseline's."""
    if speed is None or not speed.baseline.cache_bytes or not speed.variant.cache_bytes:
        return []
    old, new = speed.baseline.cache_bytes, speed.variant.cache_bytes
    if old == new:
        return []
    told = f"{fmt.size(new)} from {fmt.size(old)}"
    return [f"the cache of {speed.variant.cache_tokens} tokens {fmt.times_smaller(old, new)} ({told})"]


def _size_only(speed: Speed | None, source_bytes: int, artifact_bytes: int) -> str:
    """Where it was timed, is smaller, and is surely no faster anywhere."""
    timed = speed.timings if speed is not None else ()
    smaller = 0 < artifact_bytes < source_bytes and fmt.times_smaller(source_bytes, artifact_bytes) != "the same"
    return ": size only" if smaller and timed and all(one.verdict in ("same", "slower") for one in timed) else ""


def _quality(baseline: Quality | None, artifact: Quality | None, memory: Quality | None) -> str:
    found = artifact or memory
    if found is None or not found.metrics:
        return f"quality {fmt.NOT_MEASURED}"
    keys = [key for key in _HEADLINE_METRICS if key in found.metrics] or [next(iter(found.metrics))]
    text = ", ".join(_metric(key, found.metrics[key], baseline) for key in keys)
    if artifact:
        return text
    return f"in memory before lowering {text}, quality of the artifact {fmt.NOT_MEASURED}"


def _metric(key: str, metric: Metric, baseline: Quality | None) -> str:
    if not is_relative(key):
        before = baseline.metrics.get(key) if baseline else None
        against = fmt.plain(before) if before else f"a baseline {fmt.NOT_MEASURED}"
        return f"{metric_name(key)} {fmt.plain(metric)} against {against}"
    value, bounds = fmt.metric_parts(metric)
    interval = f" ({fmt.level(metric.interval)} {bounds})" if metric.interval and bounds else ""
    return f"{metric_name(key)} {value}{fmt.unit_text(metric.unit, ' ')}{interval}"
