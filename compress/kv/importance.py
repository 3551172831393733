"""What tokens are worth to later queries, read off a model's own attention: what heads are trained and judged by.

Later queries are the last quarter of a window. The tokens are those before them, without the first `sinks`, which are
never dropped, and the `recent` just before the first of these queries, which are too near to be dropped by then.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compress.errors import UnsupportedError, UsageError
from compress.kv.observed import Attended

_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
SHARE = 4
"""One in so many tokens of a window is a later query."""


def judged(length: int, sinks: int, recent: int) -> slice:
    """Which tokens of a window later queries judge. Raises: UsageError for a window in which there are too few."""
    end = length - length // SHARE - recent
    if end - sinks < 2:
        raise UsageError(
            f"Windows of {length} tokens leave {max(end - sinks, 0)} to learn from: the last quarter asks, {sinks} "
            f"first (sinks) and {recent} newest tokens (recent) always stay. Give a larger --length, or less of these."
        )
    return slice(sinks, end)


def largest_logits(seen: Attended, tokens: slice) -> Tensor:
    """The label of Locret (arXiv 2410.01805): the largest scaled product with a later query, before the softmax, over
    these and the heads of a group. Returns: (batch, kv heads, tokens) float32."""
    return seen.logits(_later(seen))[..., tokens].amax((2, 3))


def log_ages(length: int, tokens: slice) -> Tensor:
    """How long tokens have been there when the first later query comes, as caches count it, (tokens,) float32."""
    places = torch.arange(length)[tokens]
    return (length - length // SHARE - places).float().log()


def attention_mass(seen: Attended, tokens: slice, *, weighed: bool = False) -> Tensor:
    """The attention that later queries and the heads of a group give a token, summed: what dropping it takes away.

    weighed: times the norm of what its value adds to the residual stream. Returns: (batch, kv heads, tokens) float32.
    """
    by_head = seen.weights(_later(seen))[..., tokens].sum(3)
    return (by_head * contributions(seen)[..., tokens] if weighed else by_head).sum(2)


def replayed(seen: Attended, tokens: slice) -> Tensor:
    """The label of KVzap (arXiv 2601.07891) on a window whose second half repeats the first, as KVzip (arXiv
    2505.23416) asks of a model to tell again what it read: the logarithm of the largest attention that the repetition
    gives a token, times the norm of what its value adds to the residual stream. tokens: of the first half.

    Returns: (batch, kv heads, tokens) float32.
    """
    half = seen.key.shape[2] // 2
    weights = seen.weights(slice(half, 2 * half))[..., tokens]
    norms = contributions(seen)[..., tokens]
    return (weights * norms[:, :, :, None]).amax((2, 3)).clamp(min=torch.finfo(torch.float32).tiny).log()


def first_half(seen: Attended) -> Attended:
    """A window up to its middle: what comes later does not change it."""
    half = seen.key.shape[2] // 2
    query, key, value = (states[:, :, :half] for states in (seen.query, seen.key, seen.value))
    return replace(seen, hidden=seen.hidden[:, :half], query=query, key=key, value=value)


def contributions(seen: Attended) -> Tensor:
    """The norm of what each token's value adds to the residual stream where a head attends to nothing else: (batch, kv
    heads, groups, n) float32. Raises: UnsupportedError for an attention whose output projection is not known."""
    project = next((child for name in _OUTPUTS if (child := getattr(seen.module, name, None)) is not None), None)
    if project is None:
        raise UnsupportedError(
            f"{type(seen.module).__name__} has its output projection under a name that is not known. Known: "
            f"{', '.join(_OUTPUTS)}."
        )
    heads, size = seen.query.shape[1], seen.query.shape[-1]
    each = torch.eye(heads * size, dtype=seen.value.dtype, device=seen.value.device)
    rows = (project(each) - project(torch.zeros_like(each[:1]))).float()  # its weight, whatever kind of module it is
    by_head = rows.reshape(seen.key.shape[1], seen.groups, size, -1)
    products = torch.einsum("hgdo,hgeo->hgde", by_head, by_head)
    value = seen.value.float()
    return torch.einsum("bhnd,hgde,bhne->bhgn", value, products, value).clamp(min=0).sqrt()


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's, along the last dimension: (…, n) twice → (…)."""
    ranks = [each.argsort(-1).argsort(-1).double() for each in (first, second)]
    centred = [each - each.mean(-1, keepdim=True) for each in ranks]
    spread = centred[0].square().sum(-1) * centred[1].square().sum(-1)
    return (centred[0] * centred[1]).sum(-1) / spread.sqrt()


def _later(seen: Attended) -> slice:
    length = seen.key.shape[2]
    return slice(length - length // SHARE, length)
