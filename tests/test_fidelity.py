"""Every figure of a language model against an independent NumPy implementation, slow and obvious."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats as distributions

from compress.quality import token_scores
from compress.quality.calibration_error import Halves, TemperatureFit, confidence_at, fit_temperature
from compress.quality.fidelity import CONTEXT, WORST, second_half_perplexity
from compress.quality.metrics import HEADLINE, METRICS, check_gates, gates_met, headline
from compress.quality.token_quality import summarize_tokens, worst_with_text
from compress.quality.token_scores import score_tokens, score_window
from compress.records.quality import Curve, Metric, Quality
from helpers.fidelity_twin import (
    LENGTHS,
    SOURCE,
    WORDS,
    Twin,
    Window,
    judged,
    probabilities,
    scored,
    twin_ece,
    twin_temperature,
    window,
)


@pytest.fixture(scope="module")
def data() -> list[Window]:
    return [window(seed, tokens) for seed, tokens in enumerate(LENGTHS)]


def test_every_figure_equals_an_independent_implementation(data: list[Window]) -> None:
    twin, found = Twin(data), judged(data).metrics
    squares = [token["change"] ** 2 for token in twin.tokens]
    flips = [token["right"] != token["reference_right"] for token in twin.tokens]
    expected = {
        "nll": twin.mean("nll"),
        "perplexity": math.exp(twin.mean("nll")),
        "nll_change": twin.mean("nll") - twin.mean("reference_nll"),
        "kl": twin.mean("kl"),
        "kl_median": twin.quantile(0.5),
        "kl_p90": twin.quantile(0.9),
        "kl_p99": twin.quantile(0.99),
        "kl_max": max(token["kl"] for token in twin.tokens),
        "top1_agreement": twin.mean("agreed"),
        "top5_overlap": twin.mean("overlap"),
        "true_token_change": twin.mean("change"),
        "true_token_change_rms": math.sqrt(sum(squares) / len(squares)),
        "entropy_change": twin.mean("entropy"),
        "token_accuracy": twin.mean("right"),
        "token_accuracy_change": 100 * (twin.mean("right") - twin.mean("reference_right")),
        "flips": sum(flips) / len(flips),
    }
    assert {name: found[name].value for name in expected} == pytest.approx(expected, abs=1e-9)
    for name, inside in (("kl", "kl"), ("top5_overlap", "overlap"), ("true_token_change", "change")):
        interval = found[name].interval
        assert interval and (interval.low, interval.high) == pytest.approx(twin.interval(inside), abs=1e-9)


def test_the_second_half_of_each_window_is_scored_as_llama_cpp_counts_it(data: list[Window]) -> None:
    twin, losses = Twin(data), []
    for rows in twin.windows:
        context = len(rows) + 1  # tokens of the window: row t predicts token t + 1
        losses += [row["nll"] for place, row in enumerate(rows) if place >= context // 2]
    metric = judged(data).metrics["perplexity_second_half"]
    assert metric.value == pytest.approx(math.exp(sum(losses) / len(losses)), abs=1e-9)
    assert metric.protocol == "ppl/second-half-131"
    assert second_half_perplexity([np.array([1.0])]) is None


def test_calibration_equals_an_independent_implementation(data: list[Window]) -> None:
    twin, found = Twin(data), judged(data).metrics
    own, before = ([token[f"{kind}confidence"] for token in twin.tokens] for kind in ("", "reference_"))
    right, was = ([token[f"{kind}right"] for token in twin.tokens] for kind in ("", "reference_"))
    assert found["ece"].value == pytest.approx(twin_ece(own, right), abs=1e-9)
    assert found["ece_change"].value == pytest.approx(twin_ece(own, right) - twin_ece(before, was), abs=1e-9)
    brier = [np.mean([(c - r) ** 2 for c, r in zip(*arm, strict=True)]) for arm in ((own, right), (before, was))]
    assert found["brier"].value == pytest.approx(brier[0], abs=1e-9)
    assert found["brier_change"].value == pytest.approx(brier[0] - brier[1], abs=1e-9)


def test_one_temperature_per_model_is_fitted_on_every_second_window_and_judged_by_the_others(
    data: list[Window],
) -> None:
    found, figures = judged(data), {}
    for arm, kind in ((1, ""), (0, "reference_")):
        temperature = twin_temperature(data, arm)
        confidence = [max(probabilities(row / temperature)) for each in data[1::2] for row in each[arm]]
        right = [token[f"{kind}right"] for rows in Twin(data).windows[1::2] for token in rows]
        squares = [(c - r) ** 2 for c, r in zip(confidence, right, strict=True)]
        figures[kind] = twin_ece(confidence, right), sum(squares) / len(squares), temperature
    (ece, brier, own), (ece_before, brier_before, before) = figures[""], figures["reference_"]
    names = ("ece_fitted", "ece_fitted_change", "brier_fitted", "brier_fitted_change")
    expected = (ece, ece - ece_before, brier, brier - brier_before)
    assert [found.metrics[name].value for name in names] == pytest.approx(expected, abs=1e-6)
    assert own > before  # the compressed logits are larger by a factor: that part is the temperature's
    assert f"Temperature {own:.4f} (the original's: {before:.4f})" in found.notes[-1]
    assert found.metrics["ece_fitted"].samples == 3
    assert ece < found.metrics["ece"].value


@pytest.mark.parametrize("windows", [1, 7, 40, 41, 500])
def test_what_is_kept_to_fit_a_temperature_does_not_grow_with_the_data(
    windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.quality.calibration_error.FIT_ROWS", 40)
    fit = TemperatureFit(windows, 8)
    for _ in range(windows):
        fit.keep(torch.zeros(50, 8), torch.zeros(50, dtype=torch.int64))
    kept = sum(len(rows) for rows in fit._logits)
    assert 20 < kept <= 40


def test_a_temperature_undoes_a_factor_on_the_logits() -> None:
    maker = np.random.default_rng(3)
    logits = torch.from_numpy(2 * maker.standard_normal((400, 12)))
    chances = torch.softmax(logits, -1).numpy()
    targets = torch.tensor([maker.choice(12, p=row) for row in chances])
    plain = fit_temperature(logits, targets)
    assert fit_temperature(3 * logits, targets) == pytest.approx(3 * plain, rel=1e-9)
    assert confidence_at(3 * logits, 3 * plain) == pytest.approx(confidence_at(logits, plain), abs=1e-12)
    masked = torch.cat([logits, torch.full((400, 4), -math.inf)], 1)
    assert fit_temperature(masked, targets) == pytest.approx(plain, rel=1e-9)
    assert math.isnan(fit_temperature(logits * math.nan, targets))


def test_the_original_against_itself_differs_in_nothing(data: list[Window]) -> None:
    same = [(reference, reference, targets) for reference, _, targets in data]
    found = judged(same)
    for name in ("kl", "kl_max", "flips", "true_token_change_rms", "entropy_change", "ece_change", "brier_change"):
        assert found.metrics[name].value == 0, name
    assert found.metrics["top5_overlap"].value == found.metrics["top1_agreement"].value == 1
    assert found.flips and (found.flips.gained, found.flips.lost, found.flips.p_value) == (0, 0, 1)


def test_the_baseline_has_the_figures_that_compare_with_nothing(data: list[Window]) -> None:
    halves = Halves(len(data))
    for place in halves.order:
        halves.see(place, *(torch.from_numpy(each) for each in data[place]))
    found = summarize_tokens(scored(data), "baseline", SOURCE, halves.fitted())
    itself = judged([(reference, reference, targets) for reference, _, targets in data]).metrics
    assert set(found.metrics) == {
        "perplexity", "nll", "perplexity_second_half", "token_accuracy", "ece", "brier", "ece_fitted", "brier_fitted",
    }  # fmt: skip
    for name, metric in found.metrics.items():
        assert metric.value == pytest.approx(itself[name].value, abs=1e-12), name
    assert found.flips is None and [curve.name for curve in found.curves] == ["reliability"]


def test_tokens_are_scored_as_their_window_is(data: list[Window]) -> None:
    for each in data:
        sums, whole = score_tokens(*each).sums, score_window(*each)
        assert (sums.tokens, sums.agreed) == (whole.tokens, whole.agreed)
        assert (sums.nll, sums.reference_nll, sums.kl) == pytest.approx((whole.nll, whole.reference_nll, whole.kl))


def test_chunks_and_read_only_halves_change_nothing(data: list[Window], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score_tokens(*data[0])
    monkeypatch.setattr(token_scores, "CHUNK_ELEMENTS", WORDS * 7)
    cut = score_tokens(*data[0])
    for name in ("kl", "entropy", "overlap", "top", "targets"):
        assert getattr(cut, name) == pytest.approx(getattr(whole, name), abs=1e-12)


def test_words_masked_out_on_both_sides_change_nothing(data: list[Window]) -> None:
    reference, other, targets = data[0]
    padding = np.full((len(targets), 3), -math.inf)
    padded = score_tokens(np.hstack([reference, padding]), np.hstack([other, padding]), targets)
    for name in ("kl", "entropy", "reference_entropy", "overlap", "confidence"):
        assert getattr(padded, name) == pytest.approx(getattr(score_tokens(*data[0]), name), abs=1e-12)


def curve(found: Quality, name: str) -> Curve:
    return next(each for each in found.curves if each.name == name)


def test_the_divergence_by_position_and_by_confidence_is_what_loops_give(data: list[Window]) -> None:
    twin, found = Twin(data), judged(data)
    by_place, by_share = curve(found, "kl_by_position"), curve(found, "kl_by_confidence")
    assert len(by_place.points) == 8 and by_place.points[0].low == 0 and by_place.points[-1].high == 130
    for point in by_place.points:
        inside = [row["kl"] for rows in twin.windows for at, row in enumerate(rows) if point.low <= at < point.high]
        assert (point.count, point.value) == (len(inside), pytest.approx(sum(inside) / len(inside), abs=1e-9))
    assert sum(point.count for point in by_share.points) == len(twin.tokens)
    for point in by_share.points:
        inside = [row["kl"] for row in twin.tokens if point.low <= row["reference_confidence"] < point.high]
        assert (point.count, point.value) == (len(inside), pytest.approx(sum(inside) / len(inside), abs=1e-9))
        assert point.interval is None or point.interval.low <= point.value <= point.interval.high


def test_the_reliability_curve_has_fifteen_parts_of_equal_mass(data: list[Window]) -> None:
    points = curve(judged(data), "reliability").points
    counts = [point.count for point in points]
    assert len(points) == 15 and max(counts) - min(counts) <= 2 and sum(counts) == sum(LENGTHS)
    assert (points[0].low, points[-1].high) == (0, 1)


def test_flips_are_counted_both_ways_and_tested_by_windows(data: list[Window]) -> None:
    found, twin = judged(data).flips, Twin(data)
    gained = [sum(token["right"] > token["reference_right"] for token in rows) for rows in twin.windows]
    lost = [sum(token["right"] < token["reference_right"] for token in rows) for rows in twin.windows]
    assert found and (found.gained, found.lost, found.samples) == (sum(gained), sum(lost), sum(LENGTHS))
    differences = np.array(gained) - np.array(lost)
    assert found.p_value == pytest.approx(distributions.chi2.sf(differences.sum() ** 2 / (differences**2).sum(), 1))
    alone = judged(data[:1]).flips
    assert alone and alone.p_value is None


def test_the_worst_tokens_come_with_what_was_before_them(data: list[Window]) -> None:
    class Tokenizer:
        def decode(self, ids: list[int], **_: object) -> str:
            return " ".join(str(each) for each in ids)

    ids = [np.concatenate([[7], targets]) for _, _, targets in data]
    found = worst_with_text(scored(data), range(len(data)), ids, Tokenizer())
    twin = [(row["kl"], at, place) for at, rows in enumerate(Twin(data).windows) for place, row in enumerate(rows)]
    expected = sorted(twin, reverse=True)[:WORST]
    assert [(each.sample, each.position) for each in found] == [(at, place + 1) for _, at, place in expected]
    for each, (kl, at, place) in zip(found, expected, strict=True):
        assert each.kl == pytest.approx(kl, abs=1e-9)
        assert each.target == ids[at][place + 1] and each.context == tuple(
            ids[at][max(0, place + 1 - CONTEXT) : place + 1]
        )
        p, q = probabilities(data[at][0][place]), probabilities(data[at][1][place])
        assert (each.reference, each.chosen) == (p.argmax(), q.argmax())
        assert (each.reference_probability, each.probability) == pytest.approx((p[each.target], q[each.target]))
        assert each.context_text == " ".join(map(str, each.context)) and each.chosen_text == str(each.chosen)
    assert worst_with_text(scored(data), range(len(data)), ids, None)[0].context_text == ""


def test_one_window_gives_figures_without_intervals(data: list[Window]) -> None:
    found = judged([window(0, 600)])
    assert {name for name, metric in found.metrics.items() if metric.interval is not None} == set()
    assert {"kl_p99", "ece", "flips"} <= set(found.metrics)
    assert not any(name.endswith("fitted") for name in found.metrics)
    assert all(point.interval is None for each in found.curves for point in each.points)


def test_a_model_that_puts_out_nan_has_no_figure_that_meets_a_gate(data: list[Window]) -> None:
    found = judged([(reference, other * math.nan, targets) for reference, other, targets in data])
    bounds = {name: -1e9 if metric.better == "higher" else 1e9 for name, metric in found.metrics.items()}
    bounds |= dict.fromkeys(("top1_agreement", "token_accuracy"), 1e-09)  # nothing agrees, nothing is right
    for name in ("top5_overlap", "flips", "token_accuracy_change"):
        bounds.pop(name)  # of order alone, which is still a figure
    assert not [gate.name for gate in gates_met(found, bounds) if gate.met]
    assert found.metrics["flips"].value > 0.3


def test_a_word_that_the_compressed_model_rules_out_is_an_infinite_divergence() -> None:
    reference, other, targets = window(0, 60)
    other[3, 5] = -math.inf
    found = judged([(reference, other, targets), window(1, 60)])
    assert found.metrics["kl_max"].value == found.metrics["kl"].value == math.inf
    assert math.isfinite(found.metrics["kl_median"].value) and found.metrics["kl_median"].interval is None


def test_every_figure_has_its_unit_direction_protocol_and_may_be_gated(data: list[Window]) -> None:
    found = judged(data).metrics
    order = [name for name in METRICS["causal-lm"] if not name.startswith(("greedy", "sampled"))]
    assert list(found) == order
    check_gates(METRICS["causal-lm"], "causal-lm")
    for name, metric in found.items():
        assert (metric.unit, metric.better) == METRICS["causal-lm"][name]
        assert metric.protocol and metric.detail is (name not in HEADLINE["causal-lm"])
        assert metric.interval is None or metric.interval.low <= metric.value <= metric.interval.high, name
    assert found["ece"].protocol == "top answer, 15 bins of equal mass, ppl/disjoint-131"
    assert set(headline(judged(data)).metrics) == HEADLINE["causal-lm"]
    assert not headline(judged(data)).curves


def test_figures_of_an_older_report_still_load() -> None:
    old = {"value": 1.0, "samples": 3, "unit": "1", "protocol": "p", "better": "lower"}
    found = Quality.model_validate({"subject": "baseline", "where": "x", "metrics": {"nll": old}, "data_digest": "d"})
    assert found.metrics["nll"] == Metric(value=1, samples=3, unit="1", protocol="p", better="lower")
    assert Quality.model_validate_json(found.model_dump_json()) == found
