"""Scales and ticks of the drawings."""

from __future__ import annotations

from itertools import pairwise

import pytest

from compress.report.axes import Scale, decade_scale, decade_ticks, linear_scale, linear_ticks


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 7.0), (1e-5, 3e-5), (0.0, 1e9), (2.0, 2.1)])
def test_ticks_lie_inside_their_scale(low: float, high: float) -> None:
    scale = linear_scale([low, high], 0.0, 100.0)
    ticks = linear_ticks(scale)
    assert 2 <= len(ticks) <= 5 and all(0 < scale.at(tick) < 100 for tick in ticks)
    assert len({round(after - before, 12) for before, after in pairwise(ticks)}) == 1


@pytest.mark.parametrize(("low", "high"), [(1e-6, 2e-6), (3e-4, 5.0), (1.0, 1.0), (1e-9, 1e9)])
def test_decades_hold_their_values(low: float, high: float) -> None:
    scale = decade_scale([low, high], 0.0, 100.0)
    assert scale.low <= low and high <= scale.high * 1.000001
    assert 1 <= len(decade_ticks(scale)) <= 6


def test_a_scale_draws_what_it_cannot_hold_at_its_edge() -> None:
    scale = Scale(1.0, 10.0, 0.0, 50.0, log=True)
    assert [scale.at(value) for value in (float("nan"), -5.0, 0.5, 1e9, float("inf"))] == [0.0, 0.0, 0.0, 50.0, 50.0]
    assert scale.at(10**0.5) == pytest.approx(25.0)
