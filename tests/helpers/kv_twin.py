"""A slow twin of caches that drop tokens: plain tensors and Python loops, one row at a time. Keys of all tokens stay,
and what was dropped gets no weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from compress.kv.spec import KvSpec


@dataclass
class Head:
    """One key-value head of one layer: by position, all that was ever met; held: what is still there."""

    held: list[int] = field(default_factory=list)
    score: dict[int, float] = field(default_factory=dict)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    plain: list[list[Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Seen:
    """One call at one head. weights: by query head of the group and query, the share of each position; ahead: the mean
    rotation to the next 512 positions, (size, size)."""

    new: list[int]
    weights: list[list[dict[int, float]]]
    ahead: Tensor
    scaling: float


Judge = Callable[[KvSpec, Head, Seen], None]


@torch.no_grad()
def twin(model: Any, ids: Tensor, specs: list[KvSpec], pieces: list[int]) -> tuple[Tensor, list[list[Head]]]:
    """Logits (n, vocabulary) of one row of token ids (n,), in calls of so many each, and the heads of each layer."""
    config = model.config
    groups = config.num_attention_heads // config.num_key_value_heads
    layers = [[Head() for _ in range(config.num_key_value_heads)] for _ in model.model.layers]
    logits = []

    def turned(states: Tensor, position: int) -> Tensor:
        cos, sin = model.model.rotary_emb(states[None, None], torch.tensor([[position]]))
        half = states.shape[-1] // 2
        return states * cos[0, 0] + torch.cat([-states[..., half:], states[..., :half]], -1) * sin[0, 0]

    for at, count in zip(accumulate(pieces, initial=0), pieces, strict=False):
        new = list(range(at, at + count))
        hidden = model.model.embed_tokens(ids[new])
        ahead = mean_rotation(model, new[-1]) if any(spec.scorer == "expected" for spec in specs) else torch.zeros(())
        for block, heads, spec in zip(model.model.layers, layers, specs, strict=True):
            attend, normed = block.self_attn, block.input_layernorm(hidden)
            size = attend.head_dim
            q, k, v = (each(normed).view(len(new), -1, size) for each in (attend.q_proj, attend.k_proj, attend.v_proj))
            out = torch.zeros(len(new), config.num_attention_heads, size)
            for number, head in enumerate(heads):
                head.keys += [turned(k[i, number], position) for i, position in enumerate(new)]
                head.values += list(v[:, number])
                members = range(number * groups, (number + 1) * groups)
                head.plain += [[q[i, member] for member in members] for i in range(len(new))]
                weights: list[list[dict[int, float]]] = []
                for member in members:
                    weights.append([])
                    for i, position in enumerate(new):
                        seen = head.held + new[: i + 1]
                        near = torch.stack([head.keys[j] for j in seen])
                        share = (near @ turned(q[i, member], position) * size**-0.5).softmax(0)
                        out[i, member] = share @ torch.stack([head.values[j] for j in seen])
                        weights[-1].append(dict(zip(seen, share.tolist(), strict=True)))
                head.held += new
                head.score |= dict.fromkeys(new, 0.0)
                JUDGES[spec.scorer](spec, head, Seen(new, weights, ahead, size**-0.5))
            drop(spec, heads, new[-1])
            hidden = hidden + attend.o_proj(out.flatten(1))
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        logits.append(model.lm_head(model.model.norm(hidden)))
    return torch.cat(logits), layers


def mean_rotation(model: Any, now: int) -> Tensor:
    """Of the next 512 positions, (size, size) float64."""
    square = torch.eye(model.model.layers[0].self_attn.head_dim)
    cos, sin = model.model.rotary_emb(square, torch.arange(now + 1, now + 513)[None])
    half = len(square) // 2
    other = torch.cat([-square[:, half:], square[:, :half]], -1)
    # row i of an identity, turned: column i of the matrix
    turned = square[:, None] * cos + other[:, None] * sin
    return turned.double().mean(1).T


def drop(spec: KvSpec, heads: list[Head], now: int) -> None:
    """What is over the budget goes, the least important first."""

    def free(head: Head) -> list[int]:
        return sorted((j for j in head.held if spec.sinks <= j <= now - spec.recent), key=lambda j: (head.score[j], j))

    if spec.heads == "even":
        for head in heads:
            for victim in free(head)[: max(len(head.held) - spec.budget, 0)]:
                head.held.remove(victim)
        return
    for _ in range(sum(len(head.held) for head in heads) - spec.budget * len(heads)):
        may = [head for head in heads if len(head.held) > math.ceil(spec.floor * spec.budget) and free(head)]
        worst = min(may, key=lambda head: head.score[free(head)[0]])
        worst.held.remove(free(worst)[0])


def by_norm(spec: KvSpec, head: Head, seen: Seen) -> None:
    for j in seen.new:
        head.score[j] = -float(head.keys[j].norm())


def by_sum(spec: KvSpec, head: Head, seen: Seen) -> None:
    for member in seen.weights:
        for query in member:
            for j, share in query.items():
                head.score[j] += share


def by_window(spec: KvSpec, head: Head, seen: Seen) -> None:
    now, first = seen.new[-1], seen.new[0]
    queries = [i for i, j in enumerate(seen.new) if j > now - spec.window]
    mean = {}
    for j in head.held:
        shares = [member[i][j] for member in seen.weights for i in queries if j in member[i]]
        mean[j] = sum(shares) / len(shares)
    share = len(queries) / spec.window
    for j in head.held:
        around = [i for i in head.held if abs(i - j) <= spec.pool // 2]
        near = [i for i in around if (i > now - spec.window) == (j > now - spec.window)]
        found = sum(mean[i] for i in near) / len(near)
        head.score[j] = found if j >= first else head.score[j] * (1 - share) + found * share


def by_expectation(spec: KvSpec, head: Head, seen: Seen) -> None:
    now = seen.new[-1]
    if len(seen.new) == 1 and (now + 1) % spec.interval:
        return
    total = dict.fromkeys(head.held, 0.0)
    turn = seen.ahead
    for member in range(len(head.plain[0])):
        queries = torch.stack([each[member] for each in head.plain]).double()
        mean, spread = turn @ queries.mean(0), turn @ torch.cov(queries.T, correction=0) @ turn.T
        worth = {}
        for j in head.held:
            key = head.keys[j].double()
            worth[j] = math.exp(float(key @ mean) * seen.scaling + float(key @ spread @ key) * seen.scaling**2 / 2)
        for j in head.held:
            total[j] += worth[j] / sum(worth.values()) / len(head.plain[0])
    for j in head.held:
        head.score[j] = total[j] * float(head.values[j].norm())


def by_difference(spec: KvSpec, head: Head, seen: Seen) -> None:
    units = {j: head.keys[j].double() / head.keys[j].double().norm() for j in head.held}
    mean = sum(units.values(), torch.zeros_like(units[head.held[0]])) / len(units)
    for j in head.held:
        head.score[j] = -float(units[j] @ mean / mean.norm())


JUDGES: dict[str, Judge] = {
    "key_norm": by_norm,
    "h2o": by_sum,
    "snapkv": by_window,
    "expected": by_expectation,
    "key_diff": by_difference,
}
