"""Which of several variants is worth taking: dominance under noise, and one choice under a user's limits.

Pure functions of estimates. On every axis lower is better: loss, latency as a share of the baseline's time, bytes. One
variant is better than another on an axis only where the interval of their difference says so; where they were not
measured side by side, where their own intervals do not touch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from compress.records.base import Interval

Axis = Literal["latency", "size", "loss"]
AXES: tuple[Axis, ...] = ("latency", "size", "loss")
"""Also the order in which they decide where the user names none."""
MARGINS: Mapping[Axis, float] = {"latency": 0.01, "size": 0.01, "loss": 0.0}
"""Relative differences too small to be worth a claim, however certain."""
COMPARATIVES: Mapping[Axis, str] = {"latency": "slower", "size": "larger", "loss": "loses more"}


@dataclass(frozen=True)
class Estimate:
    """A figure and the ends of its interval; both are the figure itself where it is exact."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, interval: Interval | None = None) -> Estimate:
        """A figure with or without an interval. What is no number is infinite: it is worse than anything."""
        ends = (value, value) if interval is None else (interval.low, interval.high)
        return cls(*(each if math.isfinite(each) else math.inf for each in (value, *ends)))


@dataclass(frozen=True)
class Limit:
    """The most that a user accepts on one axis, in the axis's unit, and as it was given."""

    axis: Axis
    most: float
    text: str


@dataclass(frozen=True)
class Candidate:
    """One variant. effort: passes, then kinds of operators; less is simpler. refused: why it may not be taken."""

    name: str
    estimates: Mapping[Axis, Estimate]
    effort: tuple[int, int] = (0, 0)
    refused: str = ""


Differences = Mapping[tuple[Axis, str, str], Estimate]
"""First minus second of two variants measured side by side; of latency the logarithm of the ratio. Zero: the same."""


@dataclass(frozen=True)
class Choice:
    """What to take and why. tied: what could not be told from it; allowed: what meets every limit; reasons: why each
    other was not taken."""

    front: tuple[str, ...]
    recommended: str | None
    sentence: str
    tied: tuple[str, ...]
    allowed: tuple[str, ...]
    reasons: dict[str, str]


def is_better(axis: Axis, first: Candidate, second: Candidate, differences: Differences) -> bool:
    """Whether the first is better on an axis beyond the interval. Never where either was not measured."""
    if axis not in first.estimates or axis not in second.estimates:
        return False
    margin, found = MARGINS[axis], differences.get((axis, first.name, second.name))
    if found is not None:
        return found.high < -(math.log1p(margin) if axis == "latency" else margin)
    return first.estimates[axis].high * (1 + margin) < second.estimates[axis].low


def dominates(first: Candidate, second: Candidate, differences: Differences) -> bool:
    """Better beyond the interval on one axis, and worse beyond it on none."""
    return any(is_better(axis, first, second, differences) for axis in AXES) and not any(
        is_better(axis, second, first, differences) for axis in AXES
    )


def front(candidates: Sequence[Candidate], differences: Differences) -> tuple[str, ...]:
    """Those that no other dominates, in their order."""
    return tuple(
        each.name for each in candidates if not any(dominates(other, each, differences) for other in candidates)
    )


def unmet(candidate: Candidate, limits: Sequence[Limit]) -> list[Limit]:
    """The limits that the worse end of an interval exceeds, or of which nothing was measured."""
    estimates = candidate.estimates
    return [each for each in limits if each.axis not in estimates or not estimates[each.axis].high <= each.most]


