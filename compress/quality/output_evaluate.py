"""Judging a model of images, or other samples, whose outputs are no classes: the same samples through the baseline and
the artifact in the runtime, and through the original and the compressed model in torch, batch by batch in step."""

from __future__ import annotations

from itertools import tee

import torch

from compress.engine.image_stream import image_logits
from compress.inputs.images import BATCH, Images
from compress.models.model import Model
from compress.progress import Progress
from compress.quality.outputs import OutputScore, score_outputs, summarize_outputs
from compress.records import Quality
from compress.target import LogitsRunner


def evaluate_outputs(
    baseline: LogitsRunner, artifact: LogitsRunner, source: Model, compressed: Model, images: Images, progress: Progress
) -> tuple[Quality, Quality, Quality]:
    """Quality of the baseline and the artifact in the runtime, and of the compressed model in memory.

    Each output by itself, against the baseline's (in memory: the original's) for the same image.
    """
    assert source.image is not None
    names, sizes = [name for name, _ in source.image.outputs], source.image.sizes(tuple(images.pixels.shape[1:]))
    itself: list[OutputScore] = []
    runtime: list[OutputScore] = []
    memory: list[OutputScore] = []
    starts = range(0, len(images), BATCH)
    inputs = tee(map(images.inputs, starts), 3)
    originals, changed = image_logits(source, inputs[1]), image_logits(compressed, inputs[2])
    for start, batch, reference, output in zip(starts, inputs[0], originals, changed, strict=True):
        progress.tick(f"Evaluating {images.unit}s", start, len(images))
        one = batch.numpy()
        # copied: a runtime may hand out memory that it writes again
        first, second = torch.tensor(baseline.logits(one)), torch.tensor(artifact.logits(one))
        itself.append(score_outputs(first, first, sizes))
        runtime.append(score_outputs(first, second, sizes))
        memory.append(score_outputs(reference, output, sizes))
    progress.tick(f"Evaluating {images.unit}s", len(images), len(images))
    protocol = f"outputs/batch-{BATCH}, preprocessing {images.preprocessing}"
    where, digest = artifact.name, images.digest
    return (
        summarize_outputs(itself, names, "baseline", where, protocol, digest),
        summarize_outputs(runtime, names, "compressed", where, protocol, digest),
        summarize_outputs(memory, names, "compressed", "torch, in memory", protocol, digest),
    )
