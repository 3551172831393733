"""Processor time of calls that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

LEAST_S, LEAST_ROUNDS = 0.02, 12
"""Seconds that a call is repeated for in a round; rounds, however short the budget."""


def rounds(calls: Mapping[str, Callable[[], object]], budget_s: float) -> dict[str, NDArray[np.float64]]:
    """Seconds of processor time of a call, of each round, in which all have their turn, in an order by chance."""
    order, end, done = np.random.default_rng(0), time.monotonic() + budget_s, 0
    spent = {name: list[float]() for name in calls}
    repeats = {name: max(1, round(LEAST_S / once(call))) for name, call in calls.items()}
    while time.monotonic() < end or done < LEAST_ROUNDS:
        for name in order.permutation(list(calls)):
            started = time.process_time()
            for _ in range(repeats[name]):
                calls[name]()
            spent[name].append((time.process_time() - started) / repeats[name])
        done += 1
    return {name: np.array(seconds) for name, seconds in spent.items()}


def once(call: Callable[[], object]) -> float:
    """Seconds of the third call."""
    for _ in range(2):
        call()
    started = time.process_time()
    call()
    return time.process_time() - started
