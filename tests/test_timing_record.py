"""What a report may say about latency: percentiles, first tokens, disturbed rounds, sweeps and several processes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import count

import numpy as np
import pytest
from scipy import stats as distributions

from compress.records import Interval, Timing
from compress.speed.disturbance import Counters
from compress.speed.paired_samples import PairedSamples, Warmup
from compress.speed.timing import pair
from compress.speed.timing_record import best_against_best, over_processes, timing_record
from compress.stats.intervals import calls_needed, combine_processes, half_width, percentile, speedup

ROUNDS = 60


def samples(
    seconds: dict[str, np.ndarray],
    causes: Sequence[tuple[str, ...]] | None = None,
    calls: dict[str, list[np.ndarray]] | None = None,
) -> PairedSamples:
    warm = Warmup(first_call_s=1.5, calls=11, settled=True, repeats=1)
    noise = np.exp(0.001 * np.random.default_rng(9).standard_normal(len(seconds["float"])))
    return PairedSamples(
        "float",
        seconds,
        seconds["float"] * noise,
        dict.fromkeys(seconds, warm),
        "width",
        9.0,
        0.02,
        None if causes is None else tuple(causes),
        calls or {},
    )


def arms(rounds: int = ROUNDS, ratio: float = 1.25, seed: int = 0) -> dict[str, np.ndarray]:
    noise = np.exp(0.002 * np.random.default_rng(seed).standard_normal((2, rounds)))
    return {"float": 0.05 * noise[0], "int8": 0.05 / ratio * noise[1]}


def record(found: PairedSamples, phase: str = "decode", batch: int = 1, prompt: int = 128) -> Timing:
    return timing_record(found, "float", "int8", phase=phase, batch=batch, prompt=prompt, tokens_per_call=batch)  # type: ignore[arg-type]


def test_disturbed_rounds_are_left_out_and_both_estimates_and_counts_are_kept() -> None:
    seconds, causes = arms(), [()] * ROUNDS
    for place in (3, 20, 41):
        seconds["int8"][place] *= 2
        causes[place] = ("steal", "preempted") if place == 3 else ("steal",)
    found = samples(seconds, causes)
    one = record(found)

    undisturbed = np.delete(np.log(seconds["float"] / seconds["int8"]), [3, 20, 41])
    assert one.speedup == speedup(undisturbed)[0]
    assert one.rounds == 57
    assert one.variant_s == np.median(np.delete(seconds["int8"], [3, 20, 41]))
    assert one.every_round is not None
    assert (one.every_round.disturbed, one.every_round.rounds, one.every_round.left_out) == (3, 60, True)
    assert one.every_round.causes == {"steal": 3, "preempted": 1}
    assert one.every_round.speedup == speedup(np.log(seconds["float"] / seconds["int8"]))[0]
    assert one.every_round.speedup != one.speedup
    assert one.warnings == ()


def test_a_slow_round_without_a_cause_stays_in() -> None:
    seconds = arms()
    seconds["int8"][7] *= 10
    one = record(samples(seconds, [()] * ROUNDS))
    assert one.rounds == ROUNDS
    assert one.every_round is not None and not one.every_round.left_out


def test_a_machine_that_is_disturbed_most_of_the_time_keeps_all_rounds_and_says_so() -> None:
    causes = [("preempted",)] * 21 + [()] * 39
    one = record(samples(arms(), causes))
    assert one.rounds == ROUNDS
    assert one.every_round is not None
    assert (one.every_round.disturbed, one.every_round.left_out) == (21, False)
    assert one.every_round.speedup == one.speedup
    assert any("21 of 60 rounds were disturbed (involuntary context switches in 21)" in text for text in one.warnings)
    assert record(samples(arms(), [("preempted",)] * 20 + [()] * 40)).rounds == 40


def test_rounds_are_not_left_out_where_too_few_for_an_interval_would_remain() -> None:
    assert record(samples(arms(11), [("swap",), ("swap",), *[()] * 9])).rounds == 11


def test_without_counters_the_record_says_nothing_of_disturbance() -> None:
    assert record(samples(arms())).every_round is None


def test_pair_reads_the_counters_around_every_round() -> None:
    steps, now = count(), [0.0]

    def watch() -> Counters:  # the sixth round, between the readings 10 and 11, is disturbed
        return Counters(now[0], pages_from_swap=int(next(steps) > 10))

    def arm() -> None:
        now[0] += 0.03

    found = pair({"float": arm, "int8": arm}, baseline="float", seed=0, clock=lambda: now[0], watch=watch, looks=(20,))
    assert [place for place, each in enumerate(found.causes or ()) if each] == [5]
    assert (found.kept.sum(), found.rounds) == (19, 20)


def test_percentiles_need_the_counts_of_the_binomial_bound() -> None:
    for share in (0.5, 0.9, 0.95, 0.99):
        needed = calls_needed(share)
        assert distributions.binom.sf(1, needed, 1 - share) >= 0.95 > distributions.binom.sf(1, needed - 1, 1 - share)
    assert [calls_needed(share) for share in (0.5, 0.9, 0.95, 0.99)] == [8, 46, 93, 473]


def test_a_percentile_is_a_call_that_was_measured_or_nothing() -> None:
    values = np.random.default_rng(0).permutation(np.arange(1, 101))
    assert percentile(values, 0.9) == 90
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.99) is None
    with pytest.raises(ValueError, match="between 0 and 1"):
        percentile(values, 1.0)


def test_percentiles_are_of_single_calls_in_kept_rounds_and_name_the_count_they_lack() -> None:
    calls = [np.full(2, 0.01 * (place + 1)) for place in range(ROUNDS)]
    causes = [("steal",)] * 10 + [()] * 50
    one = record(samples(arms(), causes, {"float": calls, "int8": calls}))
    assert one.variant_arm is not None
    found = one.variant_arm.percentiles
    assert found is not None
    assert found.calls == 100
    assert found.seconds["p50"] == pytest.approx(0.35)
    assert found.seconds["p99"] is None
    assert found.text("p99") == "needs n >= 473"
    assert found.text("p50") == "350 ms"


def test_calls_are_timed_singly_only_where_the_clock_costs_nothing_beside_them() -> None:
    for cost, singly in ((0.003, True), (0.00002, False)):
        now = [0.0]

        def arm(cost: float = cost, now: list[float] = now) -> None:
            now[0] += cost

        found = pair({"float": arm, "int8": arm}, baseline="float", seed=0, clock=lambda now=now: now[0], looks=(10,))
        assert bool(found.single_calls("int8").size) is singly
        if singly:
            assert found.single_calls("int8") == pytest.approx(cost)
            assert found.single_calls("int8").size >= 10 * 6
        assert (record(found).variant_arm.percentiles is not None) is singly  # type: ignore[union-attr]


def test_only_a_prompt_of_one_sequence_gives_a_time_to_first_token_and_only_decoding_a_time_per_token() -> None:
    found = samples(arms())
    for phase, batch, first, each in (
        ("prefill", 1, True, False),
        ("prefill", 4, False, False),
        ("decode", 4, False, True),
        ("encode", 1, False, False),
    ):
        one = record(found, phase, batch)
        assert one.variant_arm is not None
        assert one.variant_arm.first_token_s == (one.variant_s if first else None)
        assert one.variant_arm.per_token_s == (one.variant_s if each else None)
        assert one.variant_arm.first_call_s == 1.5


def test_the_best_batch_of_each_arm_is_compared_beside_the_ratio_at_each_batch() -> None:
    def at(batch: int, before: float, after: float, prompt: int = 128) -> Timing:
        return record(samples(arms()), "decode", batch, prompt).model_copy(
            update={"baseline_tokens_per_s": before, "variant_tokens_per_s": after, "speedup": after / before}
        )

    moved, alone = best_against_best([at(1, 10, 15), at(4, 30, 36), at(8, 25, 50), at(1, 9, 9, 512)]), (at(1, 9, 9),)
    assert len(moved) == 1
    assert (moved[0].baseline_batch, moved[0].variant_batch, moved[0].prompt) == (4, 8, 128)
    assert moved[0].ratio == pytest.approx(50 / 30)
    assert moved[0].interval is None
    assert moved[0].same_setting == pytest.approx({1: 1.5, 4: 1.2, 8: 2.0})
    assert best_against_best(alone) == ()
    (same,) = best_against_best([at(1, 10, 15), at(4, 30, 36)])
    assert (same.ratio, same.interval) == (pytest.approx(1.2), at(4, 30, 36).interval)


def test_processes_that_differ_widen_the_interval_to_the_spread_between_them() -> None:
    ratios = [1.20, 1.25, 1.31]
    narrow = [Interval(low=ratio * 0.999, high=ratio * 1.001) for ratio in ratios]
    value, interval = combine_processes(ratios, narrow)
    logs = [math.log(ratio) for ratio in ratios]
    mean = sum(logs) / 3
    spread = math.sqrt(sum((each - mean) ** 2 for each in logs) / 2)
    assert value == pytest.approx(math.exp(mean))
    assert half_width(interval) == pytest.approx(distributions.t.ppf(0.975, 2) * spread / math.sqrt(3))


def test_processes_that_agree_by_chance_keep_the_uncertainty_within_them() -> None:
    wide = [Interval(low=1.25 * math.exp(-0.03), high=1.25 * math.exp(0.03))] * 3
    assert half_width(combine_processes([1.25] * 3, wide)[1]) == pytest.approx(0.03 / math.sqrt(3))
    with pytest.raises(ValueError, match="at least 3"):
        combine_processes([1.25] * 2, wide[:2])


def test_the_interval_over_processes_covers_a_speed_up_that_varies_between_them() -> None:
    random, covered = np.random.default_rng(2), 0
    for _ in range(500):
        effects = math.log(1.2) + 0.03 * random.standard_normal(5)
        found = [speedup(effect + 0.02 * random.standard_normal(30)) for effect in effects]
        interval = combine_processes([each[0] for each in found], [each[1] for each in found])[1]
        covered += interval.low <= 1.2 <= interval.high
    assert 0.93 <= covered / 500 <= 0.98


def test_timings_of_processes_become_one_record_and_of_too_few_or_mixed_ones_do_not() -> None:
    calls = {"float": [np.full(2, 0.05)] * ROUNDS, "int8": [np.full(2, 0.04)] * ROUNDS}
    each = [
        record(samples(arms(ratio=ratio, seed=seed), [()] * ROUNDS, calls))
        for seed, ratio in enumerate((1.2, 1.3, 1.25))
    ]
    one = over_processes(each)
    assert one.process_speedups == tuple(timing.speedup for timing in each)
    assert one.interval.low < 1.2 and one.interval.high > 1.3
    assert one.variant_s == each[2].variant_s
    assert one.rounds == 3 * ROUNDS
    assert one.variant_arm is not None and one.variant_arm.percentiles is not None
    assert one.variant_arm.percentiles.seconds == {"p50": 0.04, "p90": 0.04, "p95": 0.04, "p99": None}
    assert one.every_round is not None and one.every_round.rounds == 3 * ROUNDS
    with pytest.raises(ValueError, match="at least 3"):
        over_processes(each[:2])
    with pytest.raises(ValueError, match="one setting"):
        over_processes([*each[:2], record(samples(arms()), batch=2)])


def test_a_timing_of_an_older_report_is_still_read() -> None:
    new = json.loads(record(samples(arms(), [()] * ROUNDS)).model_dump_json())
    added = {"baseline_arm", "variant_arm", "every_round", "process_speedups"}
    old = {name: value for name, value in new.items() if name not in added}
    assert len(old) == len(new) - len(added)
    assert Timing.model_validate(old).every_round is None
    assert Timing.model_validate(new).every_round is not None
