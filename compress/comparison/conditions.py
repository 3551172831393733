"""Conditions such as `latency>+3%`, `kl>0.05`, `speedup<1.2`: what must not be so of a newer report.

    NAME OP VALUE      OP: < <= > >=
    NAME               size, peak_memory, load_time, latency, speedup, or a quality metric; latency and speedup are of
                       every setting, or with :decode, :decode batch 1 prompt 128 of those that begin so
    +3%  -1%           change of B against A, relative
    +0.01  -2ms        change of B against A, in the figure's unit
    0.05  99%  5MB     B's own value; (-0.5) where that is below zero

Times are in seconds or with us, ms, s; sizes in bytes or with B, kB, MB, GB; shares from 0 to 1 or with %.

A condition is held against the end of the interval that lies further on its own side: `kl>0.05` fails where the upper
end is above 0.05, `speedup<1.2` where the lower end is below 1.2. So a gate is passed by evidence that the bound holds,
and not by a measurement too coarse to tell; the way out of a failure for want of evidence is a longer run (--budget,
--quality-samples). It is how quality.gates of a recipe are judged as well. A change has the interval that follows from
those of both reports. A figure without an interval is compared as it is, and said to be; what is no number fails.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from compress.comparison.figures import Figure, ends
from compress.comparison.records import Change, Comparison, End, Judged
from compress.errors import UsageError, nearest
from compress.report.format import clean

_GRAMMAR = re.compile(
    r"\s*(?P<name>[^\s<>:]+)\s*(?::\s*(?P<setting>[^<>]*?))?\s*(?P<op>[<>]=?)\s*(?P<open>\(?)\s*(?P<sign>[+-]?)\s*"
    r"(?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)\s*(?P<unit>%|[A-Za-z]*)\s*(?P<close>\)?)\s*"
)
_UNITS = {
    "s": {"us": 1e-6, "ms": 1e-3, "s": 1.0},
    "bytes": {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9},
}
_EXAMPLES = "'latency>+3%', 'kl>0.05', 'size>+1%', 'speedup:decode<1.2'"


@dataclass(frozen=True)
class Condition:
    """What must not be so. setting: of a latency or speed-up, empty for all; bound: a number in `unit`, signed."""

    text: str
    name: str
    setting: str
    op: str
    bound: float
    unit: str
    is_change: bool

    def names(self, change: Change) -> bool:
        """Whether a figure is meant."""
        name, _, setting = change.name.partition(":")
        return name == self.name and (not self.setting or f"{setting} ".startswith(f"{self.setting} "))


def parse(text: str) -> Condition:
    """Raises: UsageError for what is no condition."""
    found = _GRAMMAR.fullmatch(text)
    if found is None or bool(found["open"]) != bool(found["close"]):
        raise UsageError(
            f"--fail-if '{clean(text)}' is no condition. Give NAME, one of < <= > >=, and a number: {_EXAMPLES}."
        )
    bound = float(found["number"]) * (-1 if found["sign"] == "-" else 1)
    if not math.isfinite(bound):
        raise UsageError(f"--fail-if '{clean(text)}': the bound is too large a number.")
    is_change = bool(found["sign"]) and not found["open"]
    setting = " ".join((found["setting"] or "").split())
    return Condition(text.strip(), found["name"], setting, found["op"], bound, found["unit"], is_change)


def judge(condition: Condition, comparison: Comparison) -> tuple[Judged, ...]:
    """Hold a condition against every figure that it names.

    Raises: UsageError for a name that neither report has, a unit that the figure does not have, or a change of what was
    not compared.
    """
    meant = [change for change in comparison.changes if condition.names(change)]
    if not meant:
        known = {clean(change.name) for change in comparison.changes} | {"latency", "speedup"}
        known |= {name.partition(" ")[0] for name in known}  # latency:decode, of every setting that begins so
        given = f"{condition.name}:{condition.setting}" if condition.setting else condition.name
        raise _error(condition, f"neither report has '{clean(given)}'.{nearest(given, known)}")
    usable = [change for change in meant if _figure(condition, change) is not None]
    if not usable:
        raise _error(condition, _why(condition, meant[0]))
    return tuple(_judge(condition, change) for change in usable)


def _judge(condition: Condition, change: Change) -> Judged:
    figure = _figure(condition, change)
    assert figure is not None
    bound = _bound(condition, change)
    low, high = ends(figure)
    is_upper = condition.op.startswith(">")
    found = high if is_upper else low
    if math.isnan(figure.value):
        found = figure.value
    # by what must be so, which is not so of what is no number
    held = {">": found <= bound, ">=": found < bound, "<": found >= bound, "<=": found > bound}[condition.op]
    end: End = "value without an interval" if figure.interval is None else "upper end" if is_upper else "lower end"
    is_relative = condition.is_change and condition.unit == "%"
    return Judged(
        condition=condition.text,
        figure=change.name,
        is_change=condition.is_change,
        unit="fraction" if is_relative else change.unit,
        found=found,
        bound=bound,
        end=end,
        failed=not held,
    )


def _figure(condition: Condition, change: Change) -> Figure | None:
    """What is held against the bound: B's own value, the difference, or the ratio less one."""
    if not condition.is_change:
        return change.after
    if condition.unit != "%":
        return change.difference
    if change.ratio is None:
        return None
    interval = change.ratio.interval
    if interval is not None:
        interval = interval.model_copy(update={"low": interval.low - 1, "high": interval.high - 1})
    return Figure(value=change.ratio.value - 1, interval=interval)


def _why(condition: Condition, change: Change) -> str:
    """Why there is nothing to hold against the bound."""
    name = clean(change.name)
    if not condition.is_change:
        return f"B has no '{name}': it was not measured."
    if change.word == "not compared":
        return f"the change of '{name}' is not known: {clean(change.note)}."
    if condition.unit == "%":
        return f"'{name}' is not above zero in A, so that it has no relative change. Give the change as a number."
    return f"'{name}' was compared by its ratio only. Give the change in percent."


def _bound(condition: Condition, change: Change) -> float:
    """The number of a condition in the figure's own unit. Raises: UsageError."""
    if not condition.unit:
        return condition.bound
    if condition.unit == "%":
        if condition.is_change or change.unit == "fraction":
            return condition.bound / 100
        raise _error(condition, f"'{clean(change.name)}' is no share. Put + or - before a change in percent.")
    units = _UNITS.get(change.unit, {})
    if condition.unit not in units:
        allowed = ", ".join(units) or "none but %"
        raise _error(condition, f"'{clean(change.name)}' has no unit '{condition.unit}'. Allowed: {allowed}.")
    return condition.bound * units[condition.unit]


def _error(condition: Condition, why: str) -> UsageError:
    return UsageError(f"--fail-if '{clean(condition.text)}': {why}")
