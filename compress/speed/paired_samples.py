"""What a paired timing found: seconds per call by arm and round, and the estimates made of them. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compress.records import Interval
from compress.speed.disturbance import MOST_VOIDED
from compress.stats.intervals import MIN_ROUNDS, expected_half_width, half_width, load_spread, speedup

Stop = Literal["width", "rounds", "budget"]
LOADS_TO_STOP = 12
"""Fewer have a width that is small by chance so often that stopping at it leaves 90 % coverage (simulate.py)."""


@dataclass(frozen=True)
class Warmup:
    """How one arm got ready: its first call apart (the cold start), calls made, whether they settled, repeats."""

    first_call_s: float
    calls: int
    settled: bool
    repeats: int
    call_s: float = 0.0


@dataclass(frozen=True, eq=False)
class PairedSamples:
    """Seconds per call of every arm and round. `control` is the baseline's second block of each round.

    causes: what disturbed each round, where counters were read. calls: seconds of each single call by round, where
    calls are long enough. loads: which load of the arms each round was made with, all 0 where they were loaded once;
    too_dear_s: seconds of a load with its warm-up, where that is why.
    """

    baseline: str
    seconds: Mapping[str, NDArray[np.float64]]
    control: NDArray[np.float64]
    warmups: Mapping[str, Warmup]
    stopped: Stop
    elapsed_s: float
    target_half_width: float
    causes: tuple[tuple[str, ...], ...] | None = None
    calls: Mapping[str, Sequence[NDArray[np.float64]]] = field(default_factory=dict)
    loads: Sequence[int] = ()
    too_dear_s: float | None = None

    @property
    def rounds(self) -> int:
        """Rounds measured, each with every arm once and the baseline twice."""
        return len(self.control)

    @property
    def disturbed(self) -> NDArray[np.bool_]:
        """(rounds,) whether something that the counters tell of happened."""
        return np.array([bool(found) for found in self.causes or [()] * self.rounds], dtype=np.bool_)

    @property
    def kept(self) -> NDArray[np.bool_]:
        """(rounds,) the undisturbed ones; all of them where those are too few to stand for the machine."""
        disturbed = self.disturbed
        few = disturbed.sum() <= MOST_VOIDED * self.rounds and (~disturbed).sum() >= MIN_ROUNDS
        return ~disturbed if few else np.ones(self.rounds, dtype=np.bool_)

    @property
    def rounds_per_cause(self) -> dict[str, int]:
        """Cause to rounds; a round may have several."""
        return dict(Counter(name for found in self.causes or () for name in found))

    @property
    def load_count(self) -> int:
        """Loads that the rounds were made with, those of disturbed rounds too."""
        return max(self.loads, default=0) + 1

    def loads_of(self, every: bool = False) -> NDArray[np.int64] | None:
        """(kept rounds,) the load that each was made with; None where there was one only. every: of all rounds."""
        if self.load_count == 1:
            return None
        return np.array(self.loads)[self.kept if not every else slice(None)]

    def speedup(self, variant: str, every: bool = False) -> tuple[float, Interval]:
        """See `compress.stats.intervals.speedup`, with loads as the outer level."""
        return speedup(self.log_ratios(variant, every), loads=self.loads_of(every))

    def load_spread(self, variant: str) -> float | None:
        """See `compress.stats.intervals.load_spread`; None where the arms were loaded once."""
        loads = self.loads_of()
        return None if loads is None else load_spread(self.log_ratios(variant), loads)

    def control_interval(self, every: bool = False) -> Interval:
        """Of the baseline against itself, in the same load, so that loads make no difference."""
        return speedup(self.control_log_ratios(every))[1]

    def log_ratios(self, variant: str, every: bool = False) -> NDArray[np.float64]:
        """(kept rounds,) ln(baseline / variant): above 0 where the variant is faster. every: of all rounds."""
        return self._log_ratios(self.seconds[variant], every)

    def control_log_ratios(self, every: bool = False) -> NDArray[np.float64]:
        """(kept rounds,) ln(baseline / baseline again). every: of all rounds."""
        return self._log_ratios(self.control, every)

    def single_calls(self, arm: str) -> NDArray[np.float64]:
        """(calls,) seconds of each call in the kept rounds; none where calls are too short to be timed singly."""
        rounds = self.calls.get(arm, ())
        return np.concatenate([[], *(each for each, kept in zip(rounds, self.kept, strict=False) if kept)])

    def half_width(self, variant: str) -> float:
        """The wider of the variant's and the control's interval halves, on the log scale."""
        return max(half_width(each) for each in (self.speedup(variant)[1], self.control_interval()))

    @property
    def narrow(self) -> bool:
        """Whether every interval, the control's too, is as narrow as asked, and not by chance (expected_half_width)."""
        if self.loads and self.too_dear_s is None and self.load_count < LOADS_TO_STOP:
            return False
        variants, loads = [name for name in self.seconds if name != self.baseline], self.loads_of()
        found = [half_width(self.control_interval()), expected_half_width(self.control_log_ratios())]
        found += [half_width(self.speedup(name)[1]) for name in variants]
        found += [expected_half_width(self.log_ratios(name), loads=loads) for name in variants]
        return max(found) <= self.target_half_width

    def _log_ratios(self, seconds: NDArray[np.float64], every: bool) -> NDArray[np.float64]:
        with np.errstate(divide="ignore", invalid="ignore"):  # a zero is refused where the ratios are used
            ratios = np.log(self.seconds[self.baseline] / seconds)
        return ratios if every else ratios[self.kept]
