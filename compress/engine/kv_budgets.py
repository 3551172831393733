"""Budgets of layers from data: what each would lose of its attention, by what it keeps (see passes/kv_evict.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compress.engine.kv_pass import Observed, Settled
from compress.errors import UsageError
from compress.kv.observed import Attended
from compress.kv.spec import KvSpec
from compress.maths import budgets

LOSSES = "losses"
"""What `losses` is kept as."""


def check_windows(batches: Sequence[Tensor], budget: int) -> None:
    """Raises: UsageError for windows of which a budget keeps everything."""
    longest = max(batch.shape[1] for batch in batches)
    if longest <= budget:
        raise UsageError(
            f"kv_evict: calibration windows have {longest} tokens at most, so a budget of {budget} loses nothing there "
            "and layers=measured has nothing to go by. Give longer windows, or layers=pyramid."
        )


def losses(spec: KvSpec, seen: Observed) -> Tensor:
    """By budget from 0 to n, the share of a layer's attention that is lost, (n + 1,): see `_of_batch`, the mean over
    rows."""
    total, rows = torch.zeros(1), 0
    for batch in seen:
        found = _of_batch(spec, batch)
        width = max(len(total), len(found))
        total, found = (torch.cat([each, each.new_zeros(width - len(each))]) for each in (total, found))
        total, rows = total + found * len(batch.key), rows + len(batch.key)
    return total / rows


def _of_batch(spec: KvSpec, batch: Attended) -> Tensor:
    """If a head keeps its sinks, the newest and as many of the others as there is room for, those that get most: the
    mean over rows and heads, of what the newest `recent` queries attend to."""
    length = batch.key.shape[2]
    recent = min(spec.recent, length)
    mass = batch.weights(slice(length - recent, length)).mean((2, 3))
    others = mass[..., spec.sinks : length - recent].sort(-1, descending=True).values
    lost = others.flip(-1).cumsum(-1).flip(-1).mean((0, 1))
    curve = lost.new_zeros(length + 1)
    if len(lost):
        curve[: length - len(lost)] = lost[0]
        curve[length - len(lost) : length] = lost
    return curve.cpu()


def shared(caches: Sequence[KvSpec], found: Sequence[Mapping[str, Tensor]], budget: int) -> list[Settled]:
    """The caches with budgets that lose least in sum, whose total is that of `budget` each."""
    curves = [each[LOSSES] for each in found]
    least = max(spec.sinks + spec.recent + 1 for spec in caches)
    settled = []
    for spec, share, curve in zip(caches, budgets.fairest(curves, budget * len(caches), least), curves, strict=True):
        lost, even = (100 * float(curve[min(each, len(curve) - 1)]) for each in (share, budget))
        note = f"{share} tokens: {lost:.3g} % of the attention is lost at best, {even:.3g} % with {budget}"
        settled.append(Settled(replace(spec, budget=share), notes=(note,)))
    return settled
