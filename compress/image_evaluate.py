"""Judging an image classifier: the same images through the baseline and the artifact in the runtime, and through the
original and the compressed model in torch, batch by batch in step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.classification import score_batch, summarize_images
from compress.image_stream import image_logits
from compress.images import BATCH, Images
from compress.model import Model
from compress.progress import Progress
from compress.records import Quality

PROBES = 512
"""Images by which an export is compared with its model."""


class Runner(Protocol):
    """A runtime that computes logits."""

    name: str

    def logits(self, ids: NDArray[Any]) -> NDArray[Any]:
        """Images (batch, channels, h, w) float32 → (batch, classes)."""
        ...


def evaluate_images(
    baseline: Runner, artifact: Runner, source: Model, compressed: Model, images: Images, progress: Progress
) -> tuple[Quality, Quality, Quality]:
    """Quality of the baseline and the artifact in the runtime, and of the compressed model in memory."""
    runtime, memory = [], []
    starts = range(0, len(images), BATCH)
    inputs = (images.inputs(start) for start in starts)
    originals = image_logits(source, (images.inputs(start) for start in starts))
    changed = image_logits(compressed, (images.inputs(start) for start in starts))
    for start, batch, reference, output in zip(starts, inputs, originals, changed, strict=True):
        progress.tick("Evaluating images", start, len(images))
        labels, one = images.labels[start : start + BATCH], batch.numpy()
        # copied: a runtime may hand out memory that it writes again
        first, second = torch.tensor(baseline.logits(one)), torch.tensor(artifact.logits(one))
        runtime.append(score_batch(first, second, labels))
        memory.append(score_batch(reference, output, labels))
    progress.tick("Evaluating images", len(images), len(images))
    where, protocol, digest = artifact.name, images.protocol, images.digest
    return (
        summarize_images(runtime, "baseline", where, protocol, digest),
        summarize_images(runtime, "compressed", where, protocol, digest),
        summarize_images(memory, "compressed", "torch, in memory", protocol, digest),
    )


def probe_images(model: Model, inputs: Tensor | None = None) -> Tensor:
    """As many inputs (n, channels, h, w) as there are `PROBES`; where there are too few, seeded normal noise is added,
    which is what normalised images look like in scale."""
    assert model.image is not None
    kept = torch.empty(0, *model.image.shape) if inputs is None else inputs[:PROBES]
    noise = torch.randn(PROBES - len(kept), *model.image.shape, generator=torch.Generator().manual_seed(0))
    return torch.cat([kept, noise])


def probe_steps(model: Model, inputs: Tensor) -> Iterator[tuple[NDArray[Any], Tensor]]:
    """Batches of inputs, and what the model puts out for them in memory."""
    batches = list(torch.split(inputs, BATCH))
    for batch, expected in zip(batches, image_logits(model, batches), strict=True):
        yield batch.numpy(), expected
