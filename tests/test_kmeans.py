"""k-means of weighted vectors, against the plain formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.errors import InputError
from compress.maths import kmeans


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_errors(vectors: Tensor, weights: Tensor, centroids: Tensor) -> Tensor:
    """(n, entries), one pair at a time."""
    wide = weights.expand_as(vectors)
    rows = [[float((w * (x - c) ** 2).sum()) for c in centroids] for x, w in zip(vectors, wide, strict=True)]
    return torch.tensor(rows)


@pytest.mark.parametrize("width", [1, 3])
def test_the_nearest_centroid_is_that_of_least_weighted_error(width: int) -> None:
    vectors, weights, centroids = drawn(40, 3), drawn(40, width, seed=1).abs(), drawn(7, 3, seed=2)
    errors = slow_errors(vectors, weights, centroids)
    codes, least = kmeans.nearest(vectors, weights, centroids)
    assert codes.tolist() == errors.argmin(1).tolist()
    assert torch.allclose(least, errors.min(1).values, atol=1e-5)


def test_distances_are_taken_in_parts_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, weights, centroids = drawn(50, 2), drawn(50, 2, seed=1).abs(), drawn(4, 2, seed=2)
    whole = kmeans.nearest(vectors, weights, centroids)
    monkeypatch.setattr(kmeans, "CHUNK", 12)
    parts = kmeans.nearest(vectors, weights, centroids)
    assert torch.equal(whole[0], parts[0]) and torch.allclose(whole[1], parts[1])


@pytest.mark.parametrize("width", [1, 2])
def test_each_centroid_ends_as_the_weighted_mean_of_its_vectors(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "TOLERANCE", 0.0)
    vectors, weights = drawn(300, 2), drawn(300, width, seed=1).abs() + 0.1
    found = kmeans.learn(vectors, weights, 8, seed=0, steps=200)
    codes, _ = kmeans.nearest(vectors, weights, found)
    for place, centroid in enumerate(found):
        own, counts = vectors[codes == place], weights[codes == place].expand(-1, 2)
        assert len(own) and torch.allclose(centroid, (own * counts).sum(0) / counts.sum(0), atol=1e-4)


def test_more_steps_never_do_worse() -> None:
    vectors, weights = drawn(2000, 4), drawn(2000, 4, seed=1).square()
    errors = [
        float(kmeans.nearest(vectors, weights, kmeans.learn(vectors, weights, 16, 0, steps))[1].sum())
        for steps in (0, 1, 4, 30)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]


def test_clusters_far_apart_are_all_found() -> None:
    """Seeds drawn without regard to what is left over miss some of them almost always."""
    middles = drawn(20, 2, seed=3) * 1000
    vectors = (middles[:, None] + drawn(20, 50, 2, seed=4)).reshape(-1, 2)
    found = kmeans.learn(vectors, torch.ones(1000, 1), 20, seed=0)
    assert float(kmeans.nearest(vectors, torch.ones(1000, 1), found)[1].mean()) < 3


def test_a_centroid_without_vectors_moves_to_the_largest_error() -> None:
    vectors = torch.tensor([[0.0], [0.1], [10.0], [30.0]])
    before = torch.tensor([[0.0], [500.0]])
    codes, errors = kmeans.nearest(vectors, torch.ones(4, 1), before)
    assert kmeans._means(vectors, torch.ones(4, 1), codes, errors, before).tolist()[1] == [30.0]


def test_no_more_vectors_than_centroids_are_kept_as_they_are() -> None:
    vectors = drawn(3, 2)
    found = kmeans.learn(vectors, torch.ones(3, 1), 8, seed=0)
    assert torch.equal(found[:3], vectors) and not found[3:].any()


def test_fewer_distinct_vectors_than_centroids_are_all_held_exactly() -> None:
    vectors = drawn(3, 2).repeat(20, 1)
    found = kmeans.learn(vectors, torch.ones(60, 1), 8, seed=0)
    assert float(kmeans.nearest(vectors, torch.ones(60, 1), found)[1].max()) < 1e-6


def test_vectors_that_count_nothing_are_still_learned_from() -> None:
    vectors = drawn(100, 2)
    found = kmeans.learn(vectors, torch.zeros(100, 2), 4, seed=0)
    assert bool(torch.isfinite(found).all()) and len(found.unique(dim=0)) == 4


def test_the_same_seed_gives_the_same_bytes() -> None:
    vectors, weights = drawn(5000, 3), drawn(5000, 3, seed=1).abs()
    first, again, other = (kmeans.learn(vectors, weights, 8, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(which: int, value: float) -> None:
    given = [drawn(50, 2), torch.ones(50, 2)]
    given[which][7, 1] = value
    with pytest.raises(InputError, match="NaN or infinite"):
        kmeans.learn(given[0], given[1], 4, seed=0)
