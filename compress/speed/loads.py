"""The sessions of all arms of a timing, which can be dropped and loaded anew."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from compress.speed.reloads import Reload
from compress.target import Session

Bind = Callable[[Mapping[str, Session]], Mapping[str, Callable[[], object]]]
"""What is timed of each session."""


class Loads:
    """Arms by name, loaded. All are dropped before any is loaded again, so memory holds each once at any time.

    Args: loaders: gives each arm's session; seed: of the order of loading, which is another each time, since an arm
    that is always loaded first would always find the same memory free. Raises: what a loader raises.
    """

    def __init__(
        self, loaders: Mapping[str, Callable[[], Session]], seed: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._loaders, self._random, self._clock = loaders, np.random.default_rng(seed), clock
        self.sessions: dict[str, Session] = {}
        self.seconds = 0.0
        self.again()

    def again(self) -> None:
        """Drop every session and load it anew; `seconds`: what this took, the first time what it would take again."""
        self.sessions.clear()
        names, loaded, ends = list(self._loaders), dict[str, Session](), [self._clock()]
        for place in self._random.permutation(len(names)):
            loaded[names[place]] = self._loaders[names[place]]()
            ends.append(self._clock())
        self.sessions.update((name, loaded[name]) for name in names)
        if self.seconds or len(names) == 1:
            self.seconds = ends[-1] - ends[0]
        else:  # the first of all pays for imports too, so it is taken to be like the others
            self.seconds = (ends[-1] - ends[1]) * len(names) / (len(names) - 1)

    def arms(self, bind: Bind) -> tuple[dict[str, Callable[[], object]], Reload]:
        """Callables that stay the same over loads, and what loads them anew. Only the last ones made are kept alive."""
        current = dict(bind(self.sessions))

        def reload() -> None:
            current.clear()  # what is timed holds its session
            self.again()
            current.update(bind(self.sessions))

        def arm(name: str) -> Callable[[], object]:
            return lambda: current[name]()

        return {name: arm(name) for name in self._loaders}, Reload(reload, self.seconds)
