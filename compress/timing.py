"""Paired timing of callables that do the same work: shuffled rounds, a noise floor, a stop on width.

It knows no runtime: an arm is a callable that returns when its work is done (a device's queue drained), and the
clock is an argument. Seconds throughout. Protocol: research/profiling_ux_reliability.md §1.2.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compress.records import Timing
from compress.stats import MIN_ROUNDS, drift, half_width, is_stationary, noise_floor, speed_verdict, speedup

Arm = Callable[[], object]
Clock = Callable[[], float]
Phase = Literal["prefill", "decode", "encode", "infer"]
Stop = Literal["width", "rounds", "budget"]

WARMUP_CALLS = 200  # cap per arm
WARMUP_SHARE = 0.2  # of the budget, over all arms
JITTER = 0.2  # of the inner repeats, so that blocks do not beat with a periodic disturbance
MOST_REPEATS = 10_000_000
DRIFT_P = 0.01


@dataclass(frozen=True)
class Warmup:
    """How one arm got ready: its first call apart (the cold start), calls made, whether they settled, repeats."""

    first_call_s: float
    calls: int
    settled: bool
    repeats: int


@dataclass(frozen=True, eq=False)
class PairedSamples:
    """Seconds per call of every arm and round. `control` is the baseline's second block of each round."""

    baseline: str
    seconds: Mapping[str, NDArray[np.float64]]
    control: NDArray[np.float64]
    warmups: Mapping[str, Warmup]
    stopped: Stop
    elapsed_s: float
    target_half_width: float

    @property
    def rounds(self) -> int:
        """Rounds measured, each with every arm once and the baseline twice."""
        return len(self.control)

    def log_ratios(self, variant: str) -> NDArray[np.float64]:
        """(rounds,) ln(baseline / variant): above 0 where the variant is faster."""
        with np.errstate(divide="ignore", invalid="ignore"):  # a zero is refused where the ratios are used
            return np.log(self.seconds[self.baseline] / self.seconds[variant])

    @property
    def control_log_ratios(self) -> NDArray[np.float64]:
        """(rounds,) ln(baseline / baseline again)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(self.seconds[self.baseline] / self.control)

    def half_width(self, variant: str) -> float:
        """The wider of the variant's and the control's interval halves, on the log scale."""
        both = self.log_ratios(variant), self.control_log_ratios
        return max(half_width(speedup(series)[1]) for series in both)

    @property
    def narrow(self) -> bool:
        """Whether every interval, the control's too, is as narrow as asked."""
        return all(self.half_width(name) <= self.target_half_width for name in self.seconds)


def pair(
    arms: Mapping[str, Arm],
    *,
    baseline: str,
    seed: int,
    clock: Clock = time.perf_counter,
    min_block_s: float = 0.02,
    looks: Sequence[int] = (20, 40, 80, 160),
    target_half_width: float = 0.02,
    budget_s: float = 120.0,
) -> PairedSamples:
    """Time all arms in rounds of fresh seeded order until every interval is narrow enough.

    Widths are looked at after `looks` rounds only, never significance. The budget counts warm-up and is checked
    after each round, but never cuts below MIN_ROUNDS, under which there is no interval to report.
    """
    _check(arms, baseline, looks, min_block_s, budget_s)
    start, random = clock(), np.random.default_rng(seed)
    share_s = WARMUP_SHARE * budget_s / len(arms)
    warmups = {name: _warm_up(arm, clock, min_block_s, share_s) for name, arm in arms.items()}
    slots = [*arms, None]  # None: the baseline once more, as its own control
    rows: dict[str | None, list[float]] = {slot: [] for slot in slots}

    def samples(stopped: Stop) -> PairedSamples:
        seconds = {name: np.array(rows[name]) for name in arms}
        control, elapsed_s = np.array(rows[None]), clock() - start
        return PairedSamples(baseline, seconds, control, warmups, stopped, elapsed_s, target_half_width)

    for done in range(1, max(looks) + 1):
        for slot in [slots[index] for index in random.permutation(len(slots))]:
            name = baseline if slot is None else slot
            repeats = _jittered(warmups[name].repeats, random)
            rows[slot].append(_block(arms[name], repeats, clock) / repeats)
        if done in looks and samples("width").narrow:
            return samples("width")
        if done >= MIN_ROUNDS and clock() - start >= budget_s:
            return samples("budget")
    return samples("rounds")


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
    ratio, interval = speedup(samples.log_ratios(variant))
    _, control = speedup(samples.control_log_ratios)
    baseline_s, variant_s = (float(np.median(samples.seconds[name])) for name in (baseline, variant))
    return Timing(
        phase=phase,
        batch=batch,
        prompt=prompt,
        rounds=samples.rounds,
        baseline_s=baseline_s,
        variant_s=variant_s,
        baseline_tokens_per_s=tokens_per_call / baseline_s,
        variant_tokens_per_s=tokens_per_call / variant_s,
        speedup=ratio,
        interval=interval,
        control=control,
        verdict=speed_verdict(interval, control),
        warnings=_warnings(samples, variant),
    )


