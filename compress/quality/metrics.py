"""The table of quality figures: what each is measured in, which way is better, and its gates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from compress.errors import UsageError, nearest
from compress.records import Gate, Interval, Metric, Quality

Subject = Literal["baseline", "compressed"]
Better = Literal["lower", "higher"]
Figures = dict[str, tuple[float, Interval | None]]
"""Metric → its value and its interval."""

# Both kinds of model that answer with a class or a token. Calibration is that of the top answer; "fitted" is after one
# temperature per model.
_ANSWERS: dict[str, tuple[str, Better]] = {
    "flips": ("fraction", "lower"),
    "ece": ("1", "lower"),
    "ece_change": ("1", "lower"),
    "brier": ("1", "lower"),
    "brier_change": ("1", "lower"),
    "ece_fitted": ("1", "lower"),
    "ece_fitted_change": ("1", "lower"),
    "brier_fitted": ("1", "lower"),
    "brier_fitted_change": ("1", "lower"),
}
METRICS: dict[str, dict[str, tuple[str, Better]]] = {  # task → metric → its unit and which way is better
    "causal-lm": {
        "perplexity": ("1", "lower"),
        "nll": ("nats/token", "lower"),
        "kl": ("nats/token", "lower"),
        "top1_agreement": ("fraction", "higher"),
        "nll_change": ("nats/token", "lower"),
        "perplexity_second_half": ("1", "lower"),
        "kl_median": ("nats/token", "lower"),
        "kl_p90": ("nats/token", "lower"),
        "kl_p99": ("nats/token", "lower"),
        "kl_max": ("nats/token", "lower"),
        "top5_overlap": ("fraction", "higher"),
        "true_token_change": ("1", "higher"),
        "true_token_change_rms": ("1", "lower"),
        "entropy_change": ("nats/token", "lower"),
        "token_accuracy": ("fraction", "higher"),
        "token_accuracy_change": ("percentage points", "higher"),
        **_ANSWERS,
        "greedy_agreement": ("fraction", "higher"),
        "greedy_exact_match": ("fraction", "higher"),
        "greedy_first_divergence": ("tokens", "higher"),
        "sampled_agreement_t0.5": ("fraction", "higher"),
        "sampled_agreement_t0.8": ("fraction", "higher"),
        "sampled_agreement_t0.8_top40": ("fraction", "higher"),
    },
    "encoder": {
        "cosine": ("1", "higher"),
        "nearest_neighbour_agreement": ("fraction", "higher"),
        "cosine_p1": ("1", "higher"),
        "cosine_min": ("1", "higher"),
        "similarity_spearman": ("1", "higher"),
        "recall_at_10": ("fraction", "higher"),
    },
    "image-classifier": {
        "accuracy": ("fraction", "higher"),
        "accuracy_change": ("percentage points", "higher"),
        "kl": ("nats/sample", "lower"),
        "top1_agreement": ("fraction", "higher"),
        "top5_accuracy": ("fraction", "higher"),
        "top5_accuracy_change": ("percentage points", "higher"),
        "worst_class_drop": ("percentage points", "lower"),
        **_ANSWERS,
    },
    "image-outputs": {"cosine": ("1", "higher"), "relative_error": ("1", "lower")},
}
HEADLINE: dict[str, frozenset[str]] = {
    "causal-lm": frozenset({"perplexity", "nll", "kl", "top1_agreement", "nll_change"}),
    "encoder": frozenset({"cosine", "nearest_neighbour_agreement"}),
    "image-classifier": frozenset({"accuracy", "accuracy_change", "kl", "top1_agreement"}),
    "image-outputs": frozenset({"cosine", "relative_error"}),
}
"""What the first table of a page shows; all others are details."""
for _same, _kind in (("classifier", "image-classifier"), ("array-outputs", "image-outputs")):
    METRICS[_same], HEADLINE[_same] = METRICS[_kind], HEADLINE[_kind]
QUANTILES = ("kl_median", "kl_p90", "kl_p99")
"""Of many tokens in few windows, which may not bound them."""
GENERATED = ("greedy_", "sampled_")
"""How the figures begin that are of continuations, which a recipe may switch off."""


def measured(task: str, figures: Figures, samples: int, protocol: str) -> dict[str, Metric]:
    """Figures of one protocol as records, with unit and direction from the table."""
    found = {}
    for name, (value, interval) in figures.items():
        unit, better = METRICS[task][name]
        detail = name not in HEADLINE[task]
        found[name] = Metric(
            value=value, interval=interval, samples=samples, unit=unit, protocol=protocol, better=better, detail=detail
        )
    return found


def headline(quality: Quality) -> Quality:
    """Its first figures alone, for an arm that stands beside another."""
    kept = {name: metric for name, metric in quality.metrics.items() if not metric.detail}
    more = {"metrics": kept, "curves": (), "flips": None, "generation": (), "worst": (), "notes": ()}
    return quality.model_copy(update=more)


def in_order(task: str, metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """As the table has them."""
    return {name: metrics[name] for name in METRICS[task] if name in metrics}


def check_gates(names: Iterable[str], task: str, generation: bool = True) -> None:
    """Called before the work. generation: whether prompts will be continued.

    Raises: UsageError for a gate on a metric that this kind of model does not have, or will not.
    """
    for name in names:
        if name not in METRICS[task]:
            raise UsageError(
                f"There is no quality gate '{name}' for a model of kind {task}.{nearest(name, METRICS[task])}"
            )
        if not generation and name.startswith(GENERATED):
            raise UsageError(
                f"The quality gate '{name}' is of continued prompts, which quality.generation=0 switches off. Give "
                "quality.generation a number of prompts, or leave the gate out."
            )


def gates_met(quality: Quality, gates: Mapping[str, float]) -> tuple[Gate, ...]:
    """Hold the worse end of each gated metric's interval against its bound; nan meets none.

    Where there is no interval (one window), the value itself is compared. A known metric that these data did not give
    (a percentile of too few tokens, say: the notes of `quality` tell) is found as nan. Raises: UsageError for a name
    that no kind of model has.
    """
    return tuple(_gate(quality, name, bound) for name, bound in gates.items())


def interval_notes(quality: Quality, gates: Mapping[str, float]) -> tuple[str, ...]:
    """What a reader must know of figures without an interval, and of gates that were held against such a figure alone.

    An interval of no width, where every sample gave the same, bounds nothing either.
    """
    alone = [name for name, metric in quality.metrics.items() if metric.interval is None and metric.samples == 1]
    few = [name for name in QUANTILES if name in quality.metrics and quality.metrics[name].interval is None]
    notes = [f"every figure rests on one sample, so none has an interval: {', '.join(alone)}"] if alone else []
    for name in few if not alone else ():
        notes.append(f"{name} has no interval: {quality.metrics[name].samples} samples are too few to bound it")
    for name in gates:
        metric = quality.metrics.get(name)
        if metric is None or (metric.interval and metric.interval.low < metric.interval.high):
            continue
        width = "an interval of no width" if metric.interval else "no interval"
        notes.append(f"the gate on {name} was held against its value alone, which has {width}")
    return tuple(notes)


def _gate(quality: Quality, name: str, bound: float) -> Gate:
    metric = quality.metrics.get(name)
    if metric is None:
        if not any(name in known for known in METRICS.values()):
            raise UsageError(f"There is no quality gate '{name}' for these data.{nearest(name, quality.metrics)}")
        return Gate(name=name, bound=bound, found=math.nan, met=False)
    if metric.better == "lower":
        found = metric.value if metric.interval is None else metric.interval.high
        return Gate(name=name, bound=bound, found=found, met=found <= bound)
    found = metric.value if metric.interval is None else metric.interval.low
    return Gate(name=name, bound=bound, found=found, met=found >= bound)
