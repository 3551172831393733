"""Figures of classifiers against slow twins with loops."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binomtest

from compress.quality.calibration_error import Halves
from compress.quality.classification import score_batch, summarize_images
from compress.quality.metrics import METRICS, gates_met
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
    expected = {
        "accuracy": right / images,
        "accuracy_change": 100 * (gained - lost) / images,
        "top1_agreement": agreed / images,
        "kl": kl / images,
        "flips": (gained + lost) / images,
    }
    found = {name: metric.value for name, metric in summary().metrics.items()}
    assert gained and lost
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert summary("baseline").metrics["accuracy"].value == before / images
    assert found["accuracy_change"] == pytest.approx(100 * (right - before) / images)


def test_every_metric_says_its_unit_its_direction_and_how_many_images_it_is_of() -> None:
    metrics = summary().metrics
    assert list(metrics) == ["accuracy", "accuracy_change", "kl", "top1_agreement", "worst_class_drop", "flips"]
    for name, metric in metrics.items():
        assert (metric.unit, metric.better) == METRICS["image-classifier"][name]
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


def many(images: int = 640, classes: int = 8) -> tuple[list[tuple[torch.Tensor, ...]], Quality]:
    """Batches of 32 and their summary, with a temperature fitted on every second one."""
    batches, halves = [logits_of(seed, 32, classes) for seed in range(images // 32)], Halves(images // 32)
    for place in halves.order:
        halves.see(place, *batches[place])
    scores = [score_batch(*batch) for batch in batches]
    return batches, summarize_images(scores, "compressed", "torch", "p", "d", halves.fitted())


def test_classes_first_fives_calibration_and_worst_images_are_what_loops_give() -> None:
    batches, found = many()
    rows = [row for batch in batches for row in zip(*(each.tolist() for each in batch), strict=True)]
    ranked = [[sorted(range(8), key=lambda word, arm=arm: -arm[word]) for arm in row[:2]] for row in rows]
    labels = [row[2] for row in rows]
    hits = [[label in one[which][:5] for one, label in zip(ranked, labels, strict=True)] for which in (0, 1)]
    right = [[label == one[which][0] for one, label in zip(ranked, labels, strict=True)] for which in (0, 1)]
    drops = {}
    for kind in range(8):
        inside = [place for place, label in enumerate(labels) if label == kind]
        drops[kind] = 100 * sum(right[0][at] - right[1][at] for at in inside) / len(inside)
    top = [max(softmax(row[1])) for row in rows]
    expected = {
        "top5_accuracy": sum(hits[1]) / 640,
        "top5_accuracy_change": 100 * (sum(hits[1]) - sum(hits[0])) / 640,
        "worst_class_drop": max(drops.values()),
        "brier": sum((a - b) ** 2 for a, b in zip(top, right[1], strict=True)) / 640,
        "ece": ece(top, right[1]),
    }
    assert {name: found.metrics[name].value for name in expected} == pytest.approx(expected, abs=1e-9)
    assert f"class {max(drops, key=lambda kind: drops[kind])}, the largest of 8" in found.notes[0]
    interval = found.metrics["worst_class_drop"].interval
    assert interval and interval.low < expected["worst_class_drop"] < interval.high
    gained = sum(b > a for a, b in zip(*right, strict=True))
    lost = sum(b < a for a, b in zip(*right, strict=True))
    assert found.flips and (found.flips.gained, found.flips.lost) == (gained, lost)
    assert found.flips.p_value == pytest.approx(binomtest(gained, gained + lost).pvalue)
    kl = [sum(p * math.log(p / q) for p, q in zip(softmax(a), softmax(b), strict=True)) for a, b, _ in rows]
    order = sorted(range(640), key=lambda place: -kl[place])[:20]
    assert [each.sample for each in found.worst] == order
    assert [each.kl for each in found.worst] == pytest.approx([kl[place] for place in order])
    first = found.worst[0]
    assert (first.target, first.reference, first.chosen) == (labels[order[0]], *(one[0] for one in ranked[order[0]]))


def ece(confidence: list[float], right: list[bool]) -> float:
    order, total = sorted(range(len(right)), key=lambda place: confidence[place]), 0.0
    for one in range(15):
        inside = [at for rank, at in enumerate(order) if rank * 15 // len(order) == one]
        total += abs(sum(confidence[at] - right[at] for at in inside)) / len(order)
    return total


def test_every_figure_of_enough_images_of_enough_classes_is_there() -> None:
    _, found = many()
    assert list(found.metrics) == list(METRICS["image-classifier"])
    assert found.metrics["ece_fitted"].samples == 320
    # labels are random: any confidence is too much, which a temperature mends
    assert found.metrics["ece_fitted"].value < found.metrics["ece"].value
    assert "Temperature" in found.notes[-1] and [curve.name for curve in found.curves] == ["reliability"]


def test_few_images_have_no_calibration_and_a_note_says_so() -> None:
    found = summary()
    assert not any("ece" in name for name in found.metrics)
    assert "100 images, and 150 are needed" in found.notes[-1]
