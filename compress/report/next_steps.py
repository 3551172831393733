"""What one may do after reading a report: a sentence each, the most urgent first."""

from __future__ import annotations

from collections.abc import Iterable

from compress.records import Gate, Report
from compress.report import format as fmt
from compress.report.format import clean
from compress.report.heat_rows import heat_of
from compress.report.verdict import headline_timing, metric_name

_PREDICTING = ("image-classifier", "image-outputs", "classifier", "array-outputs")
_VERBS = {"causal-lm": "compress generate OUT", **dict.fromkeys(_PREDICTING, "compress predict OUT")}
MAX_STEPS = 4


def next_steps(report: Report) -> tuple[str, ...]:
    """OUT in a command is the folder of the report."""
    found = [*_agreement(report), *_gates(report), *_speed(report), *_use(report)]
    return tuple(found[:MAX_STEPS])


def _agreement(report: Report) -> Iterable[str]:
    verification = report.verification
    if verification is not None and not verification.agrees:
        yield "Do not use this artifact: its runtime does not compute what the model does. Please report it."


def _gates(report: Report) -> Iterable[str]:
    failed = [gate for gate in report.gates if not gate.met]
    if not failed:
        return
    named = " and ".join(_missed(gate) for gate in failed[:2])
    heat = heat_of(report.passes)
    worst = [cell.layer for cell in heat.worst] if heat else []
    if worst and all(set(name) <= _SAFE for name in worst):
        yield (
            f"{named}. The layers of largest error may be left alone: add `ignore=[{', '.join(worst)}]` to the pass. "
            "Or use more bits."
        )
    else:
        yield f"{named}. Use more bits, a smaller group size, or a pass that minimizes the error of outputs."


def _missed(gate: Gate) -> str:
    found, bound = fmt.told_apart(gate.found, gate.bound)
    return f"{metric_name(gate.name)} is {found} where {bound} was asked for"


def _speed(report: Report) -> Iterable[str]:
    headline = headline_timing(report.speed)
    if headline is None:
        yield (
            f"Nothing was timed here. On a machine of profile {clean(report.profile)}, `compress profile OUT` times it."
        )
        return
    if headline.verdict == "inconclusive":
        yield "The speed is not settled: `compress profile OUT --budget 120` times longer. Let nothing else run."
    elif headline.verdict == "slower":
        yield "Slower here: `compress plan` names the layers without a fast kernel on this profile, and what would be."


def _use(report: Report) -> Iterable[str]:
    agrees = report.verification is None or report.verification.agrees
    verb = _VERBS.get(report.request.task if report.request else "")
    if agrees and verb and headline_timing(report.speed) is not None:
        yield f"`{verb}` runs it; `compress verify OUT` checks it on another machine."
    elif agrees:
        yield "`compress verify OUT` checks it on the machine that it was made for."


_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._")
