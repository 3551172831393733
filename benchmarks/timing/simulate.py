"""Coverage of the speed-up's interval, and false claims of the verdict, on simulated arms. No timing, any machine.

    python benchmarks/timing/simulate.py [--runs 4000] [--sessions 400]

Arms, on the log scale: noise of 2 % with AR(1) correlation φ from round to round, a drift of 10 % over the session that
all arms share but meet at different places of a round, and in 2 % of an arm's rounds a spike of up to 40 %, uniform.
Arms with loads besides: each is loaded anew after some rounds, and every load of it is faster or slower for good by an
offset of its own, with a standard deviation of 2 %.
Bars, fixed before the interval was chosen: at 60 and 120 rounds coverage of 93 to 97 % for φ = 0 and 0.3, at least 90 %
for 0.6; false differences in at most 6 %. `sessions` runs the whole of `compress.speed.timing.pair` on a clock that
only the arms move, so what stopping on width does to both is in its figures.
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

from compress.speed.paired_samples import PairedSamples
from compress.speed.reloads import Reload
from compress.speed.timing import LOOKS, pair
from compress.speed.timing_record import timing_record
from compress.stats.intervals import expected_half_width, half_width, speed_verdict, speedup

RESULT = Path(__file__).parents[1] / "results" / "timing_simulation.json"
NOISE, DRIFT, SPIKE_SHARE, SPIKE = 0.02, 0.10, 0.02, 0.40
LOAD, LOAD_S, ROUNDS_PER_LOAD = 0.02, 0.15, (4, 8, 15)
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


def log_ratios(
    seed: int, runs: int, rounds: int, phi: float, noise: float = NOISE, per_load: int = 0
) -> tuple[Array, Array]:
    """(runs, rounds) ln(baseline / variant) and ln(baseline / baseline again) of arms that are equally fast; per_load:
    rounds after which both arms are loaded anew, each with an offset of its own (0: loads do not differ)."""
    random = np.random.default_rng((seed, rounds, round(100 * phi)))
    places = random.permuted(np.broadcast_to(np.arange(3), (runs, rounds, 3)), axis=2)
    slots = []
    for slot in range(3):
        session = (3 * np.arange(rounds) + places[:, :, slot]) / (3 * rounds)
        spiked = random.random((runs, rounds)) < SPIKE_SHARE
        spikes = np.log1p(SPIKE * random.random((runs, rounds))) * spiked
        slots.append(noise * correlated(random, runs, rounds, phi) + spikes + np.log1p(DRIFT * session))
    baseline, variant, control = slots
    if per_load:
        loads = load_numbers(rounds, per_load)
        baseline_load, variant_load = LOAD * random.standard_normal((2, runs, loads[-1] + 1))
        baseline, control = baseline + baseline_load[:, loads], control + baseline_load[:, loads]
        variant = variant + variant_load[:, loads]
    return baseline - variant, baseline - control


def load_numbers(rounds: int, per_load: int) -> NDArray[np.int64]:
    """(rounds,) which load each is made with."""
    return np.arange(rounds) // per_load


def cell(seed: int, runs: int, rounds: int, phi: float, per_load: int = 0, counted: bool = True) -> dict[str, Any]:
    """Shares over `runs` simulated sessions of a fixed number of rounds. per_load: see `log_ratios`; counted: whether
    the interval is told of the loads."""
    series, controls = log_ratios(seed, runs, rounds, phi, per_load=per_load)
    loads = load_numbers(rounds, per_load) if per_load and counted else None
    covered, widths, claims, found = 0, [], 0, 0
    for one, again in zip(series, controls, strict=True):
        interval, control = speedup(one, loads=loads)[1], speedup(again)[1]
        slower = speedup(one + math.log(SLOWER), loads=loads)[1]
        covered += interval.low <= 1 <= interval.high
        widths.append(half_width(interval))
        claims += speed_verdict(interval, control) in ("faster", "slower")
        found += speed_verdict(slower, control) == "slower"
    return {
        "rounds": rounds,
        "phi": phi,
        "seed": seed,
        "runs": runs,
        **({"per_load": per_load, "counted": counted} if per_load else {}),
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

    def __init__(self, seed: int, phi: float, noise: float, offset: float = 0.0) -> None:
        self.random, self.phi, self.noise, self.now = np.random.default_rng(seed), phi, noise, 0.0
        self.offset, self.offsets = offset, list[float]()

    def clock(self) -> float:
        """Seconds since it began."""
        return self.now

    def load(self) -> None:
        """Every arm anew, faster or slower for good by an offset of its own."""
        self.now += LOAD_S
        self.offsets = [self.offset * self.random.standard_normal() for _ in self.offsets]

    def arm(self, cost_s: float) -> Callable[[], None]:
        """Something that takes about so long."""
        state, place = self.noise * self.random.standard_normal(), len(self.offsets)
        self.offsets.append(self.offset * self.random.standard_normal() if self.offset else 0.0)

        def call() -> None:
            nonlocal state
            state = self.phi * state + math.sqrt(1 - self.phi**2) * self.noise * self.random.standard_normal()
            spike = SPIKE * self.random.random() if self.random.random() < SPIKE_SHARE else 0.0
            self.now += (
                cost_s * math.exp(state + self.offsets[place]) * (1 + spike) * (1 + DRIFT * self.now / LONGEST_S)
            )

        return call


def session(seed: int, phi: float, noise: float, ratio: float, offset: float = 0.0) -> PairedSamples:
    """One paired timing, whole, of a variant `ratio` times as fast; offset: of loads, where arms are loaded anew."""
    world = World(seed, phi, noise, offset)
    reload = Reload(world.load, LOAD_S) if offset else None
    arms = {"baseline": world.arm(COST_S), "variant": world.arm(COST_S / ratio)}
    return pair(arms, baseline="baseline", seed=seed, clock=world.clock, reload=reload)


def sessions(count: int, phi: float, noise: float, ratio: float, offset: float = 0.0) -> dict[str, Any]:
    """Shares over whole sessions, with rounds until they stopped."""
    verdicts, covered, rounds, loads = [], 0, [], []
    for seed in range(count):
        samples = session(seed, phi, noise, ratio, offset)
        record = timing_record(samples, "baseline", "variant", phase="infer", batch=1, prompt=1, tokens_per_call=1)
        verdicts.append(record.verdict)
        covered += record.interval.low <= ratio <= record.interval.high
        rounds.append(record.rounds)
        loads.append(record.loads)
    words = ("faster", "slower", "same", "inconclusive")
    return {
        "phi": phi,
        "noise": noise,
        **({"load_offset": offset, "mean_loads": round(float(np.mean(loads)), 1)} if offset else {}),
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
    loads = [
        cell(seed, given.runs, rounds, phi, per_load)
        for per_load in ROUNDS_PER_LOAD
        for rounds in BARRED
        for phi in PHIS
        for seed in SEEDS
    ]
    uncounted = [cell(0, given.runs, rounds, 0.0, rounds, counted=False) for rounds in BARRED]
    print("\n".join(json.dumps(each) for each in loads + uncounted), flush=True)
    whole = []
    for noise in LEVELS:
        for phi in PHIS:
            for ratio in (1.0, SLOWER):
                whole += [sessions(given.sessions, phi, noise, ratio, offset) for offset in (0.0, LOAD)]
                print("\n".join(json.dumps(each) for each in whole[-2:]), flush=True)
    stops = []
    for noise in (0.02, 0.03, 0.04, 0.06):
        for phi in (0.0, 0.6):
            stops += [stopping(given.runs, noise, phi, guarded) for guarded in (False, True)]
            print("\n".join(json.dumps(each) for each in stops[-2:]), flush=True)
    arms = {"noise": NOISE, "drift": DRIFT, "spike_share": SPIKE_SHARE, "spike": SPIKE, "load": LOAD}
    met = all(one["met"] for one in cells + loads if one["met"] is not None)
    seconds = round(time.process_time() - started)
    result = {"arms": arms, "met": met, "cpu_seconds": seconds, "cells": cells, "loads": loads}
    result |= {"one_load_uncounted": uncounted, "stopping": stops, "sessions": whole}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
