"""Accuracy of a small model whose cache keeps a share of the context, beside what is best and what chance.

    python benchmarks/kv/train.py --out MODEL
    python benchmarks/kv/evaluate.py MODEL [--examples 128] [--length 160] [--answers FOLDER] [--processes 1]

Every method answers the same examples. `full` keeps all, `oracle` the needed tokens first, `random` any (per head, or
one choice for all heads and layers). Checks say whether the tasks tell methods apart at all. Writes
results/kv_evaluate.json; `--answers` keeps which answers were right, for paired comparisons.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods import ALONE, SINKS, evicting, recent, storing
from numpy.typing import NDArray
from protocol import MakeCache, Protocol, chance, examine, oracle, plain
from tasks import CHANCE, LAST, TASKS, Batch, batch
from torch import nn
from transformers import AutoModelForCausalLM

from compress import hwprofiles
from compress.kv.spec import KvSpec
from compress.manifest import versions
from compress.stats.proportions import paired_change, proportion

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from digits import rounded  # noqa: E402  (the benchmarks folder is no package)

RESULT = HERE.parent / "results" / "kv_evaluate.json"
KEPT = (0.5, 0.25, 0.1)
SEED = 2_000_000
"""Of the examples: training's checks use numbers of steps."""
DEPTHS = 3
PROTOCOLS: tuple[Protocol, ...] = ("blind", "aware")
SEVERAL = ("passkey", "induction")
"""Tasks with answers of several tokens, which alone tell something once the question was read with the context."""
RECALLED = ("passkey", "needles", "recall", "induction")
CONTROL = "recency"
BOUNDS = ("full", "oracle", "random", "random, one choice")
PARTS = ("context", "question", "answer")
CELL = ("protocol", "task", "method", "kept")
SOLVED, SPREAD = 0.95, 0.05

Right = NDArray[np.bool_]


def budget(length: int, kept: float) -> int:
    """Tokens that are kept, as kvpress counts them: it is told what goes, and rounds down what that leaves."""
    return int(length * (1 - (1 - kept)))


def caches(model: nn.Module, asked: Batch, tokens: int) -> dict[str, MakeCache]:
    """Every method and bound with a budget."""
    config: Any = model.config
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    bound = [KvSpec(scorer="position", budget=tokens, sinks=SINKS, recent=recent(tokens))] * layers
    free = [KvSpec(scorer="position", budget=tokens, sinks=1, recent=1)] * layers
    made = {name: plain(model, specs) for name, specs in evicting(layers, tokens).items()}
    made["oracle"] = oracle(model, free, asked, heads)
    made["random"] = chance(model, bound, asked, heads, False, SEED)
    made["random, one choice"] = chance(model, bound, asked, heads, True, SEED)
    return made


def row(right: Right, asked: Batch, full: Right | None = None) -> dict[str, Any]:
    """Accuracy with its interval, by depth, and the change against the full cache."""
    value, interval = proportion(int(right.sum()), len(right))
    found: dict[str, Any] = {"accuracy": [value, interval.low, interval.high]}
    places = np.minimum((asked.depth * DEPTHS).astype(int), DEPTHS - 1)
    found["by_depth"] = [
        float(right[places == place].mean()) if (places == place).any() else None for place in range(DEPTHS)
    ]
    if full is not None:
        change, interval = paired_change(int((right & ~full).sum()), int((full & ~right).sum()), len(right))
        found["change"] = [change, interval.low, interval.high]
    return found


