"""Paired figures of labelled tasks against slow, obvious twins."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats as distributions

from compress.quality.task_pairs import Pairs, holm, loss_gates, ratio_interval, score_pairs


def pairs(baseline: Any, variant: Any, **changes: Any) -> Pairs:
    first, second = np.array(baseline, np.float64), np.array(variant, np.float64)
    settings = {"task": "t", "metric": "acc", "filter": "none", "weights": np.ones(len(first)), **changes}
    return Pairs(baseline=first, variant=second, **settings)


def test_right_or_wrong_is_judged_by_the_samples_that_changed() -> None:
    before = [1] * 60 + [0] * 40
    after = [1] * 50 + [0] * 10 + [1] * 2 + [0] * 38
    [score] = score_pairs([pairs(before, after)])
    assert (score.gained, score.lost, score.test) == (2, 10, "exact McNemar")
    assert score.change == pytest.approx(-0.08)
    assert score.p_value == pytest.approx(distributions.binomtest(2, 12).pvalue)
    assert score.interval is not None and score.interval.low < -0.08 < score.interval.high < 0
    assert score.recovery == pytest.approx(100 * 52 / 60)


def test_scores_are_judged_by_a_paired_t_test() -> None:
    random = np.random.default_rng(0)
    before = random.random(50)
    after = before - 0.05 + 0.1 * random.standard_normal(50)
    [score] = score_pairs([pairs(before, after)])
    twin = distributions.ttest_rel(after, before)
    assert score.test == "paired t" and score.p_value == pytest.approx(twin.pvalue, rel=1e-6)
    low, high = twin.confidence_interval(0.95)
    assert score.interval is not None
    assert (score.interval.low, score.interval.high) == pytest.approx((low, high), rel=1e-6)


def test_a_change_of_the_detectable_size_is_found_in_eighty_percent_of_all_cases() -> None:
    random, found = np.random.default_rng(0), 0
    [score] = score_pairs([pairs(np.zeros(400) + 0.5, 0.5 + random.standard_normal(400))])
    assert score.detectable is not None
    for _ in range(400):
        shifted = 0.5 + score.detectable + random.standard_normal(400)
        p = score_pairs([pairs(np.zeros(400) + 0.5, shifted)])[0].p_value
        found += p is not None and p < 0.05
    assert 0.72 < found / 400 < 0.88


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_interval_of_a_ratio_agrees_with_a_bootstrap_of_pairs() -> None:
    random = np.random.default_rng(0)
    under = random.random(300) + 0.5
    over = 0.9 * under + 0.1 * random.standard_normal(300)
    value, interval = ratio_interval(over, under)
    drawn = random.integers(0, 300, (4000, 300))
    low, high = np.quantile(over[drawn].sum(1) / under[drawn].sum(1), (0.025, 0.975))
    assert value == pytest.approx(over.sum() / under.sum()) and interval is not None
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_near_chance_there_is_nothing_to_recover() -> None:
    random = np.random.default_rng(0)
    guessed = (random.random(200) < 0.26).astype(float)
    [score] = score_pairs([pairs(guessed, guessed, chance=0.25)])
    assert score.recovery is None and score.chance == 0.25
    known = np.array([1.0] * 150 + [0.0] * 50)
    [score] = score_pairs([pairs(known, known * (np.arange(200) >= 50), chance=0.25)])
    assert score.recovery == pytest.approx(100 * 100 / 150)
    assert score.recovery_over_chance == pytest.approx(100 * (0.5 - 0.25) / (0.75 - 0.25))


def test_of_sums_over_words_the_figure_is_nats_per_word() -> None:
    weights = np.array([10.0, 30.0, 20.0])
    [score] = score_pairs(
        [pairs([20, 60, 44], [22, 66, 44], weights=weights, is_nats=True, higher=False, metric="word_perplexity")]
    )
    assert score.baseline == pytest.approx(124 / 60) and score.change == pytest.approx(8 / 60)
    assert score.unit == "nats" and score.better == "lower" and score.recovery is None


def test_a_gate_takes_the_worse_end_and_fails_without_an_interval() -> None:
    before, after = [1.0] * 95 + [0.0] * 5, [1.0] * 94 + [0.0] * 6
    [score] = score_pairs([pairs(before, after)])
    assert score.interval is not None
    loose, tight = loss_gates([score], 0.05)[0], loss_gates([score], 0.012)[0]
    assert loose.met and not tight.met and loose.found == pytest.approx(-score.interval.low)
    [alone] = score_pairs([pairs([0.3], [0.3])])
    gate = loss_gates([alone], 1.0)[0]
    assert not gate.met and math.isinf(gate.found)
