"""SnapKV's score: how much the newest queries read of a token and of its neighbours (Li et al. 2024, arXiv 2404.14469).

There it is taken once, at the end of a prompt that is read in one call. Here it goes on: it is the mean over the last
`window` queries, whatever calls they came in. Of a call with fewer of them, those before count for the rest of the
window with the mean that they had. So pieces of a prompt, a short last piece and tokens that come one by one all have
the score of the same rule, and generated tokens compete with those of the prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.kv.spec import KvSpec


def read(
    spec: KvSpec, scores: Tensor, probabilities: Tensor, asked: Tensor, positions: Tensor, valid: Tensor
) -> Tensor:
    """Scores (batch, kv heads, slots) float32 after a call: the mean share of attention, over the query heads of a
    group and the queries of the window that see the token, averaged over the `pool` positions around it.

    Args: scores: before it, 0 for the new tokens; probabilities (batch, heads, n, slots) after the softmax; asked
    (batch, n) which queries are no padding; positions, valid (batch, kv heads, slots), the new tokens among them.
    """
    batch, _, count, slots = probabilities.shape
    heads = scores.shape[1]
    later = asked.flip(1).cumsum(1).flip(1)
    taken = asked & (later <= spec.window)
    size, fresh = taken.sum(1)[:, None, None], asked.sum(1)[:, None, None]
    now = positions.masked_fill(~valid, -1).amax((1, 2))[:, None, None]
    grouped = probabilities.float().reshape(batch, heads, -1, count, slots).mean(2)
    sums = torch.einsum("bhqs,bq->bhs", grouped, taken.float())
    means = sums / torch.minimum(size, now - positions + 1).clamp(min=1)
    found = pooled(means, positions, valid, now - spec.window, spec.pool)
    share = size / spec.window
    is_new = positions > now - fresh
    return torch.where(is_new, found, scores * (1 - share) + found * share).masked_fill(~valid, 0)


def pooled(scores: Tensor, positions: Tensor, valid: Tensor, before: Tensor, pool: int) -> Tensor:
    """The mean over the tokens that are held within pool // 2 positions, (batch, heads, slots).

    Those after position `before`, the window's own, and those up to it are averaged apart: of the window's own, tokens
    just before it would get what queries read of themselves and their neighbours. What is not valid counts for nothing.
    """
    far = torch.where(valid, positions, torch.full_like(positions, -(2**40)))
    order = far.argsort(dim=-1, stable=True)
    place, value, there = (each.gather(-1, order) for each in (far, scores, valid))
    total, number = torch.zeros_like(value), torch.zeros_like(value)
    own, slots = place > before, scores.shape[-1]
    reach = min(pool // 2, slots - 1)
    # sorted, a neighbour is no farther in slots than in positions; always from the first to the last, so that tokens
    # with the same neighbours have the same mean to the last bit, and the older goes
    for away in range(-reach, reach + 1):
        mine = slice(max(-away, 0), slots - max(away, 0))
        other = slice(max(away, 0), slots - max(-away, 0))
        near = (place[..., other] - place[..., mine]).abs() <= pool // 2
        near &= (own[..., other] == own[..., mine]) & there[..., other] & there[..., mine]
        total[..., mine] += value[..., other] * near
        number[..., mine] += near
    return torch.empty_like(total).scatter_(-1, order, total / number.clamp(min=1))
