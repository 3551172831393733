"""The speed measurement judged by what is known: the embedded model against itself, and against itself made 5 % slower.

    python benchmarks/timing/self_check.py [--runs 10] [--budget 20] [--decode-only]

Run it on a machine that does nothing else; about fourteen minutes with the defaults, whose budget is that of
`compress run`. Each run is the whole measurement, with sessions loaded anew several times, at two settings. Bars: of
ten runs against itself at least nine claim no difference at any setting; of ten runs with a slow-down of 5 % at least
eight have it inside the interval at every setting, and it is found in as many.
The slow-down is 5 % of what each call took, added to the clock. Really waiting costs more than what is waited: the
runtime's threads fall asleep meanwhile, and a first version measured 6.1 % at prefill and 8 % at decode.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import compress
from compress import hwprofiles, manifest, quickstart
from compress.export.onnx import target
from compress.hwprofiles import Profile
from compress.models.model import Model
from compress.progress import Progress
from compress.records import Timing
from compress.speed.loads import Loads
from compress.speed.measure import BUDGET_S, measure, settings_of, thread_count, time_sessions
from compress.target import Session

RESULT = Path(__file__).parents[1] / "results" / "timing_self_check.json"
SLOW_DOWN = 0.05
CLAIMS = ("faster", "slower")


class Clock:
    """The real one, put forward by what was injected so far."""

    def __init__(self) -> None:
        self.injected_s = 0.0

    def __call__(self) -> float:
        return time.perf_counter() + self.injected_s


class Slowed:
    """A session whose timed calls take SLOW_DOWN longer, by this clock."""

    def __init__(self, inner: Session, clock: Clock) -> None:
        self.inner, self.name, self.is_decoder, self.clock = inner, inner.name, inner.is_decoder, clock

    def call(self, ids: NDArray[Any], past: int) -> Callable[[], None]:
        """The inner session's call, which puts the clock forward."""
        inner, clock = self.inner.call(ids, past), self.clock

        def slowed() -> None:
            begin = time.perf_counter()
            inner()
            clock.injected_s += SLOW_DOWN * (time.perf_counter() - begin)

        return slowed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def against_itself(folder: Path, model: Model, profile: Profile, seed: int, budget_s: float) -> tuple[Timing, ...]:
    """`measure` of a folder against the same folder."""
    return measure(
        folder,
        folder,
        profile,
        vocabulary=model.vocabulary,
        longest=model.longest,
        seed=seed,
        budget_s=budget_s,
        progress=Progress(quiet=True),
    ).timings


def slowed(folder: Path, model: Model, profile: Profile, seed: int, budget_s: float) -> tuple[Timing, ...]:
    """The same with a variant that is slower by what is known."""
    threads, clock = thread_count(profile), Clock()
    arms: dict[str, Callable[[], Any]] = {
        "baseline": lambda: target.session(folder, threads),
        "variant": lambda: Slowed(target.session(folder, threads), clock),
    }
    loads = Loads(arms, seed)
    settings = settings_of(profile, loads.sessions["baseline"].is_decoder, model.longest)
    return time_sessions(
        loads, settings, model.vocabulary, seed=seed, budget_s=budget_s, progress=Progress(quiet=True), clock=clock
    )


def row(kind: str, run: int, timing: Timing) -> dict[str, Any]:
    """One setting of one run."""
    truth = 1.0 if kind == "itself" else 1 / (1 + SLOW_DOWN)
    every = timing.every_round
    return {
        "kind": kind,
        "run": run,
        "setting": timing.name,
        "speedup": round(timing.speedup, 4),
        "interval": [round(timing.interval.low, 4), round(timing.interval.high, 4)],
        "control": [round(timing.control.low, 4), round(timing.control.high, 4)],
        "verdict": timing.verdict,
        "covers": timing.interval.low <= truth <= timing.interval.high,
        "rounds": timing.rounds,
        "loads": timing.loads,
        "load_spread": timing.load_spread and round(timing.load_spread, 4),
        "disturbed": every and every.disturbed,
        "left_out": every and every.left_out,
        "warnings": list(timing.warnings),
    }


def summary(rows: list[dict[str, Any]], runs: int) -> dict[str, Any]:
    """Runs without a claim; by setting, runs whose interval covers the slow-down; runs that find it everywhere."""
    of = {kind: [[r for r in rows if r["kind"] == kind and r["run"] == run] for run in range(runs)] for kind in KINDS}
    quiet = sum(all(r["verdict"] not in CLAIMS for r in one) for one in of["itself"])
    covered = Counter[str](r["setting"] for r in rows if r["kind"] == "slowed" and r["covers"])
    covering = min(covered[r["setting"]] for r in rows)
    found = sum(all(r["verdict"] == "slower" for r in one) for one in of["slowed"])
    met = quiet >= math.ceil(0.9 * runs) and min(covering, found) >= math.ceil(0.8 * runs)
    return {
        "runs": runs,
        "no_difference_claimed": quiet,
        "covered": dict(covered),
        "slow_down_found_at_all_settings": found,
        "met": met,
    }


KINDS = {"itself": against_itself, "slowed": slowed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds per setting")
    parser.add_argument("--decode-only", action="store_true", help="leave the setting of prefill out")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    found = hwprofiles.detect()
    prefill = () if given.decode_only else ((1, 128),)
    grid = found.grid.model_copy(update={"decode": ((1, 128),), "prefill": prefill})
    profile = found.model_copy(update={"grid": grid})
    model, rows = compress.load(str(quickstart.folder())), []
    with tempfile.TemporaryDirectory() as scratch:
        target.write(model, profile, Path(scratch), target.capture(model, profile))
        for run in range(given.runs):
            for kind, timed in KINDS.items():
                timings = timed(Path(scratch), model, profile, run, given.budget)
                rows += [row(kind, run, timing) for timing in timings]
                print("\n".join(json.dumps(each) for each in rows[-len(timings) :]), flush=True)
    facts: dict[str, Any] = {
        "machine": hwprofiles.machine_summary(),
        "threads": thread_count(profile),
        "budget_s": given.budget,
        "versions": manifest.versions(),
    }
    result = {**facts, "numpy": np.__version__, "summary": summary(rows, given.runs), "rows": rows}
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary"]))
    return 0 if summary(rows, given.runs)["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
