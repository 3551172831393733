"""Predicted against measured latency of finished runs, on this machine: per setting and per kind of layer.

    compress hardware calibrate -o my.yaml
    python benchmarks/roofline.py --profile my.yaml NAME=OUT NAME=OUT ...

OUT is the folder of `compress run`, made on this machine; NAME is what docs/speed.md calls it. Prints the tables that
stand there. A kind's measured time is the runtime profiler's, whose counting costs time too, so it is no part of the
timed call. The line runs through the measured times of the fewest and of the most tokens: that times lie on it is what
predictions from a kernel's figures assume.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import compress
from compress import hwprofiles
from compress.export import find
from compress.hwprofiles import Profile
from compress.pipeline import Pipeline, planned
from compress.plan import latency_arms
from compress.profiles import as_profile
from compress.recipe import of_passes
from compress.records import Report
from compress.speed.roofline import Arm, Setting
from compress.target import Choice, Refusal, plan_layers

RESULT = Path(__file__).parent / "results" / "roofline.json"
OTHERS = "all others"
Rows = list[dict[str, Any]]


def compare(out: Path, profile: Profile) -> tuple[Rows, Rows]:
    """Rows per setting that was timed and per kind of layer where the profiler counted: seconds of both arms, measured
    and predicted."""
    report = Report.model_validate_json((out / "report.json").read_text())
    if report.speed is None or report.plan is None or report.speed.operators is None:
        raise SystemExit(f"{out}: this run measured no speed by operator, so there is nothing to compare.")
    model, recipe = compress.load(report.source, weights=False), of_passes(report.plan.recipe)
    specs = planned(Pipeline.parse(recipe.for_target(profile.target).passes).resolve(model))
    choices = plan_layers(find(profile.target), specs, profile)
    taken = {name: choice for name, choice in choices.items() if not isinstance(choice, Refusal)}
    variant, baseline = latency_arms(model, specs, taken, profile)
    rows, kinds = [], []
    for timing in report.speed.timings:
        setting = Setting(timing.phase, timing.batch, timing.prompt)
        for name, arm in (("baseline", baseline), ("variant", variant)):
            about = {"setting": timing.name, "arm": name}
            spent = arm.whole(setting)
            rows.append({**about, **_times(getattr(timing, f"{name}_s"), spent.seconds), "bound": spent.bound})
            if timing.name == report.speed.operators.setting:
                lowered = taken if name == "variant" else {}
                found = _kinds(arm, setting, lowered)
                kinds += [{**about, **row} for row in _counted(report, name, found)]
            rows[-1]["tokens"] = setting.tokens
    for row in rows:
        row["line_s"] = _line([each for each in rows if each["arm"] == row["arm"]], row["tokens"])
    return rows, kinds


def _line(rows: Rows, tokens: int) -> float:
    """Seconds of so many tokens at once, between the fewest and the most that were timed."""
    few, many = (pick(rows, key=lambda row: row["tokens"]) for pick in (min, max))
    slope = (many["measured_s"] - few["measured_s"]) / (many["tokens"] - few["tokens"])
    return float(few["measured_s"] + slope * (tokens - few["tokens"]))


def _kinds(arm: Arm, setting: Setting, lowered: dict[str, Choice]) -> dict[str, float]:
    """Predicted seconds of each kind of operator that multiplies. lowered: empty where all layers are in float."""
    found: dict[str, float] = {}
    for name, spent in arm.layers(setting).items():
        if arm.parts[name].multiply_adds:
            kind = lowered[name].operator.rpartition("+")[2] if lowered else "MatMul"
            found[kind] = found.get(kind, 0.0) + spent.seconds
    return {**found, "Attention": arm.attention(setting).seconds, OTHERS: arm.others().seconds}


def _counted(report: Report, arm: str, predicted: dict[str, float]) -> Iterable[dict[str, Any]]:
    """What the profiler told of the same kinds, all others together."""
    assert report.speed is not None and report.speed.operators is not None
    measured = dict.fromkeys(predicted, (0, 0.0))
    for one in report.speed.operators.operators:
        known = "Attention" if "Attention" in one.kind else one.kind
        kind = known if known in predicted else OTHERS
        nodes, seconds = measured[kind]
        measured[kind] = nodes + getattr(one, f"{arm}_nodes"), seconds + getattr(one, f"{arm}_s")
    for kind, (nodes, seconds) in measured.items():
        yield {"kind": kind, "nodes": nodes, **_times(seconds, predicted[kind])}


def _times(measured: float, predicted: float) -> dict[str, float | None]:
    """Without a ratio where nothing is predicted: of small operators, by a profile without `node_us`."""
    ratio = measured / predicted if predicted else None
    return {"measured_s": measured, "predicted_s": predicted, "measured_over_predicted": ratio}


def _table(found: dict[str, Any], key: str, title: str, column: str) -> None:
    line = "line, ms | " if key == "rows" else ""
    print(f"\n| run | {title} | measured, ms | {line}predicted, ms | measured / predicted |")
    print("|---|---|--:|--:|--:|" + "--:|" * bool(line))
    for name, run in found.items():
        for row in run[key]:
            times = (f"{row[each] * 1e3:.3g}" for each in ("measured_s", "line_s", "predicted_s") if each in row)
            nodes = f", {row['nodes']} nodes" if "nodes" in row else ""
            ratio = row["measured_over_predicted"]
            cells = name, f"{row['arm']}, {row[column]}{nodes}", *times, "-" if ratio is None else f"{ratio:.2f}"
            print("| " + " | ".join(cells) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=OUT")
    parser.add_argument("--profile")
    given = parser.parse_args()
    profile, found = as_profile(given.profile), {}
    for text in given.runs:
        name, _, out = text.partition("=")
        rows, kinds = compare(Path(out), profile)
        found[name] = {"rows": rows, "kinds": kinds}
    told = {"machine": hwprofiles.machine_summary(), "profile": profile.model_dump(mode="json"), "runs": found}
    RESULT.write_text(json.dumps(told, indent=1) + "\n")
    _table(found, "rows", "setting", "setting")
    _table(found, "kinds", "kind of operator", "kind")
    return 0


if __name__ == "__main__":
    sys.exit(main())
