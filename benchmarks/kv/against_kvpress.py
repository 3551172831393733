"""Our caches against kvpress on the same model, examples and shares of the context: paired by example.

    python benchmarks/kv/evaluate.py MODEL --answers WORK
    python benchmarks/kv/against_kvpress.py MODEL --answers WORK --python ENV/bin/python

ENV: the CPU build of torch 2.13, then kvpress.txt. Bar: of methods that both have, none of ours is shown to be worse
(the interval of the paired difference does not lie below 0), and no cache of ours holds more bytes. Best rows are
compared too. Writes results/kv_against_kvpress.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress import hwprofiles
from compress.manifest import versions
from compress.stats.proportions import paired_change

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from digits import rounded  # noqa: E402  (the benchmarks folder is no package)

RESULT = HERE.parent / "results" / "kv_against_kvpress.json"
SHARED = {
    "streaming": "streaming_llm",
    "key_norm": "knorm",
    "tova": "tova",
    "h2o by age": "observed_attention",
    "random": "random",
}
"""Our name of a method, and kvpress's. Its observed attention divides by a token's age."""
BOUNDS = ("full", "oracle", "random", "random, one choice")
Answers = dict[str, NDArray[Any]]


def paired(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> dict[str, Any]:
    """Accuracies, the difference with its interval, and whether ours is shown to be worse."""
    change, interval = paired_change(int((ours & ~theirs).sum()), int((theirs & ~ours).sum()), len(ours))
    return {
        "ours": float(ours.mean()),
        "theirs": float(theirs.mean()),
        "difference": [change, interval.low, interval.high],
        "shown worse": bool(interval.high < 0),
    }


def shared_rows(ours: Answers, theirs: Answers, sizes: dict[str, float]) -> list[dict[str, Any]]:
    """A row per protocol, task, share and method that both have."""
    rows = []
    for key, right in ours.items():
        protocol, task, method, kept = key.split("/")
        rival = f"{protocol}/{task}/{SHARED.get(method)}/{kept}"
        if rival in theirs:
            row: dict[str, Any] = {"protocol": protocol, "task": task, "kept": float(kept), "method": method}
            row |= {"theirs is": SHARED[method]} | paired(right, theirs[rival])
            rows.append(row | {"bytes": sizes[key], "their bytes": float(theirs[f"bytes/{rival}"])})
    return rows


def best_rows(ours: Answers, theirs: Answers) -> list[dict[str, Any]]:
    """By protocol and share: every method's accuracy over all tasks, the best of ours against the best of theirs."""
    rows = []
    cells = sorted({(key.split("/")[0], key.split("/")[3]) for key in ours if not key.endswith("/1.0")})
    for protocol, kept in cells:
        tasks = sorted({key.split("/")[1] for key in ours if key.startswith(protocol)})
        means, joined = [], []
        for answers in (ours, theirs):
            names = {
                key.split("/")[2] for key in answers if key.startswith(f"{protocol}/") and key.endswith(f"/{kept}")
            }
            whole = {
                name: np.concatenate([answers[f"{protocol}/{task}/{name}/{kept}"] for task in tasks])
                for name in sorted(names - set(BOUNDS))
            }
            means.append({name: float(right.mean()) for name, right in whole.items()})
            best = max(whole, key=lambda name: means[-1][name])
            joined.append((best, whole[best]))
        row = {"protocol": protocol, "kept": float(kept), "our best": joined[0][0], "their best": joined[1][0]}
        rows.append(row | paired(joined[0][1], joined[1][1]) | {"all of ours": means[0], "all of theirs": means[1]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--answers", type=Path, required=True, help="what evaluate.py left there")
    parser.add_argument("--python", type=Path, required=True, help="that of the environment of kvpress")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    out = given.answers.absolute() / "kvpress.npz"
    if not out.is_file() or out.stat().st_mtime < (given.answers / "examples.npz").stat().st_mtime:
        command = [
            given.python,
            HERE / "kvpress_client.py",
            given.model.absolute(),
            given.answers / "examples.npz",
            out,
        ]
        subprocess.run([str(part) for part in command], check=True, env={**os.environ, "PYTHONPATH": ""})
    ours, theirs = dict(np.load(given.answers / "answers.npz")), dict(np.load(out))
    told: dict[str, Any] = {"machine": hwprofiles.machine_summary(), "versions": versions()}
    told["their versions"] = json.loads(str(theirs.pop("versions")))
    evaluated = json.loads((RESULT.parent / "kv_evaluate.json").read_text(encoding="utf8"))
    sizes = {
        f"{each['protocol']}/{each['task']}/{each['method']}/{each['kept']}": each["bytes"]
        for each in evaluated["rows"]
    }
    rows, best = shared_rows(ours, theirs, sizes), best_rows(ours, theirs)
    told["worse"] = [row for row in rows if row["shown worse"] and row["method"] not in BOUNDS]
    told["more bytes"] = [row for row in rows if row["bytes"] > row["their bytes"]]
    told |= {"best": best, "shared": rows}
    given.out.write_text(json.dumps(rounded(told), indent=1) + "\n", encoding="utf8")
    compared = sum(row["method"] not in BOUNDS for row in rows)
    print(f"{len(told['worse'])} of {compared} shown worse; {len(told['more bytes'])} hold more bytes")
    for row in best:
        print(json.dumps(rounded({key: value for key, value in row.items() if "all of" not in key})))


if __name__ == "__main__":
    main()
