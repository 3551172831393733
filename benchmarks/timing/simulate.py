"""Coverage of the speed-up's interval, and false claims of the verdict, on simulated arms. No timing, any machine.

    python benchmarks/timing/simulate.py [--runs 4000] [--sessions 400]

Arms, on the log scale: noise of 2 % with AR(1) correlation φ from round to round, a drift of 10 % over the session that
all arms share but meet at different places of a round, and in 2 % of an arm's rounds a spike of up to 40 %, uniform.
Bars, fixed before the interval was chosen: at 60 and 120 rounds coverage of 93 to 97 % for φ = 0 and 0.3, at least 90 %
for 0.6; false differences in at most 6 %. `sessions` runs the whole of `compress.timing.pair` on a clock that only the
arms move, so what stopping on width does to both is in its figures.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.stats import expected_half_width, half_width, speed_verdict, speedup
from compress.timing import LOOKS, PairedSamples, pair
from compress.timing_record import timing_record

RESULT = Path(__file__).parents[1] / "results" / "timing_simulation.json"
NOISE, DRIFT, SPIKE_SHARE, SPIKE = 0.02, 0.10, 0.02, 0.40
PHIS, SEEDS, ROUNDS, BARRED = (0.0, 0.3, 0.6), (0, 1, 2), (10, 20, 40, 60, 120, 240), (60, 120)
SLOWER = 1 / 1.05
COST_S, LONGEST_S = 0.03, 240 * 3 * 0.03
LEVELS = (0.02, 0.05, 0.1)

Array = NDArray[np.float64]


def correlated(random: np.random.Generator, runs: int, rounds: int, phi: float) -> Array:
    """(runs, rounds) of stationary AR(1) with standard deviation 1."""
    noise = random.standard_normal((runs, rounds)) * math.sqrt(1 - phi**2)
    noise[:, 0] /= math.sqrt(1 - phi**2)
    for place in range(1, rounds):
        noise[:, place] += phi * noise[:, place - 1]
    return noise


def log_ratios(seed: int, runs: int, rounds: int, phi: float, noise: float = NOISE) -> tuple[Array, Array]:
    """(runs, rounds) ln(baseline / variant) and ln(baseline / baseline again) of arms that are equally fast."""
    random = np.random.default_rng((seed, rounds, round(100 * phi)))
    places = random.permuted(np.broadcast_to(np.arange(3), (runs, rounds, 3)), axis=2)
    slots = []
    for slot in range(3):
        session = (3 * np.arange(rounds) + places[:, :, slot]) / (3 * rounds)
        spiked = random.random((runs, rounds)) < SPIKE_SHARE
        spikes = np.log1p(SPIKE * random.random((runs, rounds))) * spiked
        slots.append(noise * correlated(random, runs, rounds, phi) + spikes + np.log1p(DRIFT * session))
    baseline, variant, control = slots
    return baseline - variant, baseline - control


def cell(seed: int, runs: int, rounds: int, phi: float) -> dict[str, Any]:
    """Shares over `runs` simulated sessions of a fixed number of rounds."""
    series, controls = log_ratios(seed, runs, rounds, phi)
    covered, widths, claims, found = 0, [], 0, 0
    for one, again in zip(series, controls, strict=True):
        interval, control = speedup(one)[1], speedup(again)[1]
        slower = speedup(one + math.log(SLOWER))[1]
        covered += interval.low <= 1 <= interval.high
        widths.append(half_width(interval))
        claims += speed_verdict(interval, control) in ("faster", "slower")
        found += speed_verdict(slower, control) == "slower"
    return {
        "rounds": rounds,
        "phi": phi,
        "seed": seed,
        "runs": runs,
        "coverage": round(covered / runs, 4),
        "false_differences": round(claims / runs, 4),
        "finds_5_percent": round(found / runs, 4),
        "mean_half_width": round(float(np.mean(widths)), 5),
        "met": is_met(covered / runs, claims / runs, phi) if rounds in BARRED else None,
    }


def stopping(runs: int, noise: float, phi: float, guarded: bool) -> dict[str, Any]:
    """Coverage where timing stops at the first of LOOKS with an interval of at most ±2 %; guarded: as `pair` does, only
    where the expected width is as small. By the look that it stopped at, too."""
    covered: dict[int, list[bool]] = {look: [] for look in LOOKS}
    for one in log_ratios(0, runs, LOOKS[-1], phi, noise)[0]:
        for look in LOOKS:
            seen = one[:look]
            interval = speedup(seen)[1]
            if max(half_width(interval), expected_half_width(seen) if guarded else 0.0) <= 0.02:
                break
        covered[look].append(interval.low <= 1 <= interval.high)
    of_look = {
        look: {"stopped": len(each), "coverage": round(float(np.mean(each)), 4)}
        for look, each in covered.items()
        if each
    }
    overall = round(float(np.mean([hit for each in covered.values() for hit in each])), 4)
    return {"noise": noise, "phi": phi, "guarded": guarded, "runs": runs, "coverage": overall, "by_look": of_look}


def is_met(coverage: float, false_differences: float, phi: float) -> bool:
    """The bars."""
    covers = 0.93 <= coverage <= 0.97 if phi <= 0.3 else coverage >= 0.9
    return covers and false_differences <= 0.06


class World:
    """A machine on which only calls take time, `noise` and correlated by φ from one call of an arm to its next."""

    def __init__(self, seed: int, phi: float, noise: float) -> None:
        self.random, self.phi, self.noise, self.now = np.random.default_rng(seed), phi, noise, 0.0

    def clock(self) -> float:
        """Seconds since it began."""
        return self.now

    def arm(self, cost_s: float) -> Callable[[], None]:
        """Something that takes about so long."""
        state = self.noise * self.random.standard_normal()

        def call() -> None:
            nonlocal state
            state = self.phi * state + math.sqrt(1 - self.phi**2) * self.noise * self.random.standard_normal()
            spike = SPIKE * self.random.random() if self.random.random() < SPIKE_SHARE else 0.0
            self.now += cost_s * math.exp(state) * (1 + spike) * (1 + DRIFT * self.now / LONGEST_S)

        return call


def session(seed: int, phi: float, noise: float, ratio: float) -> PairedSamples:
    """One paired timing, whole, of a variant `ratio` times as fast."""
    world = World(seed, phi, noise)
    arms = {"baseline": world.arm(COST_S), "variant": world.arm(COST_S / ratio)}
    return pair(arms, baseline="baseline", seed=seed, clock=world.clock)


def sessions(count: int, phi: float, noise: float, ratio: float) -> dict[str, Any]:
    """Shares over whole sessions, with rounds until they stopped."""
    verdicts, covered, rounds = [], 0, []
    for seed in range(count):
        samples = session(seed, phi, noise, ratio)
        record = timing_record(samples, "baseline", "variant", phase="infer", batch=1, prompt=1, tokens_per_call=1)
        verdicts.append(record.verdict)
        covered += record.interval.low <= ratio <= record.interval.high
        rounds.append(record.rounds)
    words = ("faster", "slower", "same", "inconclusive")
    return {
        "phi": phi,
        "noise": noise,
        "ratio": round(ratio, 4),
        "sessions": count,
        "coverage": round(covered / count, 4),
        "verdicts": {word: round(verdicts.count(word) / count, 4) for word in words},
        "mean_rounds": round(float(np.mean(rounds)), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4000)
    parser.add_argument("--sessions", type=int, default=400)
    given = parser.parse_args()
    started = time.process_time()
    cells = []
    for rounds in ROUNDS:
        for phi in PHIS:
            for seed in SEEDS:
                cells.append(cell(seed, given.runs, rounds, phi))
                print(json.dumps(cells[-1]), flush=True)
    whole = []
    for noise in LEVELS:
        for phi in PHIS:
            for ratio in (1.0, SLOWER):
                whole.append(sessions(given.sessions, phi, noise, ratio))
                print(json.dumps(whole[-1]), flush=True)
    stops = []
    for noise in (0.02, 0.03, 0.04, 0.06):
        for phi in (0.0, 0.6):
            stops += [stopping(given.runs, noise, phi, guarded) for guarded in (False, True)]
            print("\n".join(json.dumps(each) for each in stops[-2:]), flush=True)
    arms = {"noise": NOISE, "drift": DRIFT, "spike_share": SPIKE_SHARE, "spike": SPIKE}
    met = all(one["met"] for one in cells if one["met"] is not None)
    seconds = round(time.process_time() - started)
    result = {"arms": arms, "met": met, "cpu_seconds": seconds, "cells": cells, "stopping": stops, "sessions": whole}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
