"""Paired timing of callables that do the same work: shuffled rounds, a noise floor, a stop on width.

It knows no runtime: an arm is a callable that returns when its work is done (a device's queue drained), and the
clock is an argument. Seconds throughout. Protocol: research/profiling_ux_reliability.md §1.2.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from compress.speed.disturbance import Watch, causes
from compress.speed.paired_samples import PairedSamples, Stop, Warmup
from compress.speed.reloads import WARM_CALLS, Reload, Schedule
from compress.stats.intervals import MIN_ROUNDS, is_stationary

Arm = Callable[[], object]
Clock = Callable[[], float]

WARMUP_CALLS = 200  # cap per arm
WARMUP_SHARE = 0.2  # of the budget, over all arms
JITTER = 0.2  # of the inner repeats, so that blocks do not beat with a periodic disturbance
MOST_REPEATS = 10_000_000
LOOKS = (30, 60, 120, 240)
SETTLING_REPEATS = 4
"""A block of at least so many calls follows one that is not timed: its first call finds the caches full of another arm,
and the baseline, which has two blocks in a round, would find them full of its own more often than any variant."""
SINGLE_CALL_S = 1e-4  # calls at least so long are also timed singly, which costs a ten-millionth of a second each


def pair(
    arms: Mapping[str, Arm],
    *,
    baseline: str,
    seed: int,
    clock: Clock = time.perf_counter,
    watch: Watch | None = None,
    reload: Reload | None = None,
    min_block_s: float = 0.02,
    looks: Sequence[int] = LOOKS,
    target_half_width: float = 0.02,
    budget_s: float = 120.0,
    between: Callable[[], None] | None = None,
) -> PairedSamples:
    """Time all arms in rounds of fresh seeded order until every interval is narrow enough.

    Widths are looked at after `looks` rounds only, never significance. The budget counts warm-up and is checked
    after each round, but never cuts below MIN_ROUNDS, under which there is no interval to report. `watch` reads the
    machine's counters before and after each round (compress.speed.disturbance.watch()). `reload` is done between
    rounds, several times or, where the budget does not allow for that, never (compress.speed.reloads). `between` is
    called before each round, outside of all that is timed, and may raise.
    """
    _check(arms, baseline, looks, min_block_s, budget_s)
    start, random = clock(), np.random.default_rng(seed)
    share_s = WARMUP_SHARE * budget_s / len(arms)
    warmups = {name: _warm_up(arm, clock, min_block_s, share_s) for name, arm in arms.items()}
    schedule = _schedule(reload, warmups.values(), start + budget_s, clock()) if reload else None
    session = _Session(arms, baseline, warmups, random, clock, watch, schedule)
    for done in range(1, max(looks) + 1):
        if between is not None:
            between()
        session.round()
        if done in looks and session.samples("width", start, target_half_width).narrow:
            return session.samples("width", start, target_half_width)
        if done >= MIN_ROUNDS and clock() - start >= budget_s:
            return session.samples("budget", start, target_half_width)
    return session.samples("rounds", start, target_half_width)


class _Session:
    """Rounds as they are made."""

    def __init__(
        self,
        arms: Mapping[str, Arm],
        baseline: str,
        warmups: Mapping[str, Warmup],
        random: np.random.Generator,
        clock: Clock,
        watch: Watch | None,
        schedule: Schedule | None,
    ) -> None:
        self.arms, self.baseline, self.warmups = arms, baseline, warmups
        self.random, self.clock, self.watch, self.schedule = random, clock, watch, schedule
        self.slots = [*arms, None]  # None: the baseline once more, as its own control
        self.rows: dict[str | None, list[float]] = {slot: [] for slot in self.slots}
        self.calls: dict[str, list[NDArray[np.float64]]] = {name: [] for name in arms}
        self.causes: list[tuple[str, ...]] = []
        self.loads: list[int] = []
        # one rule for all arms, since the clock's own time counts
        self.singly = min(warmup.call_s for warmup in warmups.values()) >= SINGLE_CALL_S

    def round(self) -> None:
        """Each arm once and the baseline once more, in fresh order; before it a fresh load, where one is due."""
        self._load()
        before = self.watch() if self.watch else None
        for slot in [self.slots[index] for index in self.random.permutation(len(self.slots))]:
            name = self.baseline if slot is None else slot
            if self.warmups[name].repeats >= SETTLING_REPEATS:
                self.arms[name]()
            repeats = _jittered(self.warmups[name].repeats, self.random)
            stamps: list[float] | None = [] if self.singly else None
            self.rows[slot].append(_block(self.arms[name], repeats, self.clock, stamps) / repeats)
            if slot is not None and stamps:
                self.calls[slot].append(np.diff(stamps))
        if self.watch and before:
            self.causes.append(causes(before, self.watch()))

    def _load(self) -> None:
        if self.schedule is None:
            return
        if self.schedule.is_due(begun := self.clock()):
            self.schedule.reload.load()
            for name, arm in self.arms.items():
                _warm_again(arm, self.warmups[name])
            self.schedule.loaded(begun, self.clock())
        self.schedule.rounds += 1
        self.loads.append(self.schedule.loads)

    def samples(self, stopped: Stop, start: float, target_half_width: float) -> PairedSamples:
        """All rounds so far."""
        return PairedSamples(
            baseline=self.baseline,
            seconds={name: np.array(self.rows[name]) for name in self.arms},
            control=np.array(self.rows[None]),
            warmups=self.warmups,
            stopped=stopped,
            elapsed_s=self.clock() - start,
            target_half_width=target_half_width,
            causes=tuple(self.causes) if self.watch else None,
            calls={name: tuple(found) for name, found in self.calls.items()} if self.singly else {},
            loads=tuple(self.loads),
            too_dear_s=self.schedule.too_dear_s if self.schedule else None,
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
    return Warmup(first_s, 1 + len(calls), is_stationary(calls), repeats, min(calls))


def _schedule(reload: Reload, warmups: Collection[Warmup], end_s: float, now: float) -> Schedule:
    """From what a load took before, what its warm-up will take, and the time that is left until end_s."""
    warm_s = sum(max(WARM_CALLS, each.repeats) * each.call_s for each in warmups)
    return Schedule(reload, warm_s, end_s - now, now)


def _warm_again(arm: Arm, warmup: Warmup) -> None:
    """As many calls as a block has, WARM_CALLS at least: the arm's work and its repeats are known already."""
    for _ in range(max(WARM_CALLS, warmup.repeats)):
        arm()


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


def _block(arm: Arm, repeats: int, clock: Clock, stamps: list[float] | None = None) -> float:
    """Seconds of `repeats` calls; stamps: takes the time before the first and after each of them."""
    with _no_collection():
        begin = clock()
        if stamps is None:
            for _ in range(repeats):
                arm()
            return clock() - begin
        stamps.append(begin)
        for _ in range(repeats):
            arm()
            stamps.append(clock())
        return stamps[-1] - begin


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
