"""Figures as text: no more digits than the interval supports, units that suit."""

from __future__ import annotations

import pytest

from compress.records import Interval, Metric
from compress.report import format as fmt


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (0.0052, 0.0048, 0.0056, "0.0052 (0.0048 to 0.0056)"),
        (21.83, 18.6, 25.2, "21.8 (18.6 to 25.2)"),
        (21.83, 14.0, 30.0, "22 (14 to 30)"),
        (1.0004, 1.0001, 1.0007, "1.0004 (1.0001 to 1.0007)"),
        (1523.0, 1490.0, 1556.0, "1523 (1490 to 1556)"),
        (0.0, 0.0, 0.0, "0 (0 to 0)"),
        (-0.001, -0.012, 0.01, "-0.001 (-0.012 to 0.010)"),
    ],
)
def test_digits_stop_where_the_interval_does(value: float, low: float, high: float, text: str) -> None:
    interval = Interval(low=low, high=high)
    assert fmt.with_interval(fmt.estimate(value, interval), interval) == text


@pytest.mark.parametrize(
    ("ratio", "low", "high", "text"),
    [
        (0.917, 0.42, 1.99, "0.92x (0.42 to 1.99)"),
        (2.04, 1.6, 2.6, "2.04x (1.60 to 2.60)"),
        (12.3, 8.0, 18.0, "12.3x (8.0 to 18.0)"),
        (1.0004, 1.0001, 1.0007, "1.0004x (1.0001 to 1.0007)"),
        (0.012, 0.003, 0.05, "0.012x (0.003 to 0.050)"),
    ],
)
def test_a_ratio_keeps_its_digits_however_wide_its_interval(ratio: float, low: float, high: float, text: str) -> None:
    interval = Interval(low=low, high=high)
    assert fmt.with_interval(fmt.speedup(ratio, interval), interval) == text


@pytest.mark.parametrize(
    ("value", "half", "text"), [(21.83, 8, "21.8"), (1523.4, 30, "1523"), (0.0052, 1e-5, "0.00520")]
)
def test_a_figure_that_stands_alone_has_three_digits_or_more(value: float, half: float, text: str) -> None:
    interval = Interval(low=value - half, high=value + half)
    metric = Metric(value=value, interval=interval, samples=3, unit="1", protocol="p", better="lower")
    assert fmt.plain(metric) == text


def test_a_figure_that_is_nearly_one_is_not_written_as_a_power() -> None:
    interval = Interval(low=0.99999991, high=0.99999995)
    assert fmt.with_interval(fmt.estimate(0.99999993, interval), interval) == "0.99999993 (0.99999991 to 0.99999995)"


def test_another_level_is_spelled_out() -> None:
    interval = Interval(low=1.55, high=1.69, level=0.99)
    assert fmt.with_interval(fmt.speedup(1.62, interval), interval) == "1.62x (99% 1.55 to 1.69)"


def test_units_suit_the_quantity() -> None:
    assert [fmt.size(count) for count in (0, 999, 4_700_000, 999_999, 7.5e12)] == [
        "0 B",
        "999 B",
        "4.7 MB",
        "1 MB",
        "7.5 TB",
    ]
    times = [fmt.duration(seconds) for seconds in (4.2e-5, 0.0076, 12.3, 600, 90_000)]
    assert times == ["42.0 us", "7.60 ms", "12.3 s", "10.0 min", "25.0 h"]
    assert [fmt.percent(share) for share in (1.0, 0.9999, 0.962, 0.0)] == ["100.0%", "over 99.9%", "96.2%", "0.0%"]
