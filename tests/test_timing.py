"""Paired timing with a clock that only our arms move: no test here waits for, or asserts, real time."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable

import numpy as np
import pytest

from compress.records import Timing
from compress.speed import timing
from compress.speed.paired_samples import PairedSamples, Warmup
from compress.speed.timing import pair
from compress.speed.timing_record import timing_record
from compress.stats.intervals import MIN_ROUNDS


class World:
    """A machine whose calls take `cost` seconds times whatever the machine is going through."""

    def __init__(self, slowdown: Callable[[float], float] = lambda now: 1.0, noise: float = 0.0) -> None:
        self.now = 100.0
        self.slowdown = slowdown
        self.noise = noise
        self.random = np.random.default_rng(0)
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def arm(self, name: str, cost: float) -> Callable[[], None]:
        def call() -> None:
            self.log.append(name)
            self.now += cost * self.slowdown(self.now - 100.0) * math.exp(self.noise * self.random.standard_normal())

        return call

    def arms(self, **costs: float) -> dict[str, Callable[[], None]]:
        return {name: self.arm(name, cost) for name, cost in costs.items()}


def record_of(samples: PairedSamples, variant: str = "int8") -> Timing:
    return timing_record(samples, "float", variant, phase="decode", batch=2, prompt=128, tokens_per_call=16)


def made_samples(baseline: np.ndarray, variant: np.ndarray, control: np.ndarray) -> PairedSamples:
    warm = Warmup(first_call_s=1.0, calls=11, settled=True, repeats=1)
    seconds = {"float": baseline, "int8": variant}
    return PairedSamples("float", seconds, control, {"float": warm, "int8": warm}, "rounds", 9.0, 0.02)


def test_pairing_recovers_the_ratio_under_a_drift_that_fools_back_to_back_timing() -> None:
    def tiring(now: float) -> float:
        return 1 + now / 4

    costs = {"float": 0.025, "int8": 0.020}
    samples = pair(
        (world := World(tiring, noise=0.01)).arms(**costs),
        baseline="float",
        seed=1,
        clock=world.clock,
        min_block_s=0.01,
    )
    paired = record_of(samples).speedup

    world = World(tiring, noise=0.01)
    medians = []
    for arm in world.arms(**costs).values():
        times = []
        for _ in range(samples.rounds):
            begin = world.clock()
            arm()
            times.append(world.clock() - begin)
        medians.append(np.median(times))

    assert paired == pytest.approx(1.25, rel=0.02)
    assert abs(medians[0] / medians[1] - 1.25) > 0.1


def test_every_round_runs_each_arm_once_and_the_baseline_twice_in_changing_order() -> None:
    world = World()
    samples = pair(world.arms(float=1.0, int8=0.5, int4=0.4), baseline="float", seed=3, clock=world.clock)
    measured = world.log[-4 * samples.rounds :]
    rounds = [tuple(measured[i : i + 4]) for i in range(0, len(measured), 4)]
    assert all(sorted(one) == ["float", "float", "int4", "int8"] for one in rounds)
    assert len(set(rounds)) > 5


def test_the_same_seed_gives_the_same_order_and_another_seed_another() -> None:
    logs = []
    for seed in (5, 5, 6):
        world = World()
        pair(world.arms(float=1.0, int8=0.5), baseline="float", seed=seed, clock=world.clock)
        logs.append(world.log)
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


def test_a_block_of_short_calls_begins_with_one_that_is_not_timed_since_another_arm_filled_the_caches() -> None:
    now, last, warm = [0.0], [""], [0.001]

    def arm(name: str) -> Callable[[], None]:
        def call() -> None:
            now[0] += warm[0] if last[0] == name else 2 * warm[0]
            last[0] = name

        return call

    for warm[0], cold in ((0.001, False), (0.05, True)):
        found = pair({name: arm(name) for name in ("float", "int8")}, baseline="float", seed=0, clock=lambda: now[0])
        assert bool(max(found.seconds["int8"]) > 1.01 * warm[0]) is cold


def test_inner_repeats_fill_a_block_and_are_divided_out() -> None:
    world = World()
    samples = pair(world.arms(float=0.003, int8=0.0004), baseline="float", seed=0, clock=world.clock, min_block_s=0.02)
    assert samples.warmups["float"].repeats * 0.8 * 0.003 >= 0.02
    assert samples.warmups["int8"].repeats * 0.8 * 0.0004 >= 0.02
    assert samples.seconds["float"] == pytest.approx(0.003)
    assert samples.seconds["int8"] == pytest.approx(0.0004)


def test_repeats_are_jittered_by_a_fifth_at_most_and_never_reach_zero() -> None:
    random = np.random.default_rng(0)
    drawn = {timing._jittered(100, random) for _ in range(500)}
    assert min(drawn) >= 80
    assert max(drawn) <= 120
    assert len(drawn) > 30
    assert {timing._jittered(1, random) for _ in range(50)} == {1}


def test_quiet_machines_stop_at_the_first_look_and_noisy_ones_go_on_to_the_last() -> None:
    quiet, noisy = World(), World(noise=0.5)
    first = pair(quiet.arms(float=0.03, int8=0.02), baseline="float", seed=0, clock=quiet.clock)
    last = pair(noisy.arms(float=0.03, int8=0.02), baseline="float", seed=0, clock=noisy.clock)
    assert (first.stopped, first.rounds) == ("width", 30)
    assert (last.stopped, last.rounds) == ("rounds", 240)


def test_a_certain_difference_is_no_reason_to_stop_while_the_interval_is_wide() -> None:
    world = World(noise=0.2)
    samples = pair(
        world.arms(float=10.0, int8=0.1), baseline="float", seed=0, clock=world.clock, looks=(20, 40), budget_s=1e6
    )
    assert (samples.stopped, samples.rounds) == ("rounds", 40)


def test_a_spent_budget_stops_between_looks_and_is_said_so() -> None:
    world = World(noise=0.3)
    samples = pair(world.arms(float=0.3, int8=0.2), baseline="float", seed=0, clock=world.clock, budget_s=30.0)
    assert samples.stopped == "budget"
    assert samples.rounds < 240
    assert any(text.startswith("budget spent after") for text in record_of(samples).warnings)


def test_a_budget_never_cuts_below_the_rounds_that_an_interval_needs() -> None:
    world = World()
    samples = pair(world.arms(float=3.0, int8=2.0), baseline="float", seed=0, clock=world.clock, budget_s=1.0)
    assert samples.rounds == MIN_ROUNDS
    record = record_of(samples)
    assert record.speedup == pytest.approx(1.5)
    assert any("settled" in text for text in record.warnings)
    assert any("10 rounds are few" in text for text in record.warnings)


def test_warm_up_waits_for_a_machine_that_still_speeds_up_and_keeps_the_cold_start_apart() -> None:
    world = World(lambda now: 1 + 10 * math.exp(-now / 0.5))
    samples = pair(world.arms(float=0.03, int8=0.02), baseline="float", seed=0, clock=world.clock)
    warm = samples.warmups["float"]
    assert warm.settled
    assert warm.calls > 20
    assert warm.first_call_s > 5 * 0.03


def test_a_cold_first_call_that_eats_the_warm_up_share_does_not_set_the_repeats() -> None:
    world = World(lambda now: 1e5 if now == 0 else 1.0)
    samples = pair(world.arms(float=0.001, int8=0.001), baseline="float", seed=0, clock=world.clock)
    assert samples.warmups["float"].repeats >= 20


def test_the_record_holds_medians_tokens_and_the_verdict() -> None:
    world = World(noise=0.005)
    samples = pair(world.arms(float=0.05, int8=0.025), baseline="float", seed=0, clock=world.clock)
    record = record_of(samples)
    assert record.name == "decode batch 2 prompt 128"
    assert record.rounds == samples.rounds
    assert record.baseline_s == np.median(samples.seconds["float"])
    assert record.variant_tokens_per_s == pytest.approx(16 / np.median(samples.seconds["int8"]))
    assert record.interval.low < record.speedup < record.interval.high
    assert record.speedup == pytest.approx(2.0, rel=0.02)
    assert record.control.low < 1.01
    assert record.verdict == "faster"
    assert not any("asked" in text for text in record.warnings)


def test_a_model_against_an_equal_one_is_not_called_faster() -> None:
    world = World(noise=0.02)
    samples = pair(world.arms(float=0.05, int8=0.05), baseline="float", seed=2, clock=world.clock)
    assert record_of(samples).verdict in ("same", "inconclusive")


def test_a_ratio_that_drifts_is_warned_about() -> None:
    rounds = 40
    noise = np.exp(0.001 * np.random.default_rng(0).standard_normal((3, rounds)))
    samples = made_samples(noise[0], noise[1] * np.linspace(0.5, 0.6, rounds), noise[2])
    assert any("int8 drifted" in text for text in record_of(samples).warnings)


def test_a_baseline_that_differs_from_itself_is_warned_about_and_raises_the_floor() -> None:
    noise = np.exp(0.001 * np.random.default_rng(0).standard_normal((3, 40)))
    record = record_of(made_samples(noise[0], noise[1] / 1.03, noise[2] / 1.05))
    assert any("differs from itself by up to 5" in text for text in record.warnings)
    assert record.verdict != "faster"


def test_garbage_collection_rests_during_a_block_and_returns_even_after_an_error() -> None:
    states = []
    world = World()
    work = world.arm("float", 1.0)

    def watching() -> None:
        states.append(gc.isenabled())
        work()

    def failing() -> None:
        raise RuntimeError("boom")

    assert gc.isenabled()
    pair({"float": watching}, baseline="float", seed=0, clock=world.clock, looks=(10,))
    with pytest.raises(RuntimeError, match="boom"):
        pair({"float": failing}, baseline="float", seed=0, clock=world.clock)
    assert states
    assert not any(states)
    assert gc.isenabled()


def test_a_clock_that_stands_still_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MOST_REPEATS", 1000)
    with pytest.raises(ValueError, match="stands still"):
        pair({"float": lambda: None}, baseline="float", seed=0, clock=lambda: 0.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"baseline": "fp16"}, "no arm named 'fp16'"),
        ({"looks": ()}, "looks"),
        ({"looks": (5, 20)}, "looks"),
        ({"budget_s": 0.0}, "budget_s"),
        ({"min_block_s": -1.0}, "min_block_s"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], words: str) -> None:
    world = World()
    with pytest.raises(ValueError, match=words):
        pair(world.arms(float=1.0), **{"baseline": "float", "seed": 0, "clock": world.clock, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("baseline", "variant", "tokens", "words"),
    [
        ("int8", "float", 1, "control was taken for 'float'"),
        ("float", "int3", 1, "no variant 'int3'"),
        ("float", "float", 1, "no variant 'float'"),
        ("float", "int8", 0, "tokens_per_call"),
    ],
)
def test_a_record_of_arms_that_were_not_timed_is_refused(baseline: str, variant: str, tokens: int, words: str) -> None:
    ones = np.ones(20)
    with pytest.raises(ValueError, match=words):
        timing_record(
            made_samples(ones, ones, ones), baseline, variant, phase="encode", batch=1, prompt=8, tokens_per_call=tokens
        )
