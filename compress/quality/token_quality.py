"""The Quality of a language model from the scores of its tokens: every figure, curve and worst sample put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.quality.calibration_error import FEWEST, Answers, Fitted, calibration_figures, reliability_curve
from compress.quality.calibration_error import PROTOCOL as CALIBRATION
from compress.quality.fidelity import (
    divergence_curves,
    fidelity_figures,
    flips_of,
    second_half_perplexity,
    token_share,
    worst_tokens,
)
from compress.quality.metrics import Figures, Subject, in_order, measured
from compress.quality.token_scores import TokenScores
from compress.quality.token_summary import TASK, summarize
from compress.records import Quality
from compress.records.quality import WorstSample

_UNFITTED = f"Calibration after a fitted temperature is not given: half of the windows have under {FEWEST} tokens."


@dataclass(frozen=True)
class Source:
    """What a summary names: the runtime, the windows' protocol, their digest."""

    where: str
    protocol: str
    digest: str


def summarize_tokens(scores: Sequence[TokenScores], subject: Subject, source: Source, fitted: Fitted | None) -> Quality:
    """Every figure of one model over windows; of the baseline only those that compare with nothing.

    The temperature of the fitted figures comes from other windows of the same data (every second one), one per model.
    """
    sums = [score.sums for score in scores]
    is_baseline = subject == "baseline"
    if is_baseline:
        sums = [score.of_reference() for score in sums]
    quality = summarize(sums, subject, source.where, source.protocol, source.digest)
    plain, notes = _plain_figures(scores, is_baseline)
    metrics = {**quality.metrics, **measured(TASK, plain, len(scores), source.protocol)}
    own, original = _answers(scores, own=not is_baseline), _answers(scores, own=False)
    found = calibration_figures(own, None if is_baseline else original)
    protocol = f"{CALIBRATION}, {source.protocol}"
    metrics |= measured(TASK, found, len(scores), protocol)
    if not found:
        notes.append(f"Calibration is not given: {sum(own.counts)} tokens, and {FEWEST} are needed.")
    after = _fitted_metrics(scores, fitted, is_baseline, protocol) if fitted else {}
    notes.append(fitted.told(is_baseline) if fitted and after else _UNFITTED)
    metrics |= after
    half = second_half_perplexity([score.reference_nll if is_baseline else score.nll for score in scores])
    if half is not None:
        metrics |= measured(TASK, {"perplexity_second_half": half}, len(scores), _second_half(source.protocol))
    curves = (reliability_curve(own, protocol),) if found else ()
    more: dict[str, Any] = {"metrics": in_order(TASK, metrics), "notes": tuple(notes), "curves": curves}
    if not is_baseline:
        more["curves"] = (*divergence_curves(scores, source.protocol), *curves)
        more["flips"] = flips_of(scores)
    return quality.model_copy(update=more)


def worst_with_text(
    scores: Sequence[TokenScores], windows: Sequence[int], ids: Sequence[NDArray[np.int64]], tokenizer: Any
) -> tuple[WorstSample, ...]:
    """See `worst_tokens`; with the texts of their tokens where there is a tokenizer."""
    found = worst_tokens(scores, windows, ids)
    if tokenizer is None:
        return found

    def text(*tokens: int) -> str:
        # marks such as an end of text are shown: they are what a model may go wrong about
        return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return tuple(
        each.model_copy(
            update={
                "context_text": text(*each.context),
                "target_text": text(each.target),
                "reference_text": text(each.reference),
                "chosen_text": text(each.chosen),
            }
        )
        for each in found
    )


def _plain_figures(scores: Sequence[TokenScores], is_baseline: bool) -> tuple[Figures, list[str]]:
    """Those of the windows' own protocol."""
    if is_baseline:
        return {"token_accuracy": token_share(scores, lambda score: score.reference_right)}, []
    found, notes = fidelity_figures(scores)
    found["token_accuracy"] = token_share(scores, lambda score: score.right)
    return found, notes


def _answers(scores: Sequence[TokenScores], own: bool) -> Answers:
    if own:
        return Answers([score.confidence for score in scores], [score.right for score in scores])
    return Answers([score.reference_confidence for score in scores], [score.reference_right for score in scores])


def _fitted_metrics(scores: Sequence[TokenScores], fitted: Fitted, is_baseline: bool, protocol: str) -> dict[str, Any]:
    judged = [scores[place] for place in fitted.places]
    original = Answers(fitted.original, [score.reference_right for score in judged])
    own = original if is_baseline else Answers(fitted.own, [score.right for score in judged])
    found = calibration_figures(own, None if is_baseline else original, "_fitted")
    how = f"{protocol}, one temperature fitted on every second window, judged by the others"
    return measured(TASK, found, len(judged), how)


def _second_half(protocol: str) -> str:
    """`ppl/disjoint-512` → `ppl/second-half-512`, other protocols with what is scored of them."""
    known = "ppl/disjoint-"
    if protocol.startswith(known):
        return f"ppl/second-half-{protocol.removeprefix(known)}"
    return f"second half of each window, {protocol}"
