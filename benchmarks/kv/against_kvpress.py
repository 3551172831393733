"""Our caches against kvpress on the same model, examples and shares of the context: paired by example.

    python benchmarks/kv/evaluate.py MODEL --answers WORK
    python benchmarks/kv/against_kvpress.py MODEL --answers WORK --python ENV/bin/python

ENV: the CPU build of torch 2.13, then kvpress.txt. Bar: of methods that both have, none of ours is shown to be worse
(the interval of the paired difference does not lie below 0). The best rows over all tasks are compared too, and the
bytes of all tensors held: ours with what goes on dropping while it decodes, theirs with the masks of methods that drop
nothing. Writes results/kv_against_kvpress.json.
"""

from __future__ import annotations

import argparse
import hashlib
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
    "streaming": ("streaming_llm",),
    "key_norm": ("knorm",),
    "tova": ("tova",),
    "h2o by age": ("observed_attention",),
    "snapkv": ("snapkv", "snapkv, window=16"),
    "expected": ("expected_attention",),
    "key_diff": ("keydiff",),
    "random": ("random",),
    "key_norm, score alone": ("knorm",),
    "tova, score alone": ("tova",),
    "h2o by age, score alone": ("observed_attention",),
    "expected, score alone": ("expected_attention",),
    "key_diff, score alone": ("keydiff",),
    "snapkv, heads share": ("adakv(snapkv, window=16)",),
    "expected, heads share": ("adakv(expected_attention)",),
}
"""Our name of a method, and kvpress's. Its observed attention divides by a token's age. A quarter of our budget is for
the newest tokens but where it is `score alone`, which is how kvpress has it."""
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


def shared_rows(ours: Answers, theirs: Answers) -> list[dict[str, Any]]:
    """A row per protocol, task, share and method that both have."""
    rows = []
    for key, right in _right(ours).items():
        protocol, task, method, kept = key.split("/")
        for name in SHARED.get(method, ()):
            rival = f"{protocol}/{task}/{name}/{kept}"
            row: dict[str, Any] = {"protocol": protocol, "task": task, "kept": float(kept), "method": method}
            row |= {"theirs is": name} | paired(right, theirs[rival])
            rows.append(row | {"bytes": float(ours[f"bytes/{key}"]), "their bytes": float(theirs[f"bytes/{rival}"])})
    return rows


def best_rows(ours: Answers, theirs: Answers) -> list[dict[str, Any]]:
    """By protocol and share: every method's accuracy over all tasks, the best of ours against the best of theirs."""
    rows = []
    for protocol, kept in sorted({(key.split("/")[0], key.split("/")[3]) for key in _right(theirs)}):
        tables, best = [], []
        for answers in (ours, theirs):
            joined = over_tasks(_right(answers), protocol, kept)
            held = over_tasks(
                {key[6:]: size for key, size in answers.items() if key not in _right(answers)}, protocol, kept
            )
            table = {
                name: {"accuracy": float(right.mean()), "bytes": float(held[name].mean())}
                for name, right in joined.items()
            }
            tables.append(table)
            best.append(max((name for name in joined if name not in BOUNDS), key=lambda name: table[name]["accuracy"]))
            best.append(joined[best[-1]])
        row = {"protocol": protocol, "kept": float(kept), "our best": best[0], "their best": best[2]}
        rows.append(row | paired(best[1], best[3]) | {"all of ours": tables[0], "all of theirs": tables[1]})
    return rows


def over_tasks(answers: Answers, protocol: str, kept: str) -> Answers:
    """By method: what there is of every task, in the order of their names."""
    found: dict[str, list[NDArray[Any]]] = {}
    for key in sorted(answers):
        of_protocol, _, method, of_kept = key.split("/")
        if (of_protocol, of_kept) == (protocol, kept):
            found.setdefault(method, []).append(np.atleast_1d(answers[key]))
    return {method: np.concatenate(parts) for method, parts in found.items()}


def _right(answers: Answers) -> Answers:
    """Without the sizes."""
    return {key: right for key, right in answers.items() if not key.startswith("bytes/")}


def is_of(out: Path, *read: Path) -> bool:
    """Whether the client has answered just these examples by this model."""
    if not out.is_file():
        return False
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in read]
    return bool(json.loads(str(np.load(out)["told"]))["of"] == digests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--answers", type=Path, required=True, help="what evaluate.py left there")
    parser.add_argument("--python", type=Path, required=True, help="that of the environment of kvpress")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    examples, out = given.answers.absolute() / "examples.npz", given.answers.absolute() / "kvpress.npz"
    if not is_of(out, given.model / "model.safetensors", examples):
        command = [given.python, HERE / "kvpress_client.py", given.model.absolute(), examples, out, given.processes]
        subprocess.run([str(part) for part in command], check=True, env={**os.environ, "PYTHONPATH": ""})
    ours, theirs = dict(np.load(given.answers / "answers.npz")), dict(np.load(out))
    told: dict[str, Any] = {"machine": hwprofiles.machine_summary(), "versions": versions()}
    told["their versions"] = json.loads(str(theirs.pop("told")))["versions"]
    rows, best = shared_rows(ours, theirs), best_rows(ours, theirs)
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
