"""Quality of an artifact in its runtime, with the in-memory figure beside it (design §1, `Quality`).

Four models see the same windows in step: the baseline and the artifact in the runtime, the original and the
compressed model in torch. So the loss of the method and the loss of the lowering are told apart, and no file of
logits is ever written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from compress.engine.stream import BlockStream
from compress.inputs.datasets import Samples
from compress.inputs.images import Images
from compress.models.model import Model, Task
from compress.models.skeleton import OUTER
from compress.progress import Progress
from compress.quality.calibration_error import Halves
from compress.quality.continuations import Amount, plan_prompts
from compress.quality.encoder_evaluate import evaluate_encoder
from compress.quality.image_evaluate import evaluate_images
from compress.quality.output_evaluate import evaluate_outputs
from compress.quality.token_evaluate import evaluate_tokens, with_continuations
from compress.records import Quality
from compress.target import LogitsRunner, Runner, Session, Target

Runners = tuple[Runner, Runner]
"""Of the baseline and of the artifact."""
NO_GENERATION = Amount(prompts=0)


@dataclass(frozen=True)
class Evaluation:
    """Quality of the baseline and the artifact in the runtime, and of the compressed model in memory."""

    baseline: Quality
    artifact: Quality
    memory: Quality


def stream_logits(
    model: Model,
    windows: Iterable[Tensor],
    device: str = "cpu",
    *,
    progress: Progress | None = None,
    name: str = "the model",
) -> Iterator[Tensor]:
    """The model's output for each window, block by block, so that one block is in memory at a time.

    Args: windows (length,) int64 each, or (N, length). Yields (length, vocabulary) float32 in order; for an encoder
    (length, features). name: of the model, for the progress: all windows go through the blocks before the first yield.
    """
    stage, count = f"Running {name} in torch, block by block", len(model.structure.blocks)
    progress = progress or Progress(quiet=True)
    stream = BlockStream(model, [window[None] for window in windows], device=device)
    stream.start(model.layers(OUTER))
    for index in range(count):
        progress.tick(stage, index, count)
        stream.load(index, model.layers(index), model.plain(index))
        stream.advance(index)
        stream.release(index)
    progress.tick(stage, count, count)
    for output in stream.logits():
        yield output[0]


def evaluate(
    baseline: LogitsRunner,
    artifact: LogitsRunner,
    source: Model,
    compressed: Model,
    windows: Samples,
    progress: Progress,
    runners: Runners | None = None,
    generation: Amount = NO_GENERATION,
) -> Evaluation:
    """Score every window, or image, with all four models; of a language model also compare how prompts go on.

    runners: of the baseline and the artifact, see `runners_of`. Raises: InputError when a model puts out NaN,
    Interrupted.
    """
    if isinstance(windows, Images):
        if not source.task.has_classes:
            return Evaluation(*evaluate_outputs(baseline, artifact, source, compressed, windows, progress))
        return Evaluation(*evaluate_images(baseline, artifact, source, compressed, windows, progress))
    tokens = windows.rows()
    if source.task is Task.ENCODER:
        in_memory = _in_memory(source, compressed, tokens, progress)
        return Evaluation(*evaluate_encoder(baseline, artifact, in_memory, windows, progress))
    ordered = [tokens[place] for place in Halves(len(tokens)).order]
    in_memory = _in_memory(source, compressed, ordered, progress)
    judged = evaluate_tokens(baseline, artifact, in_memory, windows, source.tokenizer(), progress)
    plan = plan_prompts(source, tokens, generation)
    return Evaluation(*with_continuations(judged[:2], runners, plan, progress), judged[2])


def _in_memory(
    source: Model, compressed: Model, windows: Sequence[Tensor], progress: Progress
) -> Iterator[tuple[Tensor, Tensor]]:
    original = stream_logits(source, windows, progress=progress, name="the original")
    changed = stream_logits(compressed, windows, progress=progress, name="the compressed model")
    return zip(original, changed, strict=True)


def runners_of(target: Target, baseline: tuple[Session, Path], artifact: tuple[Session, Path]) -> Runners | None:
    """What continues prompts, of two sessions with their folders; None where the target has nothing that does here."""
    make: Callable[[Session, Path], Runner] | None = getattr(target, "runner", None)
    if make is None or not (baseline[0].is_decoder and artifact[0].is_decoder):
        return None
    return make(*baseline), make(*artifact)
