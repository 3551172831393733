"""Figures of classifiers against slow twins with loops."""

from __future__ import annotations

import math

import pytest
import torch

from compress.classification import score_batch, summarize_images
from compress.quality import METRICS, gates_met
from compress.records import Quality


def logits_of(seed: int, images: int = 20, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    maker = torch.Generator().manual_seed(seed)
    reference = torch.randn(images, classes, generator=maker)
    other = reference + 0.7 * torch.randn(images, classes, generator=maker)
    return reference, other, torch.randint(0, classes, (images,), generator=maker)


def summary(subject: str = "compressed", seeds: int = 5) -> Quality:
    scores = [score_batch(*logits_of(seed)) for seed in range(seeds)]
    return summarize_images(scores, subject, "torch", "top1/batch-32", "sha256:0")  # type: ignore[arg-type]


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def test_every_figure_is_what_a_twin_with_loops_counts() -> None:
    right = before = agreed = gained = lost = images = 0
    kl = 0.0
    for seed in range(5):
        for row, other, label in zip(*(tensor.tolist() for tensor in logits_of(seed)), strict=True):
            first, second = row.index(max(row)), other.index(max(other))
            images += 1
            right += second == label
            before += first == label
            agreed += first == second
            gained += second == label != first
            lost += first == label != second
            kl += sum(p * math.log(p / q) for p, q in zip(softmax(row), softmax(other), strict=True))
    found = {name: metric.value for name, metric in summary().metrics.items()}
    assert gained and lost
    assert found == pytest.approx(
        {
            "accuracy": right / images,
            "accuracy_change": 100 * (gained - lost) / images,
            "top1_agreement": agreed / images,
            "kl": kl / images,
        }
    )
    assert summary("baseline").metrics["accuracy"].value == before / images
    assert found["accuracy_change"] == pytest.approx(100 * (right - before) / images)


def test_every_metric_says_its_unit_its_direction_and_how_many_images_it_is_of() -> None:
    metrics = summary().metrics
    assert {name: (metric.unit, metric.better) for name, metric in metrics.items()} == METRICS["image-classifier"]
    assert {(metric.samples, metric.protocol) for metric in metrics.values()} == {(100, "top1/batch-32")}
    for metric in metrics.values():
        assert metric.interval is not None and metric.interval.low < metric.value < metric.interval.high
    assert set(summary("baseline").metrics) == {"accuracy"}


def test_a_gate_on_the_change_is_held_against_the_worse_end() -> None:
    found = summary()
    interval = found.metrics["accuracy_change"].interval
    assert interval is not None
    near = {"accuracy_change": interval.low - 0.1}, {"accuracy_change": interval.low + 0.1}
    assert [gates_met(found, gate)[0].met for gate in near] == [True, False]


def test_a_model_that_puts_out_nan_is_wrong_and_meets_no_gate() -> None:
    reference, other, labels = logits_of(0)
    found = summarize_images([score_batch(reference, other * math.nan, labels)], "compressed", "torch", "p", "d")
    assert (found.metrics["accuracy"].value, found.metrics["top1_agreement"].value) == (0, 0)
    assert math.isnan(found.metrics["kl"].value)
    assert not gates_met(found, {"kl": 1e9})[0].met and not gates_met(found, {"accuracy": 0.01})[0].met


def test_shapes_that_do_not_fit_together_are_refused() -> None:
    reference, other, labels = logits_of(0)
    for given in ((reference[:5], other, labels), (reference, other, labels[:5]), (reference[0], other[0], labels)):
        with pytest.raises(ValueError, match="found"):
            score_batch(*given)
