"""Scored windows, and every figure of them by loops: independent of compress.quality.fidelity."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import optimize
from scipy import stats as distributions

from compress.quality.calibration_error import Halves
from compress.quality.token_quality import Source, summarize_tokens
from compress.quality.token_scores import TokenScores, score_tokens
from compress.records.quality import Quality

WORDS = 19
LENGTHS = (120, 97, 130, 64, 101, 118)
SOURCE = Source("torch", "ppl/disjoint-131", "sha256:0")
Window = tuple[np.ndarray, np.ndarray, np.ndarray]


def window(seed: int, tokens: int = 40, words: int = WORDS) -> Window:
    """Logits of the original and the compressed model, (tokens, words), and targets that the original half knows."""
    maker = np.random.default_rng(seed)
    reference = 2.5 * maker.standard_normal((tokens, words))
    other = 1.3 * reference + 0.9 * maker.standard_normal((tokens, words))
    guesses, drawn = reference.argmax(1), maker.integers(0, words, tokens)
    return reference, other, np.where(maker.random(tokens) < 0.5, guesses, drawn)


def scored(data: list[Window]) -> list[TokenScores]:
    return [score_tokens(*each) for each in data]


def judged(data: list[Window]) -> Quality:
    halves = Halves(len(data))
    for place in halves.order:
        halves.see(place, *(torch.from_numpy(each) for each in data[place]))
    return summarize_tokens(scored(data), "compressed", SOURCE, halves.fitted())


def probabilities(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


class Twin:
    """One dictionary per token, window by window."""

    def __init__(self, data: list[Window]) -> None:
        self.windows = [[self.token(*row) for row in zip(*each, strict=True)] for each in data]
        self.tokens = [token for rows in self.windows for token in rows]

    @staticmethod
    def token(reference: np.ndarray, other: np.ndarray, target: int) -> dict[str, float]:
        p, q = probabilities(reference), probabilities(other)
        first, second = np.argsort(-p), np.argsort(-q)
        return {
            "kl": sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)),
            "nll": -math.log(q[target]),
            "reference_nll": -math.log(p[target]),
            "overlap": len(set(first[:5]) & set(second[:5])) / 5,
            "change": q[target] - p[target],
            "entropy": -sum(a * math.log(a) for a in q) + sum(a * math.log(a) for a in p),
            "right": float(second[0] == target),
            "reference_right": float(first[0] == target),
            "agreed": float(first[0] == second[0]),
            "confidence": max(q),
            "reference_confidence": max(p),
        }

    def mean(self, name: str) -> float:
        return sum(token[name] for token in self.tokens) / len(self.tokens)

    def interval(self, name: str) -> tuple[float, float]:
        """Cochran's ratio estimator with windows as clusters."""
        mean, windows, count = self.mean(name), self.windows, len(self.tokens)
        squares = sum(sum(token[name] - mean for token in rows) ** 2 for rows in windows)
        error = math.sqrt(len(windows) / (len(windows) - 1) * squares) / count
        half = distributions.t.ppf(0.975, len(windows) - 1) * error
        return mean - half, mean + half

    def quantile(self, share: float) -> float:
        ordered = sorted(token["kl"] for token in self.tokens)
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def twin_ece(confidence: list[float], right: list[float], bins: int = 15) -> float:
    """Naeini's, with bins of equal mass: |mean confidence - accuracy| weighted by the bin's share."""
    order = sorted(range(len(confidence)), key=lambda place: confidence[place])
    total = 0.0
    for one in range(bins):
        inside = [at for rank, at in enumerate(order) if rank * bins // len(order) == one]
        if inside:
            gap = sum(confidence[at] for at in inside) / len(inside) - sum(right[at] for at in inside) / len(inside)
            total += len(inside) / len(order) * abs(gap)
    return total


def twin_temperature(data: list[Window], arm: int) -> float:
    """Least loss over the windows of even number, by another optimizer."""

    def loss(log_temperature: float) -> float:
        return sum(
            -math.log(probabilities(row / math.exp(log_temperature))[target])
            for each in data[::2]
            for row, target in zip(each[arm], each[2], strict=True)
        )

    return math.exp(optimize.minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-12}).x)
