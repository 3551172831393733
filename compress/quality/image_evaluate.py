"""Judging an image classifier: the same images through the baseline and the artifact in the runtime, and through the
original and the compressed model in torch, batch by batch in step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import tee
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.engine.image_stream import image_logits
from compress.inputs.images import BATCH, Images
from compress.models.model import Model
from compress.progress import Progress
from compress.quality.calibration_error import Halves
from compress.quality.classification import BatchScore, score_batch, summarize_images
from compress.quality.metrics import headline
from compress.records import Quality
from compress.target import LogitsRunner

PROBES = 512
"""Images by which an export is compared with its model."""
OUTPUT_PROBES = 32
"""The same where each has an output of many numbers."""


def evaluate_images(
    baseline: LogitsRunner, artifact: LogitsRunner, source: Model, compressed: Model, images: Images, progress: Progress
) -> tuple[Quality, Quality, Quality]:
    """Quality of the baseline and the artifact in the runtime, and of the compressed model in memory."""
    halves = Halves(len(range(0, len(images), BATCH)))
    runtime: dict[int, BatchScore] = {}
    memory: dict[int, BatchScore] = {}
    inputs = tee((images.inputs(BATCH * place) for place in halves.order), 3)
    originals, changed, done = image_logits(source, inputs[1]), image_logits(compressed, inputs[2]), 0
    for place, batch, reference, output in zip(halves.order, inputs[0], originals, changed, strict=True):
        progress.tick(f"Evaluating {images.unit}s", done, len(images))
        labels, one = images.labels[BATCH * place : BATCH * (place + 1)], batch.numpy()
        # copied: a runtime may hand out memory that it writes again
        first, second = torch.tensor(baseline.logits(one)), torch.tensor(artifact.logits(one))
        runtime[place] = score_batch(first, second, labels)
        memory[place] = score_batch(reference, output, labels)
        halves.see(place, first, second, labels)
        done += len(labels)
    progress.tick(f"Evaluating {images.unit}s", len(images), len(images))
    shipped = [runtime[place] for place in range(len(runtime))]
    in_torch = [memory[place] for place in range(len(memory))]
    fitted = halves.fitted()
    where, protocol, digest = artifact.name, images.protocol, images.digest
    return (
        summarize_images(shipped, "baseline", where, protocol, digest, fitted),
        summarize_images(shipped, "compressed", where, protocol, digest, fitted),
        headline(summarize_images(in_torch, "compressed", "torch, in memory", protocol, digest)),
    )


def probe_images(model: Model, inputs: Tensor | None = None) -> Tensor:
    """As many inputs (n, channels, h, w) as there are `PROBES`, or `OUTPUT_PROBES`; where there are too few, seeded
    normal noise is added, which is what normalised images look like in scale."""
    assert model.image is not None
    count = PROBES if model.task.has_classes else max(OUTPUT_PROBES, -(-PROBES // model.image.classes))
    kept = torch.empty(0, *model.image.shape) if inputs is None else inputs[:count]
    return torch.cat([kept, model.image.noise(count - len(kept), tuple(kept.shape[1:]))])


def probe_positions(model: Model, inputs: Tensor) -> int:
    """How many places of an output are compared: images, or all numbers of outputs that are no classes."""
    assert model.image is not None
    return len(inputs) * (1 if model.task.has_classes else sum(model.image.sizes(tuple(inputs.shape[1:]))))


def probe_steps(model: Model, inputs: Tensor) -> Iterator[tuple[NDArray[Any], Tensor]]:
    """Batches of inputs, and what the model puts out for them in memory."""
    batches = list(torch.split(inputs, BATCH))
    for batch, expected in zip(batches, image_logits(model, batches), strict=True):
        yield batch.numpy(), expected
