"""Heads that score tokens, learned from one layer's attention on calibration windows: for passes that drop tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from compress.engine.kv_pass import Observed
from compress.kv import importance
from compress.kv.heads import scores_of
from compress.kv.observed import Attended
from compress.kv.spec import KvSpec
from compress.training import distill, retaining

Labels = Literal["logits", "replay", "attention", "outputs"]
FIGURES = "figures"
"""Beside a head's tensors, float64: those of `_told`, in its order."""


def repeated(batches: Sequence[Tensor]) -> list[Tensor]:
    """Windows (batch, n) int64 → (2 · batch, n): each half twice in a row, so that the model tells it again."""
    halves = [(ids[:, : ids.shape[1] // 2], ids[:, ids.shape[1] // 2 :][:, : ids.shape[1] // 2]) for ids in batches]
    return [torch.cat(pair).repeat(1, 2) for pair in halves]


def check_windows(batches: Sequence[Tensor], labels: Labels, sinks: int, recent: int) -> None:
    """Raises: UsageError where windows are too short to learn from."""
    for ids in batches:
        importance.judged(ids.shape[1] // (2 if labels == "replay" else 1), sinks, recent)


def learned(spec: KvSpec, seen: Observed, labels: Labels, how: retaining.Fitting) -> dict[str, Tensor]:
    """A layer's head, by the names in `spec.head_tensors`, and `FIGURES`."""
    started = time.perf_counter()
    batches, judged, held = [], [], set(distill.split(len(seen))[1])
    for place, batch in enumerate(seen):
        batches.append(_example(spec, batch, labels))
        if place in held:
            judged.append(_judged(spec, importance.first_half(batch) if labels == "replay" else batch))
    trained = retaining.train(batches, replace(how, ages=judged[0].ages) if spec.by_age else how)
    by_head = [scores_of(each.features, trained.tensors) for each in judged]
    if spec.by_age:
        by_head = [scores - each.ages for scores, each in zip(by_head, judged, strict=True)]
    figures = (
        sum(given.shape[0] * given.shape[1] for given, _ in batches),
        time.perf_counter() - started,
        trained.before,
        trained.after,
        float(trained.held),
        _correlation(judged, by_head),
        _correlation(judged, [-each.norms for each in judged]),
        _correlation(judged, [-each.ages.expand_as(each.mass) for each in judged]),
    )
    return {**trained.tensors, FIGURES: torch.tensor(figures, dtype=torch.float64)}


def told(figures: Tensor, labels: Labels) -> tuple[str, ...]:
    """For the report."""
    tokens, seconds, before, after, held, head, norm, newest = figures.tolist()
    on = "held-out" if held else "training"
    return (
        f"head trained by {labels} of {int(tokens):,} tokens in {seconds:.0f} s, {on} loss {before:.3g} → {after:.3g}",
        f"{on} rank correlation with later attention {head:.2f}; short keys {norm:.2f}, newest first {newest:.2f}",
    )


def tensors_of(spec: KvSpec, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head, of what `learned` gave."""
    return {name: found[name] for name in spec.head_tensors}


class _Judged(NamedTuple):
    """Of held-out windows: features (batch, n, inputs), norms of keys and attention by later queries (batch, kv heads,
    n), logarithms of tokens' ages (n,)."""

    features: Tensor
    norms: Tensor
    mass: Tensor
    ages: Tensor


def _features(spec: KvSpec, seen: Attended) -> Tensor:
    return (seen.hidden if spec.scorer == "kvzap" else seen.projected).float()


def _example(spec: KvSpec, seen: Attended, labels: Labels) -> retaining.Batch:
    """What a head is trained on."""
    length = seen.key.shape[2]
    if labels == "replay":
        tokens = slice(spec.sinks, length // 2)
        return _features(spec, seen)[:, tokens], importance.replayed(seen, tokens)
    tokens = importance.judged(length, spec.sinks, spec.recent)
    if labels == "logits":
        return _features(spec, seen)[:, tokens], importance.largest_logits(seen, tokens)
    mass = importance.attention_mass(seen, tokens, weighed=labels == "outputs")
    return _features(spec, seen)[:, tokens], mass.clamp(min=torch.finfo(torch.float32).tiny).log()


def _judged(spec: KvSpec, seen: Attended) -> _Judged:
    tokens = importance.judged(seen.key.shape[2], spec.sinks, spec.recent)
    norms = torch.linalg.vector_norm(seen.key[:, :, tokens].float(), dim=-1)
    ages = importance.log_ages(seen.key.shape[2], tokens).to(norms.device)
    return _Judged(_features(spec, seen)[:, tokens], norms, importance.attention_mass(seen, tokens), ages)


def _correlation(judged: Sequence[_Judged], scores: Sequence[Tensor]) -> float:
    """The mean over windows and heads."""
    each = [importance.rank_correlation(score, known.mass) for score, known in zip(scores, judged, strict=True)]
    return float(torch.cat([found.flatten() for found in each]).mean())
