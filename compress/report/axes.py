"""Scales and ticks of the charts: where a number lies on an axis. Positions are whatever unit the ends are given in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

_LIMIT = 64.0  # ratios beyond it are drawn at the edge
_TICK_GAP = 0.12  # of the axis, between two labels
_COARSE = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
_MIDDLE = (*_COARSE, 0.25, 0.3, 0.4, 0.7, 1.5, 3.0, 4.0, 7.0, 15.0, 30.0)
_FINE = tuple(step / 10 for step in range(3, 31))
_FINEST = tuple(step / 20 for step in range(16, 27))
_STEPS = (1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """From [low, high] to [start, end]; values outside are drawn at the edge, and so is what is no number."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Position of a value."""
        if math.isnan(value) or value <= self.low:
            return self.start
        if value >= self.high:
            return self.end
        return self.start + (self.end - self.start) * self.share(value)

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def ratio_scale(values: Iterable[float], start: float, end: float) -> Scale:
    """A log scale around 1 that holds the ratios: half and double are equally far from it."""
    known = [clamp(value) for value in values if not math.isnan(value)]
    return Scale(min([*known, 0.9]) / 1.03, max([*known, 1.1]) * 1.03, start, end, log=True)


def ratio_ticks(scale: Scale) -> list[float]:
    """Round numbers from 1 outwards, at least four where they fit, none closer than its label is wide."""
    for candidates in (_COARSE, _MIDDLE, _FINE, _FINEST):
        kept = [1.0]
        inside = (value for value in candidates if scale.low <= value <= scale.high)
        for value in sorted(inside, key=lambda value: abs(math.log(value))):
            if all(abs(scale.share(value) - scale.share(other)) >= _TICK_GAP for other in kept):
                kept.append(value)
        if len(kept) >= 4:
            break
    return sorted(kept)


def linear_scale(values: Iterable[float], start: float, end: float, pad: float = 0.08) -> Scale:
    """A linear scale that holds the finite values, with room at both ends."""
    known = [value for value in values if math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    room = pad * (high - low) or pad * abs(high) or 1.0
    return Scale(low - room, high + room, start, end)


def linear_ticks(scale: Scale, most: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten inside the scale, at most `most`."""
    width = scale.high - scale.low
    if not math.isfinite(width) or width <= 0:
        return []
    power = 10.0 ** math.floor(math.log10(width / most))
    for step in (power * factor for factor in (*_STEPS, 20.0)):
        first, last = math.ceil(scale.low / step), math.floor(scale.high / step)
        if last - first < most:
            return [round(step * place, 12) for place in range(first, last + 1)]
    return []


def decade_scale(values: Iterable[float], start: float, end: float) -> Scale:
    """A log scale that holds the positive finite values, ending at whole steps of 1, 2, 5."""
    known = [value for value in values if math.isfinite(value) and value > 0]
    low, high = min(known, default=1.0), max(known, default=10.0)
    return Scale(_step_below(low), max(1 / _step_below(1 / high), 2 * low), start, end, log=True)


def decade_ticks(scale: Scale, most: int = 6) -> list[float]:
    """Powers of ten inside the scale, with 2 and 5 between them where those fit."""
    first, last = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
    powers = range(first, last + 1)
    for factors in ((1.0, 2.0, 5.0), (1.0,)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        inside = [value for value in found if scale.low * 0.999 <= value <= scale.high * 1.001]
        if len(inside) <= most:
            return inside
    every = -(-len(inside) // most)
    return inside[::every]


def clamp(ratio: float) -> float:
    """A ratio that an axis can hold."""
    return min(max(ratio, 1 / _LIMIT), _LIMIT)


def _step_below(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return max(factor * power for factor in (1.0, 2.0, 5.0) if factor * power <= value * 1.000001)
