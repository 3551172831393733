"""Judging a model of images whose outputs are no classes: the same images through the baseline and the artifact in the
runtime, and through the original and the compressed model in torch, batch by batch in step."""

from __future__ import annotations

import torch

from compress.image_stream import image_logits
from compress.images import BATCH, Images
from compress.model import Model
from compress.outputs import OutputScore, score_outputs, summarize_outputs
from compress.progress import Progress
from compress.records import Quality
from compress.target import LogitsRunner


def evaluate_outputs(
    baseline: LogitsRunner, artifact: LogitsRunner, source: Model, compressed: Model, images: Images, progress: Progress
) -> tuple[Quality, Quality, Quality]:
    """Quality of the baseline and the artifact in the runtime, and of the compressed model in memory.

    Each output by itself, against the baseline's (in memory: the original's) for the same image.
    """
    assert source.image is not None
    outputs = source.image.outputs
    names, sizes = [name for name, _ in outputs], [size for _, size in outputs]
    itself: list[OutputScore] = []
    runtime: list[OutputScore] = []
    memory: list[OutputScore] = []
    starts = range(0, len(images), BATCH)
    originals = image_logits(source, (images.inputs(start) for start in starts))
    changed = image_logits(compressed, (images.inputs(start) for start in starts))
    for start, reference, output in zip(starts, originals, changed, strict=True):
        progress.tick("Evaluating images", start, len(images))
        one = images.inputs(start).numpy()
        # copied: a runtime may hand out memory that it writes again
        first, second = torch.tensor(baseline.logits(one)), torch.tensor(artifact.logits(one))
        itself.append(score_outputs(first, first, sizes))
        runtime.append(score_outputs(first, second, sizes))
        memory.append(score_outputs(reference, output, sizes))
    progress.tick("Evaluating images", len(images), len(images))
    protocol = f"outputs/batch-{BATCH}, preprocessing {images.preprocessing}"
    where, digest = artifact.name, images.digest
    return (
        summarize_outputs(itself, names, "baseline", where, protocol, digest),
        summarize_outputs(runtime, names, "compressed", where, protocol, digest),
        summarize_outputs(memory, names, "compressed", "torch, in memory", protocol, digest),
    )
