"""When what is timed is loaded anew: where its memory lies is decided by each load, and stays for all of its rounds.

Two sessions of one file were found to differ by up to 4 % from one load to the next (a step of 1 ms, one machine),
which no number of rounds within one load can tell from a real difference. So loads are the outer level of a timing, as
processes are above them, and the interval counts loads (`compress.stats.intervals.speedup`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

LEAST_LOADS = 4
"""Fewer leave at most two degrees of freedom, with which an interval says next to nothing."""
LEAST_ROUNDS = 4
"""Of a load: more loads than that make the interval no narrower where neighbouring rounds are alike."""
WORK_PER_LOAD = 2.0
"""Seconds of rounds that a second of loading has to be paid with."""
WARM_CALLS = 3
"""Of each arm after a load, and at least a block: the first call of a session also sets its memory up."""


@dataclass(frozen=True)
class Reload:
    """load: drops what the arms run on and loads it anew; they stay the same callables. seconds: that it took last."""

    load: Callable[[], object]
    seconds: float


class Schedule:
    """Counts the rounds and seconds of each load. warm_s: seconds of the calls after it, beside its own; budget_s: what
    is left for rounds and loads. too_dear_s: the seconds of a load, where fewer than LEAST_LOADS would fit."""

    def __init__(self, reload: Reload, warm_s: float, budget_s: float, now: float) -> None:
        self.reload, self.cost_s = reload, reload.seconds + warm_s
        self.began, self.rounds, self.loads = now, 0, 0
        too_dear = LEAST_LOADS * (1 + WORK_PER_LOAD) * self.cost_s > budget_s
        self.too_dear_s = self.cost_s if too_dear else None

    def is_due(self, now: float) -> bool:
        """Whether this load has had its rounds, and they took long enough to be worth another."""
        enough = self.rounds >= LEAST_ROUNDS and now - self.began >= WORK_PER_LOAD * self.cost_s
        return self.too_dear_s is None and enough

    def loaded(self, begun: float, now: float) -> None:
        """A load is done and warm."""
        self.cost_s, self.began, self.rounds = now - begun, now, 0
        self.loads += 1