def evaluate(
    folder: Path, name: str, asked: Batch, protocol: Protocol
) -> tuple[list[dict[str, Any]], dict[str, Right]]:
    """Of one task: a row per method and share, and by cell which answers were right."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config: Any = model.config
    length = asked.context.shape[1] + (asked.question.shape[1] if protocol == "aware" else 0)
    whole = examine(model, asked, plain(model, [KvSpec()] * config.num_hidden_layers), protocol)
    told = {"protocol": protocol, "task": name}
    rows = [told | {"method": "full", "kept": 1.0, "bytes": whole.nbytes} | row(whole.right, asked)]
    answers = {f"{protocol}/{name}/full/1.0": whole.right}
    todo = [(1.0, None, plain(model, specs), method) for method, specs in storing(config.num_hidden_layers).items()]
    for kept in KEPT:
        tokens = budget(length, kept)
        todo += [(kept, tokens, make, method) for method, make in caches(model, asked, tokens).items()]
    for kept, tokens, make, method in todo:
        found = examine(model, asked, make, protocol)
        answers[f"{protocol}/{name}/{method}/{kept}"] = found.right
        facts = {"method": method, "kept": kept, "tokens": tokens, "bytes": found.nbytes}
        rows.append(told | facts | row(found.right, asked, whole.right))
        print(json.dumps(rounded(rows[-1])), flush=True)
    return rows, answers


def checks(
    rows: list[dict[str, Any]], asked: Mapping[str, Batch], answers: Mapping[str, Right]
) -> list[dict[str, Any]]:
    """Whether tasks tell methods apart: what each asks for, what was found, and whether it holds."""
    found: list[dict[str, Any]] = []

    def check(what: str, task: str, value: float, holds: bool, **more: Any) -> None:
        found.append({"check": what, "task": task, **more, "found": float(value), "holds": bool(holds)})

    for task in TASKS:
        full = answers[f"blind/{task}/full/1.0"]
        check(f"the full cache answers {SOLVED:.0%}", task, full.mean(), full.mean() >= SOLVED)
        # the control asks for the last tokens: of every cache whose window has as many
        length = asked[task].context.shape[1]
        shares = [kept for kept in KEPT if task != CONTROL or recent(budget(length, kept)) >= LAST]
        spread = [_spread(rows, task, kept) for kept in shares]
        if task == CONTROL:
            check("every cache with a window answers the control", task, max(spread), max(spread) <= SPREAD)
        else:
            check("methods differ (else the task is broken)", task, max(spread), max(spread) > SPREAD)
        for kept in KEPT:
            best = answers[f"blind/{task}/oracle/{kept}"].mean()
            check(
                f"the oracle keeps {SOLVED:.0%} of the full cache", task, best, best >= SOLVED * full.mean(), kept=kept
            )
    for task in RECALLED:
        each = asked[task]
        length = each.context.shape[1]
        first = np.where(each.needed, np.arange(length), length).min(1)
        last = np.where(each.needed, np.arange(length), -1).max(1)
        for kept in KEPT:
            tokens = budget(length, kept)
            out = (first >= SINKS) & (last < length - (tokens - SINKS))
            value = answers[f"blind/{task}/streaming/{kept}"][out].mean()
            check("a window does not answer what is outside", task, value, value <= CHANCE[task] + 0.1, kept=kept)
            value = answers[f"blind/{task}/random, one choice/{kept}"].mean()
            check("chance answers no more than the share it keeps", task, value, value <= kept + 0.1, kept=kept)
    return found


def _spread(rows: list[dict[str, Any]], task: str, kept: float) -> float:
    """Best less worst of the methods that keep the newest tokens."""
    others = (*BOUNDS, *ALONE)
    values = [
        each["accuracy"][0]
        for each in rows
        if (each["protocol"], each["task"], each["kept"]) == ("blind", task, kept) and each["method"] not in others
    ]
    return float(max(values) - min(values))


def sink(model: nn.Module, asked: Batch) -> list[list[float]]:
    """Attention to the first token, (layers, heads): the mean over queries past the 16th. Whether there is a sink."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(torch.from_numpy(asked.context[:32]), output_attentions=True)
    return [each[:, :, 16:, 0].mean((0, 2)).tolist() for each in out.attentions]


def in_turn(call: Callable[..., Any], work: list[tuple[Any, ...]], processes: int) -> Iterator[Any]:
    """What a call gives for each piece of work, in their order."""
    if processes == 1:
        yield from (call(*each) for each in work)
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        yield from pool.map(call, *zip(*work, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="what train.py made")
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--length", type=int, default=160, help="tokens of a context")
    parser.add_argument("--answers", type=Path, help="folder for the examples, and which answers were right")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    asked = {name: batch(name, SEED, given.examples, given.length) for name in given.tasks}
    if given.answers:
        given.answers.mkdir(parents=True, exist_ok=True)
        examples = {f"{name}/{part}": getattr(each, part) for name, each in asked.items() for part in PARTS}
        np.savez(given.answers / "examples.npz", **examples)
    told: dict[str, Any] = {"machine": hwprofiles.machine_summary(), "load_average": os.getloadavg()[0]}
    told |= {"versions": versions(), "examples": given.examples, "length": given.length}
    told["trained"] = json.loads((given.model / "train.json").read_text(encoding="utf8"))
    told["attention_to_the_first_token"] = sink(model, next(iter(asked.values())))
    rows: list[dict[str, Any]] = []
    answers: dict[str, Right] = {}
    cells = [(protocol, name) for protocol in PROTOCOLS for name in asked if protocol == "blind" or name in SEVERAL]
    work = [(given.model, name, asked[name], protocol) for protocol, name in cells]
    for more, right in in_turn(evaluate, work, given.processes):
        rows, answers = rows + more, answers | right
    told["checks"] = checks(rows, asked, answers) if set(asked) == set(TASKS) else []
    for each in told["checks"]:
        print(json.dumps(rounded(each)), flush=True)
    given.out.write_text(json.dumps(rounded(told | {"rows": rows}), indent=1) + "\n", encoding="utf8")
    if given.answers:
        sizes = {"/".join(["bytes", *(str(each[part]) for part in CELL)]): np.array(each["bytes"]) for each in rows}
        np.savez(given.answers / "answers.npz", **answers, **sizes)


if __name__ == "__main__":
    main()
