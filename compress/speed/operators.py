"""What each kind of operator takes of a call, by the runtime's own profiler, in sessions that are never timed: counting
costs time, so these seconds are shares of a slower call."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.errors import UnsupportedError
from compress.records.speed import OperatorTime, OperatorTimes
from compress.target import Session, Target

WARM_CALLS, MOST_CALLS, FEWEST_CALLS = 3, 20, 3
MOST_S = 5.0
"""Seconds of calls per arm, beyond the fewest."""

Bind = Callable[[Session], Callable[[], object]]
"""The call of a session that is counted."""
Counted = Mapping[str, tuple[int, float]]
"""Kind of operator → nodes that ran, and their seconds."""


@dataclass(frozen=True)
class Profiled:
    """One arm: the profiler's name, and what the operators of each call took."""

    profiler: str
    calls: Sequence[Counted]


def repeat(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> int:
    """Calls to warm up, then those to count: how many the latter were."""
    for _ in range(WARM_CALLS):
        call()
    begun, done = clock(), 0
    while done < FEWEST_CALLS or (done < MOST_CALLS and clock() - begun < MOST_S):
        call()
        done += 1
    return done


def operator_times(
    target: Target, folders: Mapping[str, Path], threads: int, setting: str, bind: Bind
) -> OperatorTimes:
    """Both arms ("baseline", "variant") at one setting, each loaded apart.

    Raises: UnsupportedError with the reason where the runtime does not tell; InputError where it does not load.
    """
    profile: Callable[..., Profiled] | None = getattr(target, "profile_operators", None)
    if profile is None:
        raise UnsupportedError(f"{target.RUNTIME} does not tell what its operators take")
    found = {name: profile(folder, threads, bind) for name, folder in folders.items()}
    return operator_record(setting, found["baseline"], found["variant"])


def operator_record(setting: str, baseline: Profiled, variant: Profiled) -> OperatorTimes:
    """Medians over calls, the kind that takes most of either arm first."""
    kinds = dict.fromkeys(kind for arm in (baseline, variant) for one in arm.calls for kind in one)
    rows = (
        OperatorTime(
            kind=kind,
            baseline_nodes=_nodes(baseline, kind),
            variant_nodes=_nodes(variant, kind),
            baseline_s=_seconds(baseline, kind),
            variant_s=_seconds(variant, kind),
        )
        for kind in kinds
    )
    return OperatorTimes(
        profiler=variant.profiler,
        setting=setting,
        calls=min(len(baseline.calls), len(variant.calls)),
        baseline_s=_whole(baseline),
        variant_s=_whole(variant),
        operators=tuple(sorted(rows, key=lambda row: (-max(row.baseline_s, row.variant_s), row.kind))),
    )


def _whole(arm: Profiled) -> float:
    return float(np.median([sum(seconds for _, seconds in one.values()) for one in arm.calls]))


def _nodes(arm: Profiled, kind: str) -> int:
    return max(one.get(kind, (0, 0.0))[0] for one in arm.calls)


def _seconds(arm: Profiled, kind: str) -> float:
    return float(np.median([one.get(kind, (0, 0.0))[1] for one in arm.calls]))
