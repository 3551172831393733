"""The bars of benchmarks/timing/simulate.py on fewer runs: coverage, false claims and what stopping on width does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "timing" / "simulate.py"


@pytest.fixture(scope="module")
def simulate() -> ModuleType:
    if not SCRIPT.is_file():
        pytest.skip("the benchmarks are not here")
    spec = importlib.util.spec_from_file_location("simulate", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("rounds", [60, 120])
def test_the_interval_covers_the_truth_and_the_verdict_claims_no_difference(
    simulate: ModuleType, rounds: int, phi: float
) -> None:
    found = simulate.cell(0, 600, rounds, phi)
    assert found["coverage"] >= (0.93 if phi < 0.6 else 0.90)
    assert found["coverage"] <= 0.985  # 600 runs: the bar of 0.97 and two standard errors
    assert found["false_differences"] <= 0.06


@pytest.mark.parametrize("per_load", [4, 15])
@pytest.mark.parametrize("phi", [0.0, 0.6])
def test_arms_that_differ_from_load_to_load_are_covered_where_loads_are_counted(
    simulate: ModuleType, phi: float, per_load: int
) -> None:
    found = simulate.cell(0, 600, 60, phi, per_load)
    assert (0.93 if phi < 0.6 else 0.90) <= found["coverage"] <= 0.985
    assert found["false_differences"] <= 0.06


def test_one_load_that_is_taken_for_all_covers_little(simulate: ModuleType) -> None:
    found = simulate.cell(0, 300, 60, 0.0, 60, counted=False)
    assert found["coverage"] < 0.5
    assert found["false_differences"] > 0.2


def test_whole_sessions_with_loads_cover_the_truth_though_they_stop_on_width(simulate: ModuleType) -> None:
    found = simulate.sessions(60, 0.0, simulate.NOISE, 1.0, simulate.LOAD)
    assert found["mean_loads"] >= 12
    assert found["coverage"] >= 0.88
    assert found["verdicts"]["faster"] + found["verdicts"]["slower"] <= 0.06


def test_an_interval_of_independent_rounds_would_not(simulate: ModuleType) -> None:
    series, _ = simulate.log_ratios(0, 600, 60, 0.6)
    half = 2.0 * series.std(axis=1, ddof=1) / 60**0.5
    assert (abs(series.mean(axis=1)) <= half).mean() < 0.85


def test_stopping_on_width_costs_little_coverage_where_the_estimated_width_alone_would(simulate: ModuleType) -> None:
    found = simulate.sessions(150, 0.0, 0.04, 1.0)
    assert 30 < found["mean_rounds"] < 240  # looks were what ended them
    assert found["coverage"] >= 0.93


def test_whole_sessions_that_stop_on_width_claim_nothing_of_equal_arms_and_find_five_percent(
    simulate: ModuleType,
) -> None:
    equal, slower = (simulate.sessions(60, 0.3, simulate.NOISE, ratio) for ratio in (1.0, simulate.SLOWER))
    assert equal["verdicts"]["faster"] + equal["verdicts"]["slower"] <= 0.06
    assert equal["coverage"] >= 0.9
    assert slower["verdicts"]["slower"] >= 0.8
    assert slower["verdicts"]["faster"] == 0
