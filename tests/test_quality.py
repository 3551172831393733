"""Quality figures against slow twins with loops, gates at the worse end of the interval, guards."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from compress import embedding_scores, quality, token_scores
from compress.errors import UsageError
from compress.metrics import HEADLINE
from compress.quality import (
    METRICS,
    WindowScore,
    check_gates,
    gates_met,
    mean_pool,
    score_embeddings,
    score_window,
    summarize,
)
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


def summary(scores: list[WindowScore], subject: quality.Subject = "compressed") -> Quality:
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


def test_mean_pooling_leaves_padding_out() -> None:
    hidden = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    rows = zip(hidden.double().numpy(), (2, 4, 1), strict=True)
    twin = np.stack([states[:length].mean(axis=0) for states, length in rows])
    assert mean_pool(hidden, mask) == pytest.approx(twin)
    assert mean_pool(hidden.numpy()) == pytest.approx(hidden.double().numpy().mean(axis=1))
    with pytest.raises(ValueError, match="mask"):
        mean_pool(hidden, 0 * mask)
    with pytest.raises(ValueError, match="positions"):
        mean_pool(hidden[0])


def test_embeddings_are_compared_as_a_twin_with_loops_compares_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((25, 6))
    outputs = reference + 0.6 * rng.standard_normal((25, 6))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / math.sqrt((a @ a) * (b @ b)))

    def neighbour(vectors: np.ndarray, i: int) -> int:
        return max((j for j in range(25) if j != i), key=lambda j: cosine(vectors[i], vectors[j]))

    monkeypatch.setattr(embedding_scores, "CHUNK_ROWS", 8)
    scores = score_embeddings(torch.from_numpy(reference), outputs)

    assert scores.cosines == pytest.approx(np.array([cosine(a, b) for a, b in zip(reference, outputs, strict=True)]))
    agreed = [neighbour(reference, i) == neighbour(outputs, i) for i in range(25)]
    assert scores.agreed.tolist() == agreed
    assert 0 < sum(agreed) < 25


def test_the_embedding_summary_has_both_means_with_intervals() -> None:
    rng = np.random.default_rng(1)
    reference = rng.standard_normal((40, 8))
    scores = score_embeddings(reference, reference + 0.5 * rng.standard_normal((40, 8)))
    found = quality.summarize_embeddings(scores, "compressed", "onnxruntime", "cosine/mean-pool", "sha256:1")
    cosine, neighbours = found.metrics["cosine"], found.metrics["nearest_neighbour_agreement"]
    assert cosine.value == pytest.approx(scores.cosines.mean())
    assert neighbours.value == pytest.approx(scores.agreed.mean())
    for metric in (cosine, neighbours):
        assert metric.better == "higher"
        assert metric.samples == 40
        assert metric.interval is not None
        assert metric.interval.low < metric.value < metric.interval.high <= 1


def test_a_zero_vector_is_like_nothing_and_a_nan_agrees_with_nothing() -> None:
    reference = np.eye(4)
    outputs = reference.copy()
    outputs[0] = 0
    outputs[1] = math.nan
    scores = score_embeddings(reference, outputs)
    assert scores.cosines[0] == 0
    assert math.isnan(scores.cosines[1])
    assert not scores.agreed[1]


@pytest.mark.parametrize(("old", "new"), [((4, 3), (4, 2)), ((2, 3), (2, 3)), ((4, 2, 3), (4, 2, 3))])
def test_embeddings_of_other_shapes_or_too_few_are_refused(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 3 samples"):
        score_embeddings(np.ones(old), np.ones(new))


def gated(value: float, low: float, high: float, better: quality.Better) -> Quality:
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
    embeddings = quality.summarize_embeddings(score_embeddings(vectors, vectors), "compressed", "torch", "p", "d")
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


def noisy_vectors(samples: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    reference = rng.standard_normal((samples, 6))
    return reference, reference + 0.5 * rng.standard_normal((samples, 6))


def test_neighbours_found_again_and_similarities_in_the_same_order_are_what_loops_give() -> None:
    reference, outputs = noisy_vectors()

    def similarities(vectors: np.ndarray) -> np.ndarray:
        return np.array([[a @ b / math.sqrt((a @ a) * (b @ b)) for b in vectors] for a in vectors])

    old, new = similarities(reference), similarities(outputs)
    pairs = [(i, j) for i in range(40) for j in range(i)]
    ranks = [[sorted(matrix[pair] for pair in pairs).index(matrix[one]) for one in pairs] for matrix in (old, new)]
    shared = []
    for i in range(40):
        others = [j for j in range(40) if j != i]
        near = [set(sorted(others, key=lambda j, row=matrix[i]: -row[j])[:10]) for matrix in (old, new)]
        shared.append(len(near[0] & near[1]) / 10)
    scores = score_embeddings(reference, outputs)
    found = quality.summarize_embeddings(scores, "compressed", "torch", "p", "d").metrics
    assert found["recall_at_10"].value == pytest.approx(np.mean(shared), abs=1e-9)
    assert found["similarity_spearman"].value == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)
    assert found["cosine_min"].value == pytest.approx(min(np.diag(similarity(reference, outputs))), abs=1e-9)
    interval = found["similarity_spearman"].interval
    assert interval and interval.low < found["similarity_spearman"].value < interval.high <= 1


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first @ second.T / np.linalg.norm(first, axis=1)[:, None] / np.linalg.norm(second, axis=1)


def test_the_first_percentile_of_cosines_is_given_of_five_hundred_texts_and_told_of_fewer() -> None:
    few = quality.summarize_embeddings(score_embeddings(*noisy_vectors(15)), "compressed", "torch", "p", "d")
    assert "cosine_p1" not in few.metrics and "recall_at_10" not in few.metrics
    assert "15 samples, and 500 are needed" in few.notes[0] and "21 are needed" in few.notes[1]
    vectors = noisy_vectors(500)
    many = quality.summarize_embeddings(score_embeddings(*vectors), "compressed", "torch", "p", "d").metrics
    assert many["cosine_p1"].value == pytest.approx(np.quantile(np.diag(similarity(*vectors)), 0.01), abs=1e-9)
    assert many["cosine_min"].value <= many["cosine_p1"].value <= many["cosine"].value


def test_the_interval_of_a_rank_correlation_covers_that_of_many_texts() -> None:
    rng, inside = np.random.default_rng(5), 0

    def drawn(samples: int) -> tuple[np.ndarray, np.ndarray]:
        reference = rng.standard_normal((samples, 6))
        return reference, reference + 0.5 * rng.standard_normal((samples, 6))

    truth = score_embeddings(*drawn(512)).spearman
    assert truth is not None
    for _ in range(60):
        found = score_embeddings(*drawn(40)).spearman
        assert found is not None and found[1] is not None
        inside += found[1].low <= truth[0] <= found[1].high
    assert inside / 60 > 0.85
