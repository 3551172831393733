"""Judging a language model: window by window, the baseline and the artifact in the runtime, and the original and the
compressed model in torch. Logits live as long as their window; what is kept is a few numbers per token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.errors import InputError
from compress.inputs.windows import Windows
from compress.progress import Progress
from compress.quality import token_summary
from compress.quality.calibration_error import Halves
from compress.quality.continuations import Known, Plan, compare_continuations, generation_metrics
from compress.quality.metrics import in_order
from compress.quality.token_quality import Source, summarize_tokens, worst_with_text
from compress.quality.token_scores import TokenScores, WindowScore, score_tokens, score_window
from compress.records import Quality
from compress.target import LogitsRunner, Runner


def evaluate_tokens(
    baseline: LogitsRunner,
    artifact: LogitsRunner,
    in_memory: Iterable[tuple[Tensor, Tensor]],
    windows: Windows,
    tokenizer: Any,
    progress: Progress,
) -> tuple[Quality, Quality, Quality]:
    """Quality of the baseline and the artifact in the runtime, and of the compressed model in memory.

    in_memory: what the original and the compressed model put out for each window, in the order of `Halves`, (length,
    vocabulary) each; tokenizer: for the texts of the worst tokens, or None.
    """
    rows, judge = windows.rows(), TokenJudge(windows)
    for done, (place, (reference, output)) in enumerate(zip(judge.order, in_memory, strict=True)):
        progress.tick("Evaluating windows", done, len(rows))  # all is set up once the first window is here
        one = rows[place].numpy()[None]
        # copies: a runtime may hand out memory that it writes again
        first, second = torch.tensor(baseline.logits(one)[0]), torch.tensor(artifact.logits(one)[0])
        judge.see(place, first, second, reference, output)
    progress.tick("Evaluating windows", len(rows), len(rows))
    return judge.qualities(artifact.name, tokenizer)


class TokenJudge:
    """One artifact beside its baseline, window by window in `order`."""

    def __init__(self, windows: Windows) -> None:
        self._windows, self._rows = windows, windows.rows()
        self._halves = Halves(len(self._rows))
        self._runtime: dict[int, TokenScores] = {}
        self._memory: dict[int, WindowScore] = {}

    @property
    def order(self) -> list[int]:
        """As `Halves` wants the windows."""
        return self._halves.order

    def see(self, place: int, baseline: Tensor, artifact: Tensor, reference: Tensor, output: Tensor) -> None:
        """One window: logits (length, vocabulary) of both in the runtime, and of the original and the compressed model
        in torch. Nothing of them is kept but scores."""
        targets = self._rows[place][1:]
        self._runtime[place] = score_tokens(baseline[:-1], artifact[:-1], targets)
        self._memory[place] = score_window(reference[:-1], output[:-1], targets)
        self._halves.see(place, baseline[:-1], artifact[:-1], targets)

    @property
    def scores(self) -> list[TokenScores]:
        """Of the artifact in the runtime, by window, once all were seen."""
        return [self._runtime[place] for place in range(len(self._rows))]

    def qualities(self, runtime: str, tokenizer: Any) -> tuple[Quality, Quality, Quality]:
        """As `evaluate_tokens`, once all were seen."""
        windows, scores = self._windows, self.scores
        source = Source(runtime, windows.protocol, windows.digest)
        fitted = self._halves.fitted()
        shipped = summarize_tokens(scores, "compressed", source, fitted)
        worst = worst_with_text(scores, range(len(scores)), [row.numpy() for row in self._rows], tokenizer)
        in_torch = [self._memory[place] for place in range(len(scores))]
        return (
            summarize_tokens(scores, "baseline", source, fitted),
            shipped.model_copy(update={"worst": worst}),
            token_summary.summarize(in_torch, "compressed", "torch, in memory", windows.protocol, windows.digest),
        )


def with_continuations(
    judged: Sequence[Quality],
    runners: tuple[Runner, Runner] | None,
    plan: Plan,
    progress: Progress,
    known: Known | None = None,
) -> tuple[Quality, Quality]:
    """The qualities of the baseline and the artifact with how prompts go on. runners: of both; None where the target
    has none, which a note says; known: see `compare_continuations`."""
    baseline, artifact = judged
    if runners is None or not plan.prompts or plan.tokens < 1:
        return baseline, _noted(artifact, f"Continued prompts were not compared: {_why_not(runners, plan)}.")
    try:
        found = compare_continuations(*runners, plan, progress, known)
    except InputError as error:  # a broken artifact: its other figures say so too, and no gate on these is met
        return baseline, _noted(artifact, f"Continued prompts could not be compared: {error}")
    of_baseline = {**baseline.metrics, **generation_metrics(found, control=True)}
    of_artifact = {**artifact.metrics, **generation_metrics(found, control=False)}
    return (
        baseline.model_copy(update={"metrics": in_order(token_summary.TASK, of_baseline)}),
        artifact.model_copy(update={"metrics": in_order(token_summary.TASK, of_artifact), "generation": found}),
    )


def _why_not(runners: tuple[Runner, Runner] | None, plan: Plan) -> str:
    if not plan.prompts:
        return "none are wanted (quality.generation)"
    return "this target does not generate here" if runners is None else "the model has no positions after a prompt"


def _noted(found: Quality, note: str) -> Quality:
    return found.model_copy(update={"notes": (*found.notes, note)})
