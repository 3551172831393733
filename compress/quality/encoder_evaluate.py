"""Quality of an encoder: the hidden states of whole windows, pooled, in the runtime and in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from compress.inputs.windows import Windows
from compress.progress import Progress
from compress.quality import embedding_scores
from compress.quality.metrics import headline
from compress.quality.token_scores import Array
from compress.records import Quality
from compress.target import LogitsRunner


def evaluate_encoder(
    baseline: LogitsRunner,
    artifact: LogitsRunner,
    in_memory: Iterator[tuple[Tensor, Tensor]],
    windows: Windows,
    progress: Progress,
) -> tuple[Quality, Quality, Quality]:
    """Of the baseline, the artifact and the model in memory. in_memory: hidden states of the source and the compressed
    model, for each window in order. Raises: InputError when a model puts out NaN, Interrupted."""
    pooled: list[list[NDArray[np.float64]]] = [[], [], [], []]
    tokens = windows.rows()
    for place, outputs in enumerate(in_memory):
        progress.tick("Evaluating windows", place, len(tokens))  # all is set up once the first window is here
        one = tokens[place].numpy()[None]
        hidden: tuple[Array, ...] = (baseline.logits(one), artifact.logits(one), outputs[0][None], outputs[1][None])
        for group, values in zip(pooled, hidden, strict=True):
            group.append(embedding_scores.mean_pool(values)[0])
    progress.tick("Evaluating windows", len(tokens), len(tokens))
    first, second, third, fourth = (np.stack(group) for group in pooled)
    where, protocol, digest = artifact.name, f"embedding/mean-pool/{windows.protocol}", windows.digest
    itself = embedding_scores.score_embeddings(first, first)
    runtime, memory = embedding_scores.score_embeddings(first, second), embedding_scores.score_embeddings(third, fourth)
    return (
        embedding_scores.summarize_embeddings(itself, "baseline", where, protocol, digest),
        embedding_scores.summarize_embeddings(runtime, "compressed", where, protocol, digest),
        headline(embedding_scores.summarize_embeddings(memory, "compressed", "torch, in memory", protocol, digest)),
    )
