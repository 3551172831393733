"""One figure of two reports as a `Change`, with the word for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compress.comparison.figures import Figure, difference, excludes, ratio
from compress.comparison.records import Better, Change, Kind, Word


@dataclass(frozen=True)
class Named:
    """What a figure is called, its unit, and which way is better."""

    name: str
    kind: Kind
    unit: str
    better: Better = "lower"
    detail: bool = False


def uncompared(named: Named, before: Figure | None, after: Figure | None, why: str) -> Change:
    """Both figures as they are, and why nothing is said of their difference."""
    return Change(
        name=named.name,
        kind=named.kind,
        unit=named.unit,
        better=named.better,
        detail=named.detail,
        before=before,
        after=after,
        word="not compared",
        note=why,
    )


def changed(
    named: Named,
    before: Figure,
    after: Figure,
    gap: Figure | None,
    factor: Figure | None,
    note: str,
    floor: float = 1.0,
) -> Change:
    """A figure with its difference and its ratio. floor: the ratio >= 1 that noise alone makes: nothing less counts."""
    found = uncompared(named, before, after, note)
    return found.model_copy(update={"difference": gap, "ratio": factor, "word": _word(gap, factor, named, floor)})


def without_intervals(named: Named, before: float | None, after: float | None, note: str) -> Change:
    """A figure that has no interval in either report; None or 0 where it was not measured."""
    first, second = (Figure(value=value) if value else None for value in (before, after))
    if first is None or second is None:
        return uncompared(named, first, second, "not measured in both")
    return changed(named, first, second, difference(first, second), ratio(first, second), note)


def _word(gap: Figure | None, factor: Figure | None, named: Named, floor: float) -> Word:
    """By the ratio for what has a noise floor, which must lie beyond it, else by the difference. Better and worse are
    said of what is known well enough: by its interval, or exactly as a size is."""
    by_ratio = gap is None or (factor is not None and floor > 1)
    found = factor if by_ratio else gap
    if found is None or math.isnan(found.value):
        return "not compared"
    nothing = 1.0 if by_ratio else 0.0
    sign = excludes(found, nothing / floor, nothing * floor)
    if sign == 0:
        is_certain = found.interval is None or found.interval.low == found.interval.high
        return "same" if is_certain and found.value == nothing else "no clear change"
    if found.interval is None and named.kind != "size":
        return "lower" if sign < 0 else "higher"
    return "better" if (sign < 0) == (named.better == "lower") else "worse"
