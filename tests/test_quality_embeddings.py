"""Quality of an encoder: pooled vectors compared, each figure against a twin with loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from compress.quality import embedding_scores
from compress.quality.embedding_scores import mean_pool, score_embeddings


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
    found = embedding_scores.summarize_embeddings(scores, "compressed", "onnxruntime", "cosine/mean-pool", "sha256:1")
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
    found = embedding_scores.summarize_embeddings(scores, "compressed", "torch", "p", "d").metrics
    assert found["recall_at_10"].value == pytest.approx(np.mean(shared), abs=1e-9)
    assert found["similarity_spearman"].value == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)
    assert found["cosine_min"].value == pytest.approx(min(np.diag(similarity(reference, outputs))), abs=1e-9)
    interval = found["similarity_spearman"].interval
    assert interval and interval.low < found["similarity_spearman"].value < interval.high <= 1


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first @ second.T / np.linalg.norm(first, axis=1)[:, None] / np.linalg.norm(second, axis=1)


def test_the_first_percentile_of_cosines_is_given_of_five_hundred_texts_and_told_of_fewer() -> None:
    few = embedding_scores.summarize_embeddings(score_embeddings(*noisy_vectors(15)), "compressed", "torch", "p", "d")
    assert "cosine_p1" not in few.metrics and "recall_at_10" not in few.metrics
    assert "15 samples, and 500 are needed" in few.notes[0] and "21 are needed" in few.notes[1]
    vectors = noisy_vectors(500)
    many = embedding_scores.summarize_embeddings(score_embeddings(*vectors), "compressed", "torch", "p", "d").metrics
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
