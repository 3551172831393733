"""What people read for the keys of metrics, and which of them only compare with the baseline."""

from __future__ import annotations

from compress.report import format as fmt

METRIC_NAMES = {
    "accuracy": "accuracy",
    "accuracy_change": "accuracy change",
    "brier": "Brier score",
    "brier_change": "Brier score, change",
    "brier_fitted": "Brier score after one temperature",
    "brier_fitted_change": "Brier score after one temperature, change",
    "ece": "calibration error",
    "ece_change": "calibration error, change",
    "ece_fitted": "calibration error after one temperature",
    "ece_fitted_change": "calibration error after one temperature, change",
    "entropy_change": "entropy, change",
    "greedy_agreement": "greedy continuations, same token",
    "greedy_exact_match": "greedy continuations, wholly alike",
    "greedy_first_divergence": "greedy continuations, tokens before the first that differs",
    "kl": "KL",
    "kl_max": "KL, largest",
    "kl_median": "KL, median",
    "kl_p90": "KL, 90th percentile",
    "kl_p99": "KL, 99th percentile",
    "nll": "loss",
    "nll_change": "loss change",
    "nearest_neighbour_agreement": "nearest-neighbour agreement",
    "perplexity": "perplexity",
    "perplexity_second_half": "perplexity of second halves",
    "recall_at_10": "recall at 10",
    "similarity_spearman": "rank correlation of similarities",
    "token_accuracy": "next-token accuracy",
    "token_accuracy_change": "next-token accuracy, change",
    "top1_agreement": "top-1 agreement",
    "top5_accuracy": "top-5 accuracy",
    "top5_accuracy_change": "top-5 accuracy, change",
    "top5_overlap": "top-5 overlap",
    "true_token_change": "true token's probability, change",
    "true_token_change_rms": "true token's probability, change, root mean square",
    "worst_class_drop": "largest drop of a class",
}
# A model has these by itself; all others compare with the baseline, which has no figure for them.
_OWN = frozenset(
    {"accuracy", "brier", "brier_fitted", "ece", "ece_fitted", "nll", "perplexity", "perplexity_second_half"}
    | {"token_accuracy", "top5_accuracy"}
)


def metric_name(key: str) -> str:
    """The name people read: `top1_agreement` is `top-1 agreement`, `cosine[boxes]` is `cosine, boxes`."""
    plain, bracket, rest = key.partition("[")
    if bracket and rest.endswith("]"):
        return f"{metric_name(plain)}, {fmt.clean(rest[:-1])}"
    return METRIC_NAMES.get(key) or fmt.clean(key.replace("_", " "))


def is_relative(key: str) -> bool:
    """Whether a metric compares with the baseline: the baseline itself has no figure for it."""
    return key not in _OWN
