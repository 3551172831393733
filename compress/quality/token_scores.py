"""Logits of one window → what is kept of it: sums, or a few numbers per token. Never the logits themselves.

Nothing here runs a model, so one definition serves torch and every runtime. Information is in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = Tensor | NDArray[np.floating]
Indices = Tensor | NDArray[np.integer]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

CHUNK_ROWS = 128
CHUNK_ELEMENTS = 1 << 22  # 32 MiB per float64 buffer, so 128k-word vocabularies go 32 rows at a time
TOP = 5
"""How many of the likeliest tokens are compared as sets."""
_LOWEST = -1e300  # stands for the logarithm of 0 where it is multiplied by 0


@dataclass(frozen=True)
class WindowScore:
    """Sums over the scored tokens of one window; the last three are None without a reference."""

    tokens: int
    nll: float
    reference_nll: float | None = None
    kl: float | None = None
    agreed: int | None = None

    def of_reference(self) -> WindowScore:
        """The reference's own score of this window, for the baseline's Quality."""
        if self.reference_nll is None:
            raise ValueError("this window was scored without a reference")
        return WindowScore(self.tokens, self.reference_nll)


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Per scored token of one window, all (T,).

    targets: the true token; top, reference_top: the likeliest one of each model; confidence, reference_confidence: its
    probability; overlap: share of the `TOP` likeliest tokens that both models have among theirs; kl:
    KL(reference || scored). All informations in nats.
    """

    targets: NDArray[np.int64]
    nll: Floats
    reference_nll: Floats
    kl: Floats
    top: NDArray[np.int64]
    reference_top: NDArray[np.int64]
    overlap: Floats
    confidence: Floats
    reference_confidence: Floats
    entropy: Floats
    reference_entropy: Floats

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def right(self) -> Flags:
        """Whether the scored model puts the true token first; never where its output is not a number."""
        right: Flags = (self.top == self.targets) & np.isfinite(self.confidence)
        return right

    @property
    def reference_right(self) -> Flags:
        """The same of the reference."""
        right: Flags = (self.reference_top == self.targets) & np.isfinite(self.reference_confidence)
        return right

    @property
    def agreed(self) -> Flags:
        """Whether both put the same token first."""
        agreed: Flags = (self.top == self.reference_top) & np.isfinite(self.confidence)
        return agreed

    @property
    def sums(self) -> WindowScore:
        """Over the window."""
        nll, reference, kl = (float(each.sum()) for each in (self.nll, self.reference_nll, self.kl))
        return WindowScore(len(self), nll, reference, kl, int(self.agreed.sum()))


def score_window(reference_logits: Array | None, logits: Array, targets: Indices) -> WindowScore:
    """Score one window. Logits (T, V) in any float type, row t predicting targets[t]; targets (T,) integers.

    Softmax in float64: 16-bit or clipped references give negative divergences (ik_llama.cpp#325). KL is
    KL(reference || compressed); a word of probability 0 in the reference (a padded vocabulary at -inf) adds nothing.
    """
    _check_window(reference_logits, logits, targets)
    device, sums = _device(logits), torch.zeros(4, dtype=torch.float64)  # nll, reference nll, kl, agreed
    for rows in _chunks(logits):
        reference = None if reference_logits is None else _rows(reference_logits, rows, device)
        sums += _score_rows(reference, _rows(logits, rows, device), _rows(targets, rows, device).long()).cpu()
    nll, reference_nll, kl, agreed = sums.tolist()
    tokens = int(logits.shape[0])
    if reference_logits is None:
        return WindowScore(tokens, nll)
    return WindowScore(tokens, nll, reference_nll, kl, int(agreed))


def score_tokens(reference_logits: Array, logits: Array, targets: Indices) -> TokenScores:
    """As `score_window`, token by token. A model against itself diverges by exactly nothing."""
    _check_window(reference_logits, logits, targets)
    device, parts = _device(logits), []
    for rows in _chunks(logits):
        first, second = _rows(reference_logits, rows, device), _rows(logits, rows, device)
        parts.append(_score_each(first, second, _rows(targets, rows, device).long()))
    kept = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    return TokenScores(*kept)


def _score_rows(reference: Tensor | None, logits: Tensor, targets: Tensor) -> Tensor:
    """(4,) float64 sums of a chunk: nll, reference nll, kl, agreed. Logits (rows, V) float64, targets (rows,)."""
    at = targets[:, None]
    log_q = logits.log_softmax(dim=-1)
    nll = -log_q.gather(1, at).sum()
    if reference is None:
        return torch.nn.functional.pad(nll[None], (0, 3))
    log_p = reference.log_softmax(dim=-1)
    kl = _divergence(log_p, log_p.exp(), log_q).sum()
    agreed = (reference.argmax(dim=-1) == logits.argmax(dim=-1)).sum()
    return torch.stack([nll, -log_p.gather(1, at).sum(), kl, agreed.double()])


def _score_each(reference: Tensor, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The columns of `TokenScores` for a chunk, in their order."""
    at = targets[:, None]
    log_p, log_q = reference.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    p, q = log_p.exp(), log_q.exp()
    kept = min(TOP, logits.shape[-1])
    first, second = log_p.topk(kept), log_q.topk(kept)
    shared = (first.indices[:, :, None] == second.indices[:, None, :]).any(dim=-1)
    return (
        targets,
        -log_q.gather(1, at)[:, 0],
        -log_p.gather(1, at)[:, 0],
        _divergence(log_p, p, log_q),
        second.indices[:, 0],
        first.indices[:, 0],
        shared.double().mean(dim=-1),
        second.values[:, 0].exp(),
        first.values[:, 0].exp(),
        _entropy(q, log_q),
        _entropy(p, log_p),
    )


def _divergence(log_p: Tensor, p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per row."""
    per_row = (p * (log_p - log_q).masked_fill_(p == 0, 0.0)).sum(dim=-1)  # 0 log 0 = 0
    return per_row.clamp(min=0)  # below 0 by rounding only


def _entropy(p: Tensor, log_p: Tensor) -> Tensor:
    return -log_p.clamp(min=_LOWEST).mul_(p).sum(dim=-1)


def _check_window(reference: Array | None, logits: Array, targets: Indices) -> None:
    if logits.ndim != 2 or 0 in logits.shape or tuple(targets.shape) != (logits.shape[0],):
        raise ValueError(f"logits (T, V) and targets (T,) wanted, found {logits.shape} and {targets.shape}")
    if reference is not None and tuple(reference.shape) != tuple(logits.shape):
        raise ValueError(f"reference logits {tuple(reference.shape)} differ in shape from {tuple(logits.shape)}")
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(f"targets lie in {low} to {high}, outside the {logits.shape[1]} logits; drop padding first")


def _device(logits: Array) -> torch.device:
    return logits.device if isinstance(logits, Tensor) and logits.is_cuda else torch.device("cpu")


def _chunks(logits: Array) -> list[slice]:
    """Rows that are computed at once."""
    tokens, words = logits.shape
    step = max(1, min(CHUNK_ROWS, CHUNK_ELEMENTS // words))
    return [slice(start, start + step) for start in range(0, tokens, step)]


def _rows(values: Array | Indices, rows: slice, device: torch.device) -> Tensor:
    """A float64 copy of some rows; a copy, since a memory-mapped reference may be read-only."""
    if isinstance(values, np.ndarray):
        return torch.from_numpy(values[rows].astype(np.float64)).to(device)
    return values[rows].detach().to(device).double()
