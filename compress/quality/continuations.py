"""Whether prompts go on alike in the original and the compressed model, beside the original against itself.

Batch size and padding alone change what a model writes, since sums are rounded in another order: without that control
every difference would be laid to compression. Between temperatures 0.5 and 0.8 differences show that greedy decoding
hides ("Understanding the Impact of Post-Training Quantization on Large Language Models", arXiv 2309.05210).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from compress.models.model import Model
from compress.progress import Progress
from compress.quality.metrics import measured
from compress.records import Interval
from compress.records.quality import Continuations, Generation, Metric
from compress.runtime.generation import padded
from compress.runtime.sampling import Sampling, choose
from compress.stats.intervals import cluster_interval, fraction, transform
from compress.stats.proportions import proportion
from compress.target import Runner

TASK = "causal-lm"
PROMPT_TOKENS = 32
SETTINGS = {
    "greedy_agreement": Sampling(),
    "sampled_agreement_t0.5": Sampling(temperature=0.5),
    "sampled_agreement_t0.8": Sampling(temperature=0.8),
    "sampled_agreement_t0.8_top40": Sampling(temperature=0.8, top_k=40),
}
"""Metric → how its tokens are chosen."""
_GREEDY = "greedy_agreement"
Rows = list[list[int]]
Known = dict[tuple[Sampling, int], Rows]
"""What a runner wrote, by how tokens are chosen and how many prompts go at a time."""


@dataclass(frozen=True)
class Amount:
    """How much is compared: prompts (0: none) of the quality data, and tokens after each."""

    prompts: int = 8
    tokens: int = 32


@dataclass(frozen=True)
class Plan:
    """Prompts (unlike lengths, so that a batch of them is padded), tokens after each, and what ends a text or fills a
    row up."""

    prompts: Rows
    tokens: int
    ends: tuple[int, ...]
    pad: int = 0


def plan_prompts(model: Model, windows: Sequence[torch.Tensor], amount: Amount) -> Plan:
    """The beginnings of evenly spaced windows, of up to 32 tokens; fewer tokens after them where the model has no more
    positions."""
    places = np.unique(np.linspace(0, len(windows) - 1, min(amount.prompts, len(windows))).astype(int))
    longest = max(1, min(PROMPT_TOKENS, model.longest // 2))
    prompts = [windows[row][: max(1, longest - place % 4 * longest // 8)].tolist() for place, row in enumerate(places)]
    ends = getattr(model.config.get_text_config(), "eos_token_id", None)
    found = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return Plan(prompts, min(amount.tokens, model.longest - longest), tuple(int(end) for end in found))


def compare_continuations(
    baseline: Runner, artifact: Runner, plan: Plan, progress: Progress, known: Known | None = None
) -> tuple[Generation, ...]:
    """Every setting of `SETTINGS`: the artifact and the original in one batch with the same random numbers, and the
    original again in smaller batches.

    known: of the same baseline and plan: what it wrote already, and will have written.
    Raises: InputError for logits that are not finite, Interrupted.
    """
    known = {} if known is None else known
    found, total = [], len(SETTINGS) * 3
    for place, sampling in enumerate(SETTINGS.values()):
        progress.tick("Comparing continuations", 3 * place, total)
        original = _once(known, baseline, plan, sampling, len(plan.prompts))
        progress.tick("Comparing continuations", 3 * place + 1, total)
        compressed = continuations(artifact, plan, sampling, len(plan.prompts))
        progress.tick("Comparing continuations", 3 * place + 2, total)
        alone = _once(known, baseline, plan, sampling, control_rows(plan, sampling))
        found.append(
            Generation(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                prompts=len(plan.prompts),
                tokens=plan.tokens,
                compressed=compare(original, compressed, plan.tokens, _protocol(plan, sampling)),
                control=compare(original, alone, plan.tokens, _protocol(plan, sampling)),
            )
        )
    progress.tick("Comparing continuations", total, total)
    return tuple(found)


def _once(known: Known, runner: Runner, plan: Plan, sampling: Sampling, rows: int) -> Rows:
    """`continuations`, unless they are known."""
    if (sampling, rows) not in known:
        known[sampling, rows] = continuations(runner, plan, sampling, rows)
    return known[sampling, rows]


def control_rows(plan: Plan, sampling: Sampling) -> int:
    """Prompts at a time of the control: one where greedy; half of them where drawn, which tells as much for less."""
    return 1 if sampling.is_greedy else max(1, len(plan.prompts) // 2)


def continuations(runner: Runner, plan: Plan, sampling: Sampling, rows: int) -> Rows:
    """What follows each prompt, up to and with the first token that ends a text; `rows` prompts at a time. A prompt's
    random numbers are its own, whatever batch it is in."""
    generators, found = sampling.generators(len(plan.prompts)), []
    for start in range(0, len(plan.prompts), rows):
        batch, numbers = plan.prompts[start : start + rows], generators[start : start + rows]
        alive = np.ones(len(batch), np.bool_)
        logits, columns = runner.start(*padded(batch, plan.pad, left=True)), []
        for place in range(plan.tokens):
            columns.append(choose(logits, sampling, numbers))
            if place + 1 < plan.tokens:
                logits = runner.step(columns[-1], alive)
        found += [_ended(row, plan.ends) for row in np.stack(columns, axis=1).tolist()]
    return found


def compare(original: Rows, other: Rows, tokens: int, protocol: str) -> Continuations:
    """Share of positions with the same token, share of prompts alike to the end, tokens before the first that differs
    (`tokens` where none does). Prompts are the samples; a text that ended early differs from one that goes on."""
    pairs = list(zip(original, other, strict=True))
    lengths = [max(len(first), len(second)) for first, second in pairs]
    equal = [sum(a == b for a, b in zip(first, second, strict=False)) for first, second in pairs]
    same = [first == second for first, second in pairs]
    before = [tokens if first == second else _alike(first, second) for first, second in pairs]
    value, interval = cluster_interval(equal, lengths)
    until, spread = cluster_interval(before, np.ones(len(before)))
    figures = {
        "greedy_agreement": (value, transform(interval, fraction)),
        "greedy_exact_match": _exact(same),
        "greedy_first_divergence": (until, transform(spread, lambda bound: min(max(bound, 0.0), float(tokens)))),
    }
    agreement, exact, divergence = measured(TASK, figures, len(pairs), protocol).values()
    return Continuations(agreement=agreement, exact_match=exact, first_divergence=divergence)


def generation_metrics(found: Sequence[Generation], control: bool) -> dict[str, Metric]:
    """The figures that may be gated, of the compressed model, or of the control, which are the baseline's own."""
    metrics = {}
    for name, each in zip(SETTINGS, found, strict=True):
        of = each.control if control else each.compressed
        metrics[name] = of.agreement
        if name == _GREEDY:
            metrics |= {"greedy_exact_match": of.exact_match, "greedy_first_divergence": of.first_divergence}
    return metrics


def _exact(same: Sequence[bool]) -> tuple[float, Interval | None]:
    value, interval = proportion(sum(same), len(same))
    return value, interval if len(same) > 1 else None


def _alike(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens before the first that differs, or before one text ends."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def _ended(tokens: list[int], ends: Sequence[int]) -> list[int]:
    place = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: place + 1]


def _protocol(plan: Plan, sampling: Sampling) -> str:
    limit = f", top-k {sampling.top_k}" if sampling.top_k else ""
    batch = f"{len(plan.prompts)} prompts in one batch, {plan.tokens} tokens each"
    return f"continuations, {batch}, temperature {sampling.temperature:g}{limit}, seed {sampling.seed}"
