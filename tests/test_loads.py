"""Loads as the outer level of a timing: sessions loaded anew between rounds, and an interval that counts loads."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from scipy import stats as distributions

from compress.records import Timing
from compress.speed.loads import Loads
from compress.speed.paired_samples import PairedSamples
from compress.speed.reloads import LEAST_ROUNDS, Reload
from compress.speed.timing import pair
from compress.speed.timing_record import over_processes, timing_record
from compress.stats.intervals import half_width, load_spread, speedup
from compress.target import Session


class Machine:
    """Calls take `cost` seconds, loads `load_s`; each load makes each arm faster or slower for good by `offset`."""

    def __init__(self, seed: int, offset: float, load_s: float = 0.05, noise: float = 0.01) -> None:
        self.random, self.now = np.random.default_rng(seed), 0.0
        self.offset, self.load_s, self.noise, self.loads = offset, load_s, noise, 0
        self.factors: dict[str, float] = {}
        self.load()

    def clock(self) -> float:
        return self.now

    def load(self) -> None:
        self.now += self.load_s
        self.loads += 1
        self.factors = {name: math.exp(self.offset * self.random.standard_normal()) for name in ("float", "int8")}

    def arm(self, name: str, cost: float) -> Callable[[], None]:
        def call() -> None:
            self.now += cost * self.factors[name] * math.exp(self.noise * self.random.standard_normal())

        return call

    def time(self, seed: int = 0, reload: bool = True, budget_s: float = 60.0) -> PairedSamples:
        arms = {name: self.arm(name, 0.03) for name in ("float", "int8")}
        again = Reload(self.load, self.load_s) if reload else None
        return pair(arms, baseline="float", seed=seed, clock=self.clock, reload=again, budget_s=budget_s)


def record_of(samples: PairedSamples) -> Timing:
    return timing_record(samples, "float", "int8", phase="decode", batch=1, prompt=128, tokens_per_call=1)


class Fake:
    """A session that knows who it is."""

    name, is_decoder = "fake", True

    def __init__(self, alive: weakref.WeakSet[Fake]) -> None:
        self.number, self.held = 0, len(alive)
        alive.add(self)


def test_loads_of_their_own_are_counted_by_the_interval_and_told_of() -> None:
    found = record_of(Machine(1, offset=0.03).time())
    assert found.loads >= 8
    assert found.load_spread == pytest.approx(0.03 * math.sqrt(2), rel=0.6)
    assert found.interval.low <= 1 <= found.interval.high


def test_a_difference_of_one_load_is_not_taken_for_one_of_the_arms() -> None:
    covered = {True: 0, False: 0}
    for seed in range(25):
        for reload in covered:
            interval = record_of(Machine(seed, offset=0.02).time(seed, reload)).interval
            covered[reload] += interval.low <= 1 <= interval.high
    assert covered[True] >= 21
    assert covered[False] <= 10


def test_every_load_has_its_rounds_and_is_paid_for_by_them() -> None:
    samples = Machine(0, offset=0.02, load_s=0.5).time()
    rounds = np.bincount(samples.loads)
    assert samples.load_count > 3
    assert rounds[:-1].min() >= LEAST_ROUNDS
    assert rounds[1:-1].min() * 3 * 0.03 >= 2 * 0.5 - 0.1
    assert list(samples.loads) == sorted(samples.loads)
    assert samples.rounds == len(samples.loads)


def test_arms_that_load_too_slowly_for_the_budget_are_loaded_once_and_the_report_names_it() -> None:
    machine = Machine(0, offset=0.02, load_s=5.0)
    found = record_of(machine.time(budget_s=20.0))
    assert machine.loads == 1
    assert (found.loads, found.load_spread) == (1, None)
    assert any("loaded once: loading all anew takes 5" in text and "--processes" in text for text in found.warnings)
    assert not any("loaded once" in text for text in record_of(Machine(0, offset=0.0).time(reload=False)).warnings)


def test_few_loads_are_each_one_value_of_a_t_interval() -> None:
    random = np.random.default_rng(3)
    loads = np.repeat(np.arange(5), 12)
    series = 0.02 * random.standard_normal(60) + 0.05 * random.standard_normal(5)[loads]
    ordered = np.sort(series)
    clipped = np.clip(series, ordered[6], ordered[53])
    means = [clipped[loads == load].mean() for load in range(5)]
    half = distributions.t.ppf(0.975, 4) * np.std(means, ddof=1) / math.sqrt(5) / 0.8

    ratio, interval = speedup(series, loads=loads)
    assert half_width(interval) == pytest.approx(half)
    assert math.log(ratio) == pytest.approx(distributions.trim_mean(series, 0.1))


def test_a_load_for_each_round_or_one_for_all_changes_nothing() -> None:
    series = 0.02 * np.random.default_rng(4).standard_normal(40)
    assert speedup(series, loads=np.arange(40)) == speedup(series)
    assert speedup(series, loads=np.zeros(40)) == speedup(series)
    with pytest.raises(ValueError, match="number of its load"):
        speedup(series, loads=np.zeros(39))


def test_the_spread_between_loads_is_what_the_rounds_within_them_do_not_explain() -> None:
    random, loads = np.random.default_rng(5), np.repeat(np.arange(40), 6)
    noise = 0.02 * random.standard_normal(240)
    assert load_spread(noise, loads) == pytest.approx(0, abs=0.006)
    assert load_spread(noise + 0.03 * random.standard_normal(40)[loads], loads) == pytest.approx(0.03, rel=0.25)
    assert load_spread(noise, np.zeros(240)) is None


def test_sessions_are_dropped_before_others_are_loaded_and_in_another_order_each_time() -> None:
    alive: weakref.WeakSet[Fake] = weakref.WeakSet()
    order: list[str] = []

    def loader(name: str) -> Callable[[], Fake]:
        def load() -> Fake:
            order.append(name)
            return Fake(alive)

        return load

    def bind(sessions: Mapping[str, Session]) -> dict[str, Callable[[], object]]:
        return {name: (lambda each=each: each) for name, each in sessions.items()}

    gc.disable()  # nothing may wait for a collection: the memory is needed at once
    try:
        loads = Loads({"baseline": loader("baseline"), "variant": loader("variant")}, seed=0)  # type: ignore[dict-item]
        arms, reload = loads.arms(bind)
        first = id(arms["variant"]())
        for _ in range(12):
            reload.load()
    finally:
        gc.enable()
    assert len(alive) == 2
    assert all(each.held <= 1 for each in alive)
    assert first and arms["variant"]() is loads.sessions["variant"]
    assert {tuple(order[place : place + 2]) for place in range(0, len(order), 2)} == {
        ("baseline", "variant"),
        ("variant", "baseline"),
    }


def test_what_only_the_first_load_of_all_takes_is_not_expected_again() -> None:
    now, costs = [0.0], iter([9.0, 1.0, 2.0, 1.0])

    def load() -> Fake:
        now[0] += next(costs)
        return Fake(weakref.WeakSet())

    loads = Loads({"baseline": load, "variant": load}, 0, lambda: now[0])  # type: ignore[dict-item]
    assert loads.seconds == 2.0
    loads.again()
    assert loads.seconds == 3.0


def test_loads_of_several_processes_are_added_up() -> None:
    each = [record_of(Machine(seed, offset=0.02).time(seed)) for seed in range(3)]
    one = over_processes(each)
    assert one.loads == sum(timing.loads for timing in each)
    assert one.load_spread == sorted(timing.load_spread or 0 for timing in each)[1]
