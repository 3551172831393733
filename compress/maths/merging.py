"""Experts averaged into those that stay, weighed by the tokens of each. Pure functions on tensors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def merged(weights: Mapping[int, Tensor], kept: Tensor, tokens: Tensor) -> tuple[dict[int, Tensor], dict[int, int]]:
    """Experts averaged into those that stay.

    Args: weights: all of an expert's weights in one row, float32, by its number; kept (n,) int64; tokens (experts,).
    Returns: the rows of those that stay, and where each of the others went.
    """
    stay = kept.tolist()
    unit = {expert: row / row.norm().clamp(min=1e-30) for expert, row in weights.items()}
    totals = {expert: weights[expert].double() * float(tokens[expert]) for expert in stay}
    counts = {expert: float(tokens[expert]) for expert in stay}
    went = {}
    for expert in sorted(set(weights) - set(stay)):
        near = max(stay, key=lambda other: float(unit[expert] @ unit[other]))
        went[expert] = near
        totals[near] += weights[expert].double() * float(tokens[expert])
        counts[near] += float(tokens[expert])
    return {
        expert: (totals[expert] / counts[expert]).float() if counts[expert] else weights[expert] for expert in stay
    }, went


def averaged(values: Tensor, went: Mapping[int, int], tokens: Tensor) -> Tensor:
    """What `merged` does to the weights, done to their biases (experts, n). went: where each that goes went."""
    result = values.clone()
    for near in set(went.values()):
        members = [near, *(expert for expert, other in went.items() if other == near)]
        if total := float(tokens[members].sum()):
            share = tokens[members].to(values.device)[:, None] / total
            result[near] = (values[members].double() * share).sum(0).to(values.dtype)
    return result
