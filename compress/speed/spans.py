"""Whole requests in paired rounds, and the seconds of each of their spans: before, in and after the model.

"Beyond Inference" (arXiv 2403.12981): what stands around the model may take more time than it, so a model that is twice
as fast rarely makes a request twice as fast. Both speed-ups are told, and the ceiling (Amdahl 1967): that of a model
which takes no time at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.records.speed import EndToEnd, Span, SpanName
from compress.speed.disturbance import Counters, Watch
from compress.speed.paired_samples import PairedSamples
from compress.speed.timing import Clock, pair
from compress.speed.timing_record import timing_warnings
from compress.stats.intervals import speed_verdict, speedup

BEFORE: SpanName = "before"
COMPUTE: SpanName = "compute"
AFTER: SpanName = "after"
NAMES = (BEFORE, COMPUTE, AFTER)
TICK_S = 1e-9
"""What a clock's step may hide: a span of no time at all has no ratio."""


class Stopwatch:
    """Charges the seconds of one arm's requests to their spans."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._last = clock, 0.0
        self._calls, self._spent = 0, dict.fromkeys(NAMES, 0.0)

    def begin(self) -> None:
        """A request starts."""
        self._calls += 1
        self._last = self._clock()

    def lap(self, name: SpanName) -> None:
        """What passed since the last lap, or since the start, belongs to this span."""
        now = self._clock()
        self._spent[name] += now - self._last
        self._last = now

    def take(self) -> dict[SpanName, float]:
        """Seconds per request of each span since the last time that they were taken; zeros where there was none."""
        taken = {name: spent / max(1, self._calls) for name, spent in self._spent.items()}
        self._calls, self._spent = 0, dict.fromkeys(NAMES, 0.0)
        return taken


Request = Callable[[Stopwatch], object]
"""Begins the stopwatch, does everything, and laps after each part."""


@dataclass(frozen=True, eq=False)
class SpanSamples:
    """Rounds of whole requests, and per arm and span the seconds per request (rounds,)."""

    samples: PairedSamples
    seconds: Mapping[str, Mapping[SpanName, NDArray[np.float64]]]

    def kept(self, arm: str, *names: SpanName) -> NDArray[np.float64]:
        """(kept rounds,) seconds of these spans together."""
        return np.asarray(sum(self.seconds[arm][name] for name in names))[self.samples.kept]


def time_requests(
    requests: Mapping[str, Request],
    *,
    seed: int,
    budget_s: float,
    clock: Clock = time.perf_counter,
    watch: Watch | None = None,
) -> SpanSamples:
    """Time the arms "baseline" and "variant" as `compress.speed.timing.pair` does, in whole requests."""
    watches = {name: Stopwatch(clock) for name in requests}
    rows: dict[str, list[dict[SpanName, float]]] = {name: [] for name in requests}
    in_round = False

    def at_boundary() -> Counters:
        # read before and after each round, so what was taken before one is warm-up and what is taken after one is its
        nonlocal in_round
        counters = watch() if watch else Counters(clock())
        for name, each in watches.items():
            taken = each.take()
            if in_round:
                rows[name].append(taken)
        in_round = not in_round
        return counters

    arms = {name: _arm(request, watches[name]) for name, request in requests.items()}
    samples = pair(arms, baseline="baseline", seed=seed, clock=clock, watch=at_boundary, budget_s=budget_s)
    by_span = {name: {span: np.array([row[span] for row in found]) for span in NAMES} for name, found in rows.items()}
    return SpanSamples(samples, by_span)


def end_to_end_record(found: SpanSamples, what: str, parts: Mapping[SpanName, str]) -> EndToEnd:
    """The report's record. what: one request in words; parts: what each span is."""
    samples = found.samples
    ratio, interval = speedup(samples.log_ratios("variant"))
    compute, compute_interval = speedup(_log_ratio(found.kept("baseline", COMPUTE), found.kept("variant", COMPUTE)))
    whole, around = found.kept("baseline", *NAMES), found.kept("baseline", BEFORE, AFTER)
    ceiling, ceiling_interval = speedup(_log_ratio(whole, around))
    _, control = speedup(samples.control_log_ratios())
    spans = (
        Span(
            name=name,
            what=parts[name],
            baseline_s=_median(found, "baseline", name),
            variant_s=_median(found, "variant", name),
        )
        for name in NAMES
    )
    # over the same requests as the spans, so that no span takes longer than the whole
    baseline_s, variant_s = (float(np.median(found.kept(arm, *NAMES))) for arm in ("baseline", "variant"))
    return EndToEnd(
        what=what,
        rounds=int(samples.kept.sum()),
        spans=tuple(spans),
        baseline_s=baseline_s,
        variant_s=variant_s,
        speedup=ratio,
        interval=interval,
        control=control,
        verdict=speed_verdict(interval, control),
        compute_speedup=compute,
        compute_interval=compute_interval,
        ceiling=ceiling,
        ceiling_interval=ceiling_interval,
        warnings=timing_warnings(samples, "variant"),
    )


def _arm(request: Request, watch: Stopwatch) -> Callable[[], object]:
    return lambda: request(watch)


def _log_ratio(over: NDArray[np.float64], under: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.log(np.maximum(over, TICK_S) / np.maximum(under, TICK_S)))


def _median(found: SpanSamples, arm: str, name: SpanName) -> float:
    return float(np.median(found.kept(arm, name)))