def choose(
    candidates: Sequence[Candidate],
    differences: Differences,
    limits: Sequence[Limit] = (),
    prefer: Sequence[Axis] = (),
    *,
    bounded: bool = False,
) -> Choice:
    """The front of those that may be taken, and of these the best that meets every limit.

    Axes decide one after another, those of `prefer` first: what is worse than the best beyond the interval falls out.
    What is left is a tie, which the simplest takes. bounded: something else, a gate say, limits the loss. Where nothing
    limits the loss and nothing is preferred, a choice between smaller and better is the user's: none is recommended,
    unless one is the whole front.
    """
    sound = [each for each in candidates if not each.refused]
    on_front = front(sound, differences)
    reasons = {each.name: each.refused for each in candidates if each.refused}
    allowed = []
    for each in sound:
        if missed := unmet(each, limits):
            reasons[each.name] = "; ".join(_missed(each, limit) for limit in missed)
        else:
            allowed.append(each)
    names = tuple(each.name for each in allowed)
    if not allowed:
        return Choice(on_front, None, _nothing(candidates, sound), (), (), reasons)
    is_open = not (prefer or bounded or any(limit.axis == "loss" for limit in limits))
    if is_open and len(front(allowed, differences)) > 1:
        text = f"No recommendation: nothing says how much may be lost. On the front: {', '.join(on_front)}"
        reasons |= _dominated(allowed, differences)
        return Choice(on_front, None, text, (), names, reasons)
    return _best(allowed, differences, prefer, on_front, reasons)


def _best(
    allowed: Sequence[Candidate],
    differences: Differences,
    prefer: Sequence[Axis],
    on_front: tuple[str, ...],
    reasons: dict[str, str],
) -> Choice:
    """One of at least one."""
    order = list(dict.fromkeys((*prefer, *AXES)))
    left = list(allowed)
    for axis in order:
        known = [each for each in left if axis in each.estimates]
        if not known:
            continue
        best = min(known, key=lambda each: each.estimates[axis].value)
        out = [each for each in left if is_better(axis, best, each, differences)]
        reasons |= {each.name: _lost(axis, each, best) for each in out}
        left = [each for each in left if each not in out]
    left.sort(key=lambda each: each.effort)  # a stable sort: of equally simple ones the first given
    chosen, tied = left[0], tuple(each.name for each in left[1:])
    reasons |= dict.fromkeys(tied, f"not to be told from {chosen.name}, which is as simple or simpler")
    text = f"Recommended: {chosen.name}"
    if tied:
        text += f" (a tie with {', '.join(tied)}; the simplest was taken)"
    elif len(allowed) == 1 and len(reasons) > 0:
        text += " (the only one that may be taken)"
    return Choice(on_front, chosen.name, text, tied, tuple(each.name for each in allowed), reasons)


def _dominated(allowed: Sequence[Candidate], differences: Differences) -> dict[str, str]:
    found = {}
    for each in allowed:
        by = [other.name for other in allowed if dominates(other, each, differences)]
        if by:
            found[each.name] = f"{by[0]} is better in something and worse in nothing"
    return found


def _lost(axis: Axis, loser: Candidate, best: Candidate) -> str:
    values = loser.estimates[axis].value, best.estimates[axis].value
    return f"{COMPARATIVES[axis]} than {best.name} ({_shown(axis, values[0])} against {_shown(axis, values[1])})"


def _missed(candidate: Candidate, limit: Limit) -> str:
    found = candidate.estimates.get(limit.axis)
    if found is None:
        return f"{limit.axis} was not measured (limit {limit.text})"
    most = "" if _is_alike(limit) else f", {_shown(limit.axis, limit.most)}"
    return f"{limit.axis} may be up to {_shown(limit.axis, found.high)} (limit {limit.text}{most})"


def _is_alike(limit: Limit) -> bool:
    """Whether a limit was given in the unit in which the figure beside it is shown."""
    return limit.axis == "loss" or limit.text.endswith({"latency": "x", "size": "MB"}[limit.axis])


def _nothing(candidates: Sequence[Candidate], sound: Sequence[Candidate]) -> str:
    if not sound:
        return f"No recommendation: none of {len(candidates)} variants may be taken"
    return "No recommendation: no variant meets every limit"


def _shown(axis: Axis, value: float) -> str:
    if axis == "latency":
        return f"{value:.3g}x the baseline's time"
    return f"{value / 1e6:.4g} MB" if axis == "size" else f"{value:.3g}"
