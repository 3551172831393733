"""The per-sample logs of lm-evaluation-harness: kept in files, and those of two models paired."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import InputError
from compress.files import write_text
from compress.quality.task_pairs import Pairs

_OFFERED = ("acc", "acc_norm")
"""Metrics of tasks that offer answers: guessing hits one in so many."""
_SAME = 1e-6


def pair_logs(baseline: Mapping[str, Any], variant: Mapping[str, Any]) -> tuple[list[Pairs], tuple[str, ...]]:
    """The harness's results of both models → pairs per task, filter and metric, and notes on what is not paired.

    A metric is paired where the harness's own figure is the mean of its samples, or the perplexity of their sums;
    another one (F1, BLEU) belongs to all samples together. Raises: InputError where the samples differ.
    """
    found, notes = [], list[str]()
    for task, samples in baseline["samples"].items():
        others = variant["samples"].get(task, [])
        if [_identity(each) for each in samples] != [_identity(each) for each in others]:
            raise InputError(f"Task {task} gave the two models different samples, which cannot be paired.")
        filters = dict.fromkeys(str(each["filter"]) for each in samples)
        for name in filters:
            rows = [(one, two) for one, two in zip(samples, others, strict=True) if one["filter"] == name]
            for metric in rows[0][0]["metrics"]:
                pairs = _pairs(task, metric, name, rows, baseline)
                if pairs is None:
                    notes.append(f"{task} {metric} is no mean over samples, so it is not paired and left out")
                else:
                    found.append(pairs)
    return found, tuple(dict.fromkeys(notes))


def _pairs(
    task: str, metric: str, name: str, rows: Sequence[tuple[Any, Any]], results: Mapping[str, Any]
) -> Pairs | None:
    told = results["results"].get(task, {}).get(f"{metric},{name}")
    values = [[_value(one[metric]) for one in pair] for pair in rows]
    if not isinstance(told, int | float) or any(each is None for pair in values for each in pair):
        return None
    table = np.array(values, np.float64)  # (samples, two models, value and weight)
    first, second, weights = table[:, 0, 0], table[:, 1, 0], table[:, 0, 1]
    mean = float(first.sum() / weights.sum())
    is_nats = not math.isclose(mean, told, rel_tol=_SAME, abs_tol=_SAME)
    if is_nats and not any(math.isclose(each, told, rel_tol=_SAME) for each in (math.exp(-mean), -mean / math.log(2))):
        return None
    higher = bool(results.get("higher_is_better", {}).get(task, {}).get(metric, True))
    sign = -1.0 if is_nats else 1.0
    offered = metric in _OFFERED and not is_nats
    chance = float(np.mean([1 / len(one["arguments"]) for one, _ in rows])) if offered else None
    return Pairs(task, metric, name, sign * first, sign * second, weights, is_nats, higher and not is_nats, chance)


def _value(given: Any) -> tuple[float, float] | None:
    """A sample's value and weight; None of what is neither a number nor two."""
    if isinstance(given, bool | int | float | np.number):
        return float(given), 1.0
    if isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(part, int | float) for part in given):
        return (float(given[0]), float(given[1])) if given[1] > 0 else None
    return None


def _identity(sample: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(sample[name] for name in ("filter", "doc_id", "doc_hash", "prompt_hash", "target_hash"))


def keep_logs(folder: Path, logs: Mapping[str, Mapping[str, Any]]) -> None:
    """The harness's per-sample logs, a line each: ARM/TASK.jsonl."""
    for arm, results in logs.items():
        (folder / arm).mkdir(parents=True, exist_ok=True)
        for task, samples in results["samples"].items():
            lines = (json.dumps(sample, default=str, ensure_ascii=False) for sample in samples)
            write_text(folder / arm / f"{_file_name(task)}.jsonl", "".join(f"{line}\n" for line in lines))


def _file_name(task: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in task)
