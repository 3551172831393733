"""Paired samples as the report's records, alone and over several processes: pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from compress.records.base import Interval
from compress.records.speed import (
    FEW_ROUNDS,
    LONGER,
    UNSETTLED,
    ArmTiming,
    BestAgainstBest,
    EveryRound,
    Percentiles,
    Phase,
    Timing,
)
from compress.speed.disturbance import WORDS
from compress.speed.paired_samples import PairedSamples
from compress.stats.intervals import (
    calls_needed,
    combine_processes,
    drift,
    noise_floor,
    percentile,
    speed_verdict,
)

DRIFT_P = 0.01
_AGAIN = f"Time it longer: {LONGER}"
LEAST_PROCESSES = 3
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


def timing_record(
    samples: PairedSamples,
    baseline: str,
    variant: str,
    *,
    phase: Phase,
    batch: int,
    prompt: int,
    tokens_per_call: float,
) -> Timing:
    """The report's record of one variant against the baseline; `tokens_per_call` counts the whole batch."""
    if baseline != samples.baseline:
        raise ValueError(f"the control was taken for {samples.baseline!r}, so {baseline!r} cannot be the baseline")
    if variant not in samples.seconds or variant == baseline:
        raise ValueError(f"no variant {variant!r} among the arms {', '.join(samples.seconds)} next to {baseline!r}")
    if tokens_per_call <= 0:
        raise ValueError(f"tokens_per_call must be positive, found {tokens_per_call}")
    (ratio, interval), control = samples.speedup(variant), samples.control_interval()
    baseline_s, variant_s = (float(np.median(samples.seconds[name][samples.kept])) for name in (baseline, variant))
    return Timing(
        phase=phase,
        batch=batch,
        prompt=prompt,
        rounds=int(samples.kept.sum()),
        baseline_s=baseline_s,
        variant_s=variant_s,
        baseline_tokens_per_s=tokens_per_call / baseline_s,
        variant_tokens_per_s=tokens_per_call / variant_s,
        speedup=ratio,
        interval=interval,
        control=control,
        verdict=speed_verdict(interval, control),
        baseline_arm=_arm(samples, baseline, baseline_s, phase, batch),
        variant_arm=_arm(samples, variant, variant_s, phase, batch),
        every_round=_every_round(samples, variant),
        loads=samples.load_count,
        load_spread=samples.load_spread(variant),
        warnings=timing_warnings(samples, variant),
    )


def over_processes(found: Sequence[Timing]) -> Timing:
    """One setting's timings in several fresh processes as one: times are medians over the processes, the speed-up and
    the control are combined by `combine_processes`. At least three. Raises: ValueError for fewer, or mixed settings."""
    first = found[0]
    if len(found) < LEAST_PROCESSES or any(each.name != first.name for each in found):
        raise ValueError(
            f"needs one setting in at least {LEAST_PROCESSES} processes, found {[each.name for each in found]}"
        )
    ratio, interval = combine_processes([each.speedup for each in found], [each.interval for each in found])
    centres = [math.sqrt(each.control.low * each.control.high) for each in found]
    _, control = combine_processes(centres, [each.control for each in found])
    medians = ("baseline_s", "variant_s", "baseline_tokens_per_s", "variant_tokens_per_s")
    said = (f"process {place}: {text}" for place, each in enumerate(found, 1) for text in each.warnings)
    return first.model_copy(
        update={
            **{name: float(np.median([getattr(each, name) for each in found])) for name in medians},
            "rounds": sum(each.rounds for each in found),
            "speedup": ratio,
            "interval": interval,
            "control": control,
            "verdict": speed_verdict(interval, control),
            "baseline_arm": _arm_over([each.baseline_arm for each in found]),
            "variant_arm": _arm_over([each.variant_arm for each in found]),
            "every_round": _every_round_over([each.every_round for each in found]),
            "process_speedups": tuple(each.speedup for each in found),
            "loads": sum(each.loads for each in found),
            "load_spread": _median([each.load_spread for each in found]),
            "warnings": (*said, *_control_warning(control)),
        }
    )


def best_against_best(timings: Sequence[Timing]) -> tuple[BestAgainstBest, ...]:
    """Per phase and prompt, each arm's best throughput over the batches, beside the ratio at each batch.

    A prompt that was timed at one batch only has no best and is left out.
    """
    sweeps: dict[tuple[Phase, int], list[Timing]] = {}
    for timing in timings:
        sweeps.setdefault((timing.phase, timing.prompt), []).append(timing)
    return tuple(_best(sweep) for sweep in sweeps.values() if len(sweep) > 1)


def _best(sweep: list[Timing]) -> BestAgainstBest:
    before = max(sweep, key=lambda timing: timing.baseline_tokens_per_s)
    after = max(sweep, key=lambda timing: timing.variant_tokens_per_s)
    at_one = before.batch == after.batch
    ratio = before.speedup if at_one else after.variant_tokens_per_s / before.baseline_tokens_per_s
    return BestAgainstBest(
        phase=before.phase,
        prompt=before.prompt,
        baseline_batch=before.batch,
        variant_batch=after.batch,
        baseline_tokens_per_s=before.baseline_tokens_per_s,
        variant_tokens_per_s=after.variant_tokens_per_s,
        ratio=ratio,
        interval=before.interval if at_one else None,
        same_setting={timing.batch: timing.speedup for timing in sweep},
    )


