"""From how many tokens on a cache of fixed size decodes faster than one that grows: read off benchmarks/kv_slots.py.

    python benchmarks/kv/break_even.py

A step's time grows with the tokens in a growing cache by a constant each, and does not with slots, so between two
measured contexts their ratio is a line. The interval is where the ends of the measured intervals cross 1: wider than
95 %, since both contexts are taken at their worse ends. Writes results/kv_break_even.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "results"
sys.path.insert(0, str(RESULTS.parent))

from digits import rounded  # noqa: E402  (the benchmarks folder is no package)

TIMES = "times growing, one buffer"


def crossing(contexts: Sequence[int], ratios: Sequence[float]) -> float | None:
    """The context from which ratios stay above 1, by lines between those measured; None where the last is below."""
    if ratios[-1] <= 1:
        return None
    below = [place for place, ratio in enumerate(ratios) if ratio <= 1]
    if not below:
        return float(contexts[0])
    last = below[-1]
    share = (1 - ratios[last]) / (ratios[last + 1] - ratios[last])
    return contexts[last] + share * (contexts[last + 1] - contexts[last])


def main() -> None:
    measured = json.loads((RESULTS / "kv_slots.json").read_text(encoding="utf8"))["timing"]
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in measured["rows"]:
        arms.setdefault(row["arm"], []).append(row)
    rows = []
    for arm, found in arms.items():
        if not arm.startswith("growing"):
            contexts = [row["context"] for row in found]
            value, late, early = (crossing(contexts, [row[TIMES][end] for row in found]) for end in range(3))
            rows.append({"cache": arm, "faster from tokens": value, "interval": [early, late]})
            print(json.dumps(rounded(rows[-1])))
    told = {"machine": measured["machine"], "versions": measured["versions"], "rows": rows}
    (RESULTS / "kv_break_even.json").write_text(json.dumps(rounded(told), indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
