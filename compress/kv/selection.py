"""Which stored tokens a step attends to, and attention in parts: pure functions on tensors.

Shapes: batch rows, `heads` query heads, `kv` heads of keys and values with heads/kv query heads each, slots of stored
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor]
"""What attention to some tokens gives, (batch, heads, queries, size), and the logarithm of the sum of their
exponentials, (batch, heads, queries); both float32."""


def products(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """query (batch, heads, size), keys (batch, kv, slots, size) → (batch, heads, slots) float32, scaled."""
    batch, heads, size = query.shape
    grouped = query.reshape(batch, keys.shape[1], -1, size)
    return torch.matmul(grouped, keys.transpose(2, 3)).reshape(batch, heads, -1).float() * scaling


def votes(product: Tensor, candidates: Tensor) -> Tensor:
    """TokenSelect's soft vote (Wu et al. 2024, arXiv 2411.02886, §4.1): each head's softmax over the candidates,
    summed over heads, so that a head with large products does not outvote the others.

    Args: product (batch, heads, slots) float32; candidates (batch, slots) bool. Returns (batch, slots), 0 elsewhere.
    """
    hidden = ~candidates[:, None]
    shares = product.masked_fill(hidden, torch.finfo(product.dtype).min).softmax(-1).masked_fill(hidden, 0)
    return shares.sum(1)


def elected(vote: Tensor, candidates: Tensor, positions: Tensor, count: int, page: int = 1) -> Tensor:
    """The `count` candidates with most votes, or those of the count/page pages of tokens side by side, (batch, slots)
    bool; all of them where there are no more.

    Args: vote (batch, slots) at least 0; candidates (batch, slots) bool; positions (batch, slots) int64, of which
    position // page is the page.
    """
    if page == 1:
        return _top(vote, candidates, count)
    numbers = positions.clamp(min=0) // page
    size = len(vote), int(numbers.max()) + 1
    sums = vote.new_zeros(size).scatter_add(1, numbers, vote.masked_fill(~candidates, 0))
    held = vote.new_zeros(size).scatter_add(1, numbers, candidates.to(vote.dtype)) > 0
    is_short = candidates.sum(1, keepdim=True) <= count  # fewer tokens may lie in more pages
    return (_top(sums, held, count // page).gather(1, numbers) | is_short) & candidates


def _top(scores: Tensor, candidates: Tensor, count: int) -> Tensor:
    ranked = scores.masked_fill(~candidates, -1)
    best = ranked.topk(min(count, ranked.shape[-1]), sorted=False).indices
    return torch.zeros_like(candidates).scatter(-1, best, True) & candidates


def places(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Where a mask is set: (batch, slots) bool → slots in their order (batch, most) int64, and which of these count
    (batch, most) bool, since rows may have fewer."""
    order, counts = chosen.cumsum(1) - 1, chosen.sum(1)
    most = int(counts.max())
    every = torch.arange(chosen.shape[1], device=chosen.device).expand_as(order)
    index = order.new_zeros(len(chosen), most + 1).scatter(1, torch.where(chosen, order, most), every)
    return index[:, :most], every[:, :most] < counts[:, None]


def part(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scaling: float) -> Part:
    """Attention to some tokens. query (batch, heads, queries, size); keys, values (batch, heads, slots, size); seen, of
    a shape that goes with (batch, heads, queries, slots), bool."""
    product = torch.matmul(query, keys.transpose(2, 3)).float() * scaling
    product = product.masked_fill(~seen, torch.finfo(product.dtype).min)
    total = product.logsumexp(-1)
    return torch.matmul((product - total[..., None]).exp(), values.float()), total


def merged(parts: Sequence[Part]) -> Tensor:
    """Attention to all tokens of disjoint parts (RetrievalAttention, Liu et al. 2024, arXiv 2409.10516, eq. 4):
    (batch, heads, queries, size) float32."""
    shares = torch.stack([total for _, total in parts]).softmax(0)
    return (torch.stack([output for output, _ in parts]) * shares[..., None]).sum(0)
