"""Quality figures against slow twins with loops, gates at the worse end of the interval, guards."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from compress.errors import UsageError
from compress.quality import embedding_scores, metrics, token_scores
from compress.quality.embedding_scores import score_embeddings
from compress.quality.metrics import HEADLINE, METRICS, check_gates, gates_met, interval_notes
from compress.quality.token_scores import WindowScore, score_window
from compress.quality.token_summary import summarize
from compress.records import Interval, Metric, Quality


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = sum(math.exp(x - top) for x in row)
    return [math.exp(x - top) / total for x in row]


def logits_of(seed: int, tokens: int, words: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = 3 * torch.randn(tokens, words, generator=generator)
    other = reference + 0.5 * torch.randn(tokens, words, generator=generator)
    return reference, other, torch.randint(0, words, (tokens,), generator=generator)


def windows(count: int = 6) -> list[WindowScore]:
    return [score_window(*logits_of(seed, 10 + seed, 13)) for seed in range(count)]


def summary(scores: list[WindowScore], subject: metrics.Subject = "compressed") -> Quality:
    return summarize(scores, subject, "torch", "ppl/disjoint-512", "sha256:0")


def test_a_window_is_scored_as_a_twin_with_loops_scores_it() -> None:
    reference, other, targets = logits_of(0, 9, 11)
    nll = reference_nll = kl = agreed = 0.0
    for p_row, q_row, target in zip(reference.tolist(), other.tolist(), targets.tolist(), strict=True):
        p, q = softmax(p_row), softmax(q_row)
        nll -= math.log(q[target])
        reference_nll -= math.log(p[target])
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        agreed += p.index(max(p)) == q.index(max(q))

    score = score_window(reference, other, targets)

    assert (score.tokens, score.agreed) == (9, agreed)
    assert (score.nll, score.reference_nll, score.kl) == pytest.approx((nll, reference_nll, kl), rel=1e-12)


def test_cutting_a_window_into_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, other, targets = logits_of(1, 295, 17)  # 42 chunks of 7 and one row
    whole = score_window(reference, other, targets)
    monkeypatch.setattr(token_scores, "CHUNK_ELEMENTS", 17 * 7)
    cut = score_window(reference, other, targets)
    assert (cut.nll, cut.reference_nll, cut.kl) == pytest.approx((whole.nll, whole.reference_nll, whole.kl))
    assert cut.agreed == whole.agreed


@pytest.mark.filterwarnings("error")  # torch warns of arrays that it may not write to
def test_numpy_arrays_even_read_only_ones_score_like_tensors() -> None:
    reference, other, targets = logits_of(2, 20, 9)
    arrays = [tensor.numpy().copy() for tensor in (reference, other, targets)]
    for array in arrays:
        array.flags.writeable = False
    assert score_window(*arrays) == score_window(reference, other, targets)


def test_without_a_reference_only_the_likelihood_is_scored() -> None:
    _, other, targets = logits_of(3, 12, 9)
    assert score_window(None, other, targets) == WindowScore(12, score_window(other, other, targets).nll)


def test_a_model_against_itself_diverges_by_exactly_nothing() -> None:
    reference, _, targets = logits_of(4, 50, 31)
    score = score_window(reference, reference, targets)
    assert (score.kl, score.agreed) == (0.0, 50)
    assert score.nll == score.reference_nll


def test_large_logits_neither_overflow_nor_turn_the_divergence_negative() -> None:
    reference, other, targets = logits_of(5, 40, 31)
    score = score_window(1000 * reference + 3e4, 1000 * other + 3e4, targets)
    assert score.kl is not None
    assert math.isfinite(score.kl)
    assert score.kl >= 0


def test_words_masked_out_on_both_sides_add_nothing() -> None:
    reference, other, targets = logits_of(6, 20, 9)
    padding = torch.full((20, 3), -math.inf)
    padded = score_window(torch.cat([reference, padding], 1), torch.cat([other, padding], 1), targets)
    plain = score_window(reference, other, targets)
    assert (padded.kl, padded.nll, padded.agreed) == pytest.approx((plain.kl, plain.nll, plain.agreed))


def test_a_model_that_puts_out_nan_has_nan_figures_and_meets_no_gate() -> None:
    reference, other, targets = logits_of(7, 10, 9)
    broken = [score_window(reference, other * math.nan, targets), score_window(reference, other, targets)]
    found = summary(broken)
    assert math.isnan(found.metrics["kl"].value)
    assert not any(gate.met for gate in gates_met(found, {"kl": 1e9, "perplexity": 1e9, "nll_change": 1e9}))


@pytest.mark.parametrize(
    ("reference", "logits", "targets", "words"),
    [
        (None, (4,), [0], "wanted"),
        (None, (0, 5), [], "wanted"),
        (None, (2, 5), [0], "wanted"),
        ((2, 6), (2, 5), [0, 1], "differ in shape"),
        (None, (2, 5), [0, 5], "outside the 5 logits"),
        (None, (2, 5), [-100, 1], "drop padding"),
    ],
)
def test_windows_that_do_not_fit_together_are_refused(
    reference: tuple[int, ...] | None, logits: tuple[int, ...], targets: list[int], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        score_window(
            None if reference is None else torch.zeros(reference),
            torch.zeros(logits),
            torch.tensor(targets, dtype=torch.int64),
        )


def test_the_summary_divides_sums_by_tokens_and_not_by_windows() -> None:
    scores = windows()
    tokens = sum(score.tokens for score in scores)
    metrics = summary(scores).metrics
    assert metrics["nll"].value == pytest.approx(sum(score.nll for score in scores) / tokens)
    assert metrics["perplexity"].value == pytest.approx(math.exp(metrics["nll"].value))
    assert metrics["kl"].value == pytest.approx(sum(score.kl or 0 for score in scores) / tokens)
    assert metrics["top1_agreement"].value == pytest.approx(sum(score.agreed or 0 for score in scores) / tokens)
    change = sum(score.nll - (score.reference_nll or 0) for score in scores) / tokens
    assert metrics["nll_change"].value == pytest.approx(change)


def test_every_metric_says_its_unit_its_direction_its_clusters_and_its_protocol() -> None:
    metrics = summary(windows()).metrics
    assert {name: (metric.unit, metric.better) for name, metric in metrics.items()} == {
        "perplexity": ("1", "lower"),
        "nll": ("nats/token", "lower"),
        "kl": ("nats/token", "lower"),
        "top1_agreement": ("fraction", "higher"),
        "nll_change": ("nats/token", "lower"),
    }
    assert {(metric.samples, metric.protocol) for metric in metrics.values()} == {(6, "ppl/disjoint-512")}
    for metric in metrics.values():
        assert metric.interval is not None
        assert metric.interval.low < metric.value < metric.interval.high


def test_the_perplexity_interval_is_that_of_the_likelihood_under_exp() -> None:
    metrics = summary(windows()).metrics
    nll, perplexity = metrics["nll"].interval, metrics["perplexity"].interval
    assert nll is not None
    assert perplexity is not None
    assert (perplexity.low, perplexity.high) == pytest.approx((math.exp(nll.low), math.exp(nll.high)))


def test_the_baseline_has_no_comparison_with_itself() -> None:
    scores = windows()
    found = summary([score.of_reference() for score in scores], "baseline")
    assert set(found.metrics) == {"perplexity", "nll"}
    compressed = summary(scores).metrics
    change = compressed["nll"].value - found.metrics["nll"].value
    assert compressed["nll_change"].value == pytest.approx(change)
    assert set(summary(scores, "baseline").metrics) == {"perplexity", "nll"}


def test_intervals_stay_inside_what_the_metric_can_be() -> None:
    scores = [WindowScore(10, 20.0, 20.0, kl, agreed) for kl, agreed in ((0.0, 10), (0.001, 10), (5.0, 1))]
    metrics = summary(scores).metrics
    kl, top1 = metrics["kl"].interval, metrics["top1_agreement"].interval
    assert kl is not None
    assert top1 is not None
    assert kl.low == 0
    assert (top1.low, top1.high) == (0, 1)


def test_a_perplexity_too_large_for_a_float_is_infinite_and_not_an_error() -> None:
    assert summary([WindowScore(1, 1e4), WindowScore(1, 2e4)]).metrics["perplexity"].value == math.inf


def test_a_summary_needs_windows_and_a_reference_in_all_or_none() -> None:
    with pytest.raises(ValueError, match="windows"):
        summary([])
    with pytest.raises(ValueError, match="have no kl"):
        summary([*windows(2), WindowScore(5, 9.0)])
    with pytest.raises(ValueError, match="without a reference"):
        WindowScore(5, 9.0).of_reference()


def gated(value: float, low: float, high: float, better: metrics.Better) -> Quality:
    metric = Metric(
        value=value,
        interval=Interval(low=low, high=high),
        samples=9,
        unit="1",
        protocol="p",
        better=better,
    )
    return Quality(subject="compressed", where="torch", metrics={"kl": metric}, data_digest="d")


def test_a_gate_holds_the_worse_end_of_the_interval_against_the_bound() -> None:
    (lower,) = gates_met(gated(0.04, 0.03, 0.06, "lower"), {"kl": 0.05})
    assert (lower.name, lower.bound, lower.found, lower.met) == ("kl", 0.05, 0.06, False)
    (higher,) = gates_met(gated(0.95, 0.91, 0.99, "higher"), {"kl": 0.9})
    assert (higher.found, higher.met) == (0.91, True)
    assert gates_met(gated(0.04, 0.03, 0.06, "lower"), {"kl": 0.06})[0].met


def test_a_gate_on_a_single_window_compares_the_value() -> None:
    (gate,) = gates_met(summary(windows(1)), {"top1_agreement": 0.0})
    assert gate.met
    assert gates_met(summary(windows(1)), {}) == ()


def test_what_no_interval_bounds_is_said_and_so_is_a_gate_on_it() -> None:
    def judged(**metrics: tuple[Interval | None, int]) -> Quality:
        made = {
            name: Metric(value=0.1, interval=interval, samples=samples, unit="1", protocol="p", better="lower")
            for name, (interval, samples) in metrics.items()
        }
        return Quality(subject="compressed", where="ort", metrics=made, data_digest="")

    wide, none = Interval(low=0.0, high=0.2), Interval(low=0.1, high=0.1)
    assert not interval_notes(judged(kl=(wide, 9), kl_max=(None, 9), top1_agreement=(none, 9)), {"kl": 1.0})
    (few,) = interval_notes(judged(kl=(wide, 9), kl_p99=(None, 9)), {"kl": 1.0})
    assert few == "kl_p99 has no interval: 9 samples are too few to bound it"
    (same,) = interval_notes(judged(kl=(none, 9)), {"kl": 1.0})
    assert same == "the gate on kl was held against its value alone, which has an interval of no width"
    one, gate = interval_notes(judged(kl=(None, 1), kl_p99=(None, 1)), {"kl": 1.0})
    assert one == "every figure rests on one sample, so none has an interval: kl, kl_p99"
    assert gate == "the gate on kl was held against its value alone, which has no interval"


def test_a_gate_that_names_no_metric_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="Did you mean 'perplexity'"):
        gates_met(summary(windows()), {"perplexty": 20.0})


@pytest.mark.parametrize(
    ("name", "task", "told"),
    [
        ("kld", "causal-lm", "Did you mean 'kl'"),
        ("kl", "encoder", "for a model of kind encoder"),
        ("cosine", "causal-lm", "Allowed: .*kl, kl_max, .*perplexity"),
    ],
)
def test_a_gate_on_a_metric_that_the_model_will_not_have_is_refused_without_any_figures(
    name: str, task: str, told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        check_gates({name: 0.1}, task)


def test_every_metric_of_a_summary_may_be_gated_and_stands_in_the_order_of_the_table() -> None:
    vectors = np.random.default_rng(2).standard_normal((600, 4))
    embeddings = embedding_scores.summarize_embeddings(
        score_embeddings(vectors, vectors), "compressed", "torch", "p", "d"
    )
    for task, found in (("causal-lm", summary(windows())), ("encoder", embeddings)):
        assert list(found.metrics) == [name for name in METRICS[task] if name in found.metrics]
        assert {name for name, metric in found.metrics.items() if not metric.detail} == HEADLINE[task]
        check_gates(METRICS[task], task)
    assert list(embeddings.metrics) == list(METRICS["encoder"])


def test_a_gate_on_continued_prompts_that_are_switched_off_is_refused_before_the_work() -> None:
    check_gates({"greedy_agreement": 0.9, "kl": 0.1}, "causal-lm", generation=True)
    with pytest.raises(UsageError, match=r"quality\.generation=0"):
        check_gates({"greedy_agreement": 0.9}, "causal-lm", generation=False)
    check_gates({"kl": 0.1}, "causal-lm", generation=False)
