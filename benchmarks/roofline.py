"""Predicted against measured latency of a finished run, on this machine.

    compress hardware calibrate -o my.yaml
    python benchmarks/roofline.py OUT --profile my.yaml --name NAME

OUT is the folder of `compress run`, made on this machine. The prediction is a roofline: a bound from below where the
model is read from memory. A ratio above 1 is what overheads and kernels cost on top; below 1, a cache holds the
weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import compress
from compress import hwprofiles
from compress.plan import make_plan
from compress.profiles import as_profile
from compress.recipe import of_passes
from compress.records import Report

RESULT = Path(__file__).parent / "results" / "roofline.json"


def compare(out: Path, profile: str | None) -> list[dict[str, Any]]:
    """A row per setting that was timed and predicted: seconds of both, and measured over predicted."""
    report = Report.model_validate_json((out / "report.json").read_text())
    if report.speed is None or report.plan is None:
        raise SystemExit(f"{out}: this run measured no speed, so there is nothing to compare.")
    machine = as_profile(profile)
    plan = make_plan(compress.load(report.source, weights=False), of_passes(report.plan.recipe), machine)
    predicted = {(one.phase, one.batch, one.prompt): one for one in plan.predicted_latency}
    rows = []
    for timing in report.speed.timings:
        one = predicted.get((timing.phase, timing.batch, timing.prompt))
        if one is None:
            continue
        for arm in ("baseline", "variant"):
            found, wanted = getattr(timing, f"{arm}_s"), getattr(one, f"{arm}_s")
            row = {"setting": timing.name, "arm": arm, "measured_s": found, "predicted_s": wanted}
            rows.append({**row, "measured_over_predicted": found / wanted})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--profile")
    parser.add_argument("--name", required=True, help="what the run is called in the results")
    given = parser.parse_args()
    rows = compare(given.out, given.profile)
    known = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    known[given.name] = {"machine": hwprofiles.machine_summary(), "rows": rows}
    RESULT.write_text(json.dumps(known, indent=1) + "\n")
    for row in rows:
        print(f"{row['setting']:<30} {row['arm']:<9} {row['measured_s'] * 1e3:8.2f} ms measured, "
              f"{row['predicted_s'] * 1e3:8.2f} ms predicted: {row['measured_over_predicted']:.2f}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
