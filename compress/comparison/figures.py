"""How much one estimate differs from another, with an interval: pure functions on figures and their intervals.

Two reports are two independent measurements, so the uncertainty of both enters. Where one figure has an interval and
the other has none, the latter counts as exact; where neither has, the change has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from compress.records.base import Interval, Record


class Figure(Record):
    """A value and its interval, where one is known."""

    value: float
    interval: Interval | None = None


def difference(before: Figure, after: Figure) -> Figure:
    """after - before of independent estimates.

    The interval is made of those of both (the method of variance estimates recovery; Zou and Donner 2008, Statistics
    in Medicine 27, 1693): its lower end is as far below the difference as the lower reach of `after` and the upper
    reach of `before` add up to in quadrature, its upper end the other way round. So lopsided intervals stay lopsided.
    """
    value = after.value - before.value
    if before.interval is None and after.interval is None:
        return Figure(value=value)
    down, up = _reach(after), _reach(before)
    low, high = math.hypot(down[0], up[1]), math.hypot(down[1], up[0])
    return Figure(value=value, interval=Interval(low=value - low, high=value + high, level=_level(before, after)))


def ratio(before: Figure, after: Figure) -> Figure | None:
    """after / before of independent estimates that are positive, by `difference` of their logarithms; None for others.

    An interval that reaches 0 or below makes one that reaches 0, or infinity.
    """
    if not (before.value > 0 and after.value > 0):  # not a number is neither
        return None
    return mapped(difference(mapped(before, _log), mapped(after, _log)), exp)


def mapped(figure: Figure, fn: Callable[[float], float]) -> Figure:
    """fn of a figure, for a rising fn."""
    if figure.interval is None:
        return Figure(value=fn(figure.value))
    ends = {"low": fn(figure.interval.low), "high": fn(figure.interval.high)}
    return Figure(value=fn(figure.value), interval=figure.interval.model_copy(update=ends))


def excludes(figure: Figure, low: float, high: float) -> int:
    """1 where the whole interval, or the value without one, lies above `high`; -1 where it lies below `low`; else 0."""
    least, most = ends(figure)
    if least > high:
        return 1
    return -1 if most < low else 0


def ends(figure: Figure) -> tuple[float, float]:
    """Both ends of the interval; twice the value where there is none."""
    if figure.interval is None:
        return figure.value, figure.value
    return figure.interval.low, figure.interval.high


def exp(value: float) -> float:
    """e to the power of a value, infinite where it is too large."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _reach(figure: Figure) -> tuple[float, float]:
    """How far the interval reaches below and above the value."""
    if figure.interval is None:
        return 0.0, 0.0
    # in this order a nan stays one
    return max(figure.value - figure.interval.low, 0.0), max(figure.interval.high - figure.value, 0.0)


def _level(*figures: Figure) -> float:
    return min(figure.interval.level for figure in figures if figure.interval is not None)
