"""Weighted k-means of short vectors: pure functions on tensors.

Every coordinate of every vector has a weight of its own; error(x, c) = Σ_t w_t (x_t − c_t)². Where a vector's weights
are all alike, its distances cost half as much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.errors import InputError
from compress.maths import products

# distances held at a time: few enough to stay in the cache
CHUNK = 1 << 20
# vectors that the steps look at, for each centroid
SAMPLES = 256
# seeds drawn from each other's remaining errors, in so many rounds at most
ROUNDS = 64
STEPS = 30
# a step that gains less than this share of the error is the last
TOLERANCE = 1e-3


def learn(vectors: Tensor, weights: Tensor, entries: int, seed: int, steps: int = STEPS) -> Tensor:
    """Centroids (entries, d) float32 of least weighted squared error, as far as Lloyd's steps from k-means++ seeds go.

    Seeds are drawn in rounds, each with the probabilities that the rounds before left (Bahmani et al. 2012,
    arXiv 1203.6402, with just as many draws as centroids), so that they cost as much as one step. The steps look at
    `SAMPLES` vectors for each centroid, drawn once. A centroid that no vector is nearest to moves to the vector of the
    largest error. No more vectors than centroids: the vectors themselves, then zeros.

    Args: vectors (n, d) float32; weights (n, d) or (n, 1) float32 ≥ 0. The same seed gives the same result.
    Raises: InputError for vectors or weights that are NaN or infinite.
    """
    if not products.all_finite(vectors) or not products.all_finite(weights):
        raise InputError("Weights, or the input statistics that weigh them, hold NaN or infinite values.")
    count, width = vectors.shape
    if count <= entries:
        return torch.cat([vectors, vectors.new_zeros(entries - count, width)])
    maker = torch.Generator().manual_seed(seed)
    if count > SAMPLES * entries:
        kept = torch.randperm(count, generator=maker)[: SAMPLES * entries]
        vectors, weights = vectors[kept], weights[kept]
    weights = _narrow(weights)
    if not bool(weights.any()):
        weights = torch.ones_like(weights)
    found = _seeds(vectors, weights, entries, maker)
    last = torch.inf
    for _ in range(steps):
        codes, errors = nearest(vectors, weights, found)
        total = float(errors.sum(dtype=torch.float64))
        if total >= last * (1 - TOLERANCE):
            break
        found, last = _means(vectors, weights, codes, errors, found), total
    return found


def nearest(vectors: Tensor, weights: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Code (n,) int64 of the centroid of least weighted error, the lowest of several, and that error (n,).

    Args: vectors (n, d), centroids (entries, d) float32; weights (n, d) or (n, 1) float32 ≥ 0.
    """
    rows = max(1, CHUNK // len(centroids))
    narrow = _narrow(weights)
    parts = zip(torch.split(vectors, rows), torch.split(narrow, rows), strict=True)
    found = [_errors(part, own, centroids).min(1) for part, own in parts]
    base = (narrow * vectors.square()).sum(1)
    errors = torch.cat([least for least, _ in found])
    if narrow.shape[1] == 1:
        errors = errors * narrow[:, 0]
    return torch.cat([codes for _, codes in found]), (errors + base).clamp_(min=0.0)


def _narrow(weights: Tensor) -> Tensor:
    """(n, 1) where the weights of each vector are all alike."""
    return weights[:, :1] if bool((weights == weights[:, :1]).all()) else weights


def _errors(vectors: Tensor, weights: Tensor, centroids: Tensor) -> Tensor:
    """(n, entries): the weighted error less that of a centroid of zeros; divided by the weight where that is one."""
    squares = centroids.square()
    if weights.shape[1] == 1:
        return torch.addmm(squares.sum(1), vectors, centroids.T, alpha=-2)
    return torch.cat([weights * vectors, weights], 1) @ torch.cat([centroids * -2, squares], 1).T


def _seeds(vectors: Tensor, weights: Tensor, entries: int, maker: torch.Generator) -> Tensor:
    """(entries, d): vectors drawn by what the ones drawn before leave of their error."""
    found = vectors[_draw(weights.sum(1), 1, maker)]
    _, errors = nearest(vectors, weights, found)
    rounds = min(ROUNDS, entries - 1)
    for turn in range(rounds):
        wanted = (entries - len(found)) // (rounds - turn)
        new = vectors[_draw(errors, wanted, maker)]
        errors = torch.minimum(errors, nearest(vectors, weights, new)[1])
        found = torch.cat([found, new])
    return found


def _draw(chances: Tensor, count: int, maker: torch.Generator) -> Tensor:
    """(count,) int64 places, by their chances; of places without any only where too few are left."""
    # the largest of log(u) / p are a draw without replacement (Efraimidis and Spirakis 2006), and know no upper limit
    # of places, as torch.multinomial does
    keys = torch.rand(len(chances), generator=maker, dtype=torch.float64).log_() / chances.double()
    return keys.nan_to_num_(neginf=torch.finfo(torch.float64).min).topk(count).indices


def _means(vectors: Tensor, weights: Tensor, codes: Tensor, errors: Tensor, before: Tensor) -> Tensor:
    """(entries, d): the weighted means of the vectors of each centroid."""
    shape = (len(before), weights.shape[1])
    total = torch.zeros(shape).index_add_(0, codes, weights)
    means = torch.zeros_like(before).index_add_(0, codes, weights * vectors).div_(total)
    means = torch.where(total > 0, means, before)
    empty = (torch.bincount(codes, minlength=len(before)) == 0).nonzero()[:, 0]
    if len(empty):
        means[empty] = vectors[errors.topk(min(len(empty), len(errors))).indices]
    return means
