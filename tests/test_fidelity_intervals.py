"""Quantiles and calibration: which figures have an interval, and that it covers."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats as distributions

from compress.quality.calibration_error import Answers, calibration_figures
from compress.quality.fidelity import binned
from compress.quality.metrics import gates_met
from compress.stats.quantiles import clustered_quantile, is_supported, needed
from helpers.fidelity_twin import judged, window


def test_a_part_that_one_window_alone_reaches_has_no_interval() -> None:
    points = binned([np.ones(4), np.ones(2)], [np.arange(4.0), np.arange(2.0)], np.array([0.0, 2.0, 4.0]))
    assert [point.count for point in points] == [4, 2]
    assert points[0].interval is not None and points[1].interval is None


def test_too_few_tokens_for_a_percentile_or_a_calibration_are_told_and_meet_no_gate() -> None:
    found = judged([window(seed, 20) for seed in range(3)])
    assert "kl_p90" in found.metrics and "kl_p99" not in found.metrics and "ece" not in found.metrics
    assert any("kl_p99 is not given: 60 tokens, and 500 are needed" in note for note in found.notes)
    assert any("Calibration is not given: 60 tokens, and 150 are needed" in note for note in found.notes)
    (gate,) = gates_met(found, {"kl_p99": 1e9})
    assert math.isnan(gate.found) and not gate.met


def test_a_quantile_is_given_where_five_samples_lie_beyond_it() -> None:
    assert [needed(share) for share in (0.5, 0.9, 0.99, 0.01)] == [10, 50, 500, 500]
    assert is_supported(500, 0.99) and not is_supported(499, 0.99)


def test_the_interval_of_a_quantile_covers_it_though_samples_come_in_clusters() -> None:
    maker, inside, runs = np.random.default_rng(0), 0, 200
    for _ in range(runs):
        shifts = 0.5 * maker.standard_normal(24)
        clusters = [shift + math.sqrt(0.75) * maker.standard_normal(50) for shift in shifts]
        _, interval = clustered_quantile(clusters, 0.9)
        assert interval is not None
        inside += interval.low <= distributions.norm.ppf(0.9) <= interval.high
    assert inside / runs > 0.89


def test_the_change_of_a_calibration_error_is_covered_and_seldom_claimed_where_there_is_none() -> None:
    """Two models equally far off in opposite halves of the answers, correlated within windows."""
    maker, claimed, runs = np.random.default_rng(1), 0, 200
    for _ in range(runs):
        arms: list[list[list[np.ndarray]]] = [[[], []], [[], []]]
        for _ in range(24):
            shift, base = 0.05 * maker.standard_normal(), maker.uniform(0.2, 0.95, 80)
            right = maker.random(80) < np.clip(base + shift, 0, 1)
            for arm in arms:
                arm[0].append(np.clip(base + 0.08 + 0.02 * maker.standard_normal(80), 0, 1))
                arm[1].append(right)
        own, original = (Answers(*arm) for arm in arms)
        interval = calibration_figures(own, original)["ece_change"][1]
        assert interval is not None
        claimed += not interval.low <= 0 <= interval.high
    assert claimed / runs < 0.1
