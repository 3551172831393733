"""What one may do after reading a report: a sentence each, the most urgent first."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from compress.records import Gate, Report
from compress.records.speed import LONGER
from compress.report import format as fmt
from compress.report.format import clean
from compress.report.heat_rows import heat_of
from compress.report.verdict import headline_timing, metric_name

_PREDICTING = ("encoder", "image-classifier", "image-outputs", "classifier", "array-outputs")
_VERBS = {"causal-lm": "compress generate", **dict.fromkeys(_PREDICTING, "compress predict")}
MAX_STEPS = 4
UNKNOWN = "OUT"
"""Stands in a command for the folder of the report."""


def next_steps(report: Report, folder: Path | None = None) -> tuple[str, ...]:
    """folder: of the report, which commands name."""
    out = argument(folder)
    found = [*_agreement(report), *_gates(report), *_speed(report, out), *_use(report, out)]
    return tuple(found[:MAX_STEPS])


def argument(folder: Path | None) -> str:
    """A folder as a shell takes it; `UNKNOWN` where it is not known, or its name is none to show in a line of code."""
    text = "" if folder is None else str(folder)
    if not text or not text.isprintable() or "`" in text:
        return UNKNOWN
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


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


def _speed(report: Report, out: str) -> Iterable[str]:
    headline = headline_timing(report.speed)
    if headline is None:
        machine = clean(report.profile)
        if _ran(report):
            yield f"Nothing was timed. On a machine of profile {machine}, `compress profile {out}` times it."
        else:
            yield (
                f"Nothing was timed here. On a machine of profile {machine}, `compress verify {out}` checks it, "
                f"then `compress profile {out}` times it."
            )
        return
    opened = [timing.name for timing in report.speed.timings if timing.is_open] if report.speed else []
    if opened:
        command = LONGER.replace(UNKNOWN, out)
        if report.speed and report.speed.processes > 1:  # which was not enough
            command = command.replace("--budget 60", "--budget 240")
        yield (
            f"`{command}` settles the speed at {fmt.listing(opened, limit=2)}: it times longer, in three fresh "
            "processes. Let nothing else run."
        )
    if headline.verdict == "slower":
        yield "Slower here: `compress plan` names the layers without a fast kernel on this profile, and what would be."


def _use(report: Report, out: str) -> Iterable[str]:
    agrees = report.verification is None or report.verification.agrees
    verb = _VERBS.get(report.request.task if report.request else "")
    if not agrees or not (_ran(report) or headline_timing(report.speed)):
        return  # told already
    if verb:
        yield f"`{verb} {out}` runs it; `compress verify {out}` checks it on another machine."
    else:
        yield f"`compress verify {out}` checks it on the machine that it was made for."


def _ran(report: Report) -> bool:
    """Whether it ran in the runtime that it was made for."""
    return report.verification is not None and report.verification.level == "ran"


_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._")