def _check(arms: Mapping[str, Arm], baseline: str, looks: Sequence[int], min_block_s: float, budget_s: float) -> None:
    if baseline not in arms:
        raise ValueError(f"pair: no arm named {baseline!r} among {', '.join(arms) or 'none'}")
    if not looks or min(looks) < MIN_ROUNDS:
        raise ValueError(f"pair: looks must be at least {MIN_ROUNDS} rounds each, found {tuple(looks)}")
    if min_block_s <= 0 or budget_s <= 0:
        raise ValueError(f"pair: min_block_s and budget_s must be positive, found {min_block_s} and {budget_s}")


def _warm_up(arm: Arm, clock: Clock, min_block_s: float, cap_s: float) -> Warmup:
    """Call until the medians of two neighbouring windows agree, or the cap is hit; then fit the inner repeats."""
    first_s, calls = _block(arm, 1, clock), [_block(arm, 1, clock)]
    while not is_stationary(calls) and len(calls) < WARMUP_CALLS and sum(calls) < cap_s:
        calls.append(_block(arm, 1, clock))
    repeats = _repeats(arm, clock, min_block_s, min(calls))
    return Warmup(first_s, 1 + len(calls), is_stationary(calls), repeats)


def _repeats(arm: Arm, clock: Clock, min_block_s: float, call_s: float) -> int:
    """Calls that make a block last min_block_s even where jitter takes JITTER of them away."""
    needed_s = min_block_s / (1 - JITTER)
    repeats, block_s = 1, call_s
    while block_s < needed_s:
        repeats = math.ceil(repeats * min(1.2 * needed_s / block_s, 10)) if block_s > 0 else 10 * repeats
        if repeats > MOST_REPEATS:
            raise ValueError(f"{MOST_REPEATS} calls do not last {min_block_s} s: the clock stands still, or no work")
        block_s = _block(arm, repeats, clock)
    return repeats


def _jittered(repeats: int, random: np.random.Generator) -> int:
    fewest, most = math.ceil((1 - JITTER) * repeats), math.floor((1 + JITTER) * repeats)
    return int(random.integers(fewest, most + 1))


def _block(arm: Arm, repeats: int, clock: Clock) -> float:
    with _no_collection():
        begin = clock()
        for _ in range(repeats):
            arm()
        return clock() - begin


@contextmanager
def _no_collection() -> Iterator[None]:
    """A garbage collection inside one arm's block would be charged to that arm."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _warnings(samples: PairedSamples, variant: str) -> tuple[str, ...]:
    found = []
    for name in (samples.baseline, variant):
        if not samples.warmups[name].settled:
            found.append(f"{name} had not settled after {samples.warmups[name].calls} warm-up calls")
    for name, series in ((variant, samples.log_ratios(variant)), ("the control", samples.control_log_ratios)):
        p = drift(series)
        if p < DRIFT_P:
            found.append(f"the ratio of {name} drifted over the rounds (Spearman p = {p:.1g})")
    half = samples.half_width(variant)
    if half > samples.target_half_width:
        end = f"budget spent after {samples.elapsed_s:.0f} s" if samples.stopped == "budget" else "last look reached"
        target = f"±{samples.target_half_width:.1%}"
        found.append(f"{end} and {samples.rounds} rounds with an interval of ±{half:.1%} where {target} was asked")
    control = speedup(samples.control_log_ratios)[1]
    if not control.low <= 1 <= control.high:
        found.append(f"the baseline differs from itself by up to {noise_floor(control) - 1:.1%}")
    return tuple(found)