def _arm(samples: PairedSamples, name: str, call_s: float, phase: Phase, batch: int) -> ArmTiming:
    """Reading a prompt of one sequence gives its first token; a decode step one more of each sequence (§1.4)."""
    return ArmTiming(
        first_call_s=samples.warmups[name].first_call_s,
        first_token_s=call_s if phase == "prefill" and batch == 1 else None,
        per_token_s=call_s if phase == "decode" else None,
        percentiles=_percentiles(samples, name),
    )


def _percentiles(samples: PairedSamples, name: str) -> Percentiles | None:
    calls = samples.single_calls(name)
    if not calls.size:
        return None
    return Percentiles(
        calls=calls.size,
        seconds={label: percentile(calls, share) for label, share in PERCENTILES.items()},
        needs={label: calls_needed(share) for label, share in PERCENTILES.items()},
    )


def _every_round(samples: PairedSamples, variant: str) -> EveryRound | None:
    if samples.causes is None:
        return None
    ratio, interval = samples.speedup(variant, every=True)
    return EveryRound(
        disturbed=int(samples.disturbed.sum()),
        causes=samples.rounds_per_cause,
        left_out=not samples.kept.all(),
        rounds=samples.rounds,
        speedup=ratio,
        interval=interval,
        control=samples.control_interval(every=True),
    )


def _arm_over(found: Sequence[ArmTiming | None]) -> ArmTiming | None:
    arms = [each for each in found if each is not None]
    if len(arms) < len(found):
        return None
    percentiles = [each.percentiles for each in arms]
    return ArmTiming(
        first_call_s=float(np.median([each.first_call_s for each in arms])),
        first_token_s=_median([each.first_token_s for each in arms]),
        per_token_s=_median([each.per_token_s for each in arms]),
        percentiles=_percentiles_over([each for each in percentiles if each]) if all(percentiles) else None,
    )


def _percentiles_over(found: Sequence[Percentiles]) -> Percentiles:
    """Medians over processes of what each could say, from the calls of the one that made fewest."""
    medians = {name: _median([each.seconds[name] for each in found]) for name in PERCENTILES}
    return Percentiles(calls=min(each.calls for each in found), seconds=medians, needs=found[0].needs)


def _every_round_over(found: Sequence[EveryRound | None]) -> EveryRound | None:
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        return None
    ratio, interval = combine_processes([each.speedup for each in known], [each.interval for each in known])
    centres = [math.sqrt(each.control.low * each.control.high) for each in known]
    return EveryRound(
        disturbed=sum(each.disturbed for each in known),
        causes=_added([each.causes for each in known]),
        left_out=any(each.left_out for each in known),
        rounds=sum(each.rounds for each in known),
        speedup=ratio,
        interval=interval,
        control=combine_processes(centres, [each.control for each in known])[1],
    )


def _added(found: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {
        name: sum(each.get(name, 0) for each in found) for name in dict.fromkeys(key for each in found for key in each)
    }


def _median(values: Sequence[float | None]) -> float | None:
    """None where any is."""
    known = [value for value in values if value is not None]
    return float(np.median(known)) if len(known) == len(values) else None


def timing_warnings(samples: PairedSamples, variant: str) -> tuple[str, ...]:
    """What a reader should know of how the rounds went."""
    found = []
    for name in (samples.baseline, variant):
        if not samples.warmups[name].settled:
            found.append(f"{name} {UNSETTLED} after {samples.warmups[name].calls} warm-up calls. {_AGAIN}")
    for name, series in ((variant, samples.log_ratios(variant)), ("the control", samples.control_log_ratios())):
        p = drift(series)
        if p < DRIFT_P:
            found.append(f"the ratio of {name} drifted over the rounds (Spearman p = {p:.1g})")
    half = samples.half_width(variant)
    if half > samples.target_half_width:
        end = f"budget spent after {samples.elapsed_s:.0f} s" if samples.stopped == "budget" else "last look reached"
        target = f"±{samples.target_half_width:.1%}"
        found.append(
            f"{end} and {samples.rounds} rounds with an interval of ±{half:.1%} where {target} was asked. {_AGAIN}"
        )
    if (rounds := int(samples.kept.sum())) < FEW_ROUNDS:
        found.append(f"{rounds} rounds are few: below {FEW_ROUNDS} the interval may be too narrow. {_AGAIN}")
    control = samples.control_interval()
    return (*found, *_load_warning(samples), *_disturbance_warning(samples), *_control_warning(control))


def _load_warning(samples: PairedSamples) -> tuple[str, ...]:
    """Only where loading anew was wanted and could not be paid for."""
    if samples.too_dear_s is None:
        return ()
    return (
        f"each arm was loaded once: loading all anew takes {samples.too_dear_s:.1f} s, too much of the budget, so what "
        f"differs from one load to the next (up to 4% was seen) is not in the interval. {_AGAIN}",
    )


def _disturbance_warning(samples: PairedSamples) -> tuple[str, ...]:
    """Only where disturbed rounds had to stay in; those that were left out are counted in `every_round`."""
    if not samples.disturbed.any() or not samples.kept.all():
        return ()
    by = ", ".join(f"{WORDS[name]} in {rounds}" for name, rounds in samples.rounds_per_cause.items())
    return (
        f"{samples.disturbed.sum()} of {samples.rounds} rounds were disturbed ({by}): too many to leave out, so all "
        "were kept. This machine was not quiet",
    )


def _control_warning(control: Interval) -> tuple[str, ...]:
    if control.low <= 1 <= control.high:
        return ()
    return (f"the baseline differs from itself by up to {noise_floor(control) - 1:.1%}",)
