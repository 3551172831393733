"""Predicted bytes, memory and time of a run. Constants were fitted on runs of this code (benchmarks/plan_accuracy.py)
and are marked; predictions never share a field with measurements."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from compress.hwprofiles import Profile
from compress.layer import LayerSpec
from compress.model import Model
from compress.recipe import Recipe

# Fitted: resident memory of the process with its libraries loaded and a graph captured.
BASE_MEMORY = 830_000_000
BASE_SECONDS = 45.0
"""Fitted: load, capture, verification, and the timing of a small grid."""
STORE_HEADER_BYTES = 450
"""Fitted: header of a store's file per layer."""


@dataclass(frozen=True)
class Sizes:
    """What the predictions are made of; bytes unless named otherwise."""

    source: int
    float_weights: int
    largest_block: int
    outer: int
    activations: int
    largest_inputs: int
    block_weights: int
    tokens: int
    quality_tokens: int
    hidden_bytes: int
    vocabulary: int
    window: int

    @classmethod
    def of(cls, model: Model, specs: Iterable[LayerSpec], recipe: Recipe, needs_data: bool) -> Sizes:
        """From shapes alone."""
        specs = list(specs)
        per_segment: dict[int, int] = {}
        for spec in specs:
            per_segment[spec.segment] = per_segment.get(spec.segment, 0) + spec.shape[0] * spec.shape[1] * 4
        blocks = {segment: size for segment, size in per_segment.items() if segment >= 0}
        config = model.config.get_text_config()
        hidden = int(config.hidden_size)
        calibration = recipe.calibration
        tokens = calibration.samples * calibration.length if needs_data else 0
        quality = (recipe.quality.samples or 128) * recipe.quality.length
        inner = [spec.shape[1] for spec in specs if spec.segment >= 0]
        return cls(
            source=model.source_bytes,
            float_weights=sum(per_segment.values()),
            largest_block=max(blocks.values(), default=0),
            outer=per_segment.get(-1, 0),
            activations=tokens * hidden * 4,
            largest_inputs=max(inner, default=0),
            block_weights=sum(blocks.values()) // 4,
            tokens=tokens,
            quality_tokens=quality,
            hidden_bytes=quality * hidden * 4,
            vocabulary=int(config.vocab_size),
            window=recipe.quality.length,
        )


def artifact_bytes(target: Any, specs: Iterable[LayerSpec], model: Model, profile: Profile) -> int:
    """Bytes of the deployable folder."""
    return int(target.predict_bytes(specs, model, profile))


def model_bytes(specs: Iterable[LayerSpec], model: Model) -> int:
    """Bytes of `model/`: the store and the files copied into it."""
    total = model.plain_bytes + sum(path.stat().st_size for path in model.side_files())
    for spec in specs:
        stored = spec.source_bytes if spec.format is None else spec.format.stored_bytes(spec.shape)
        total += stored + spec.bias_bytes + STORE_HEADER_BYTES
    return total


def peak_memory(sizes: Sizes, artifact: int) -> int:
    """The larger of the passes' peak (a block, its working copies, statistics, activations) and the evaluation's
    (two sessions, both streams, logits of one window for four models)."""
    from compress.stream import SPILL_BYTES

    statistics = 6 * sizes.largest_inputs**2 * 4
    passes = 3 * sizes.largest_block + sizes.outer + statistics + min(sizes.activations, SPILL_BYTES)
    logits = 6 * sizes.window * sizes.vocabulary * 4
    sessions = int(1.3 * sizes.float_weights) + int(1.6 * artifact)
    streams = 2 * (sizes.hidden_bytes + sizes.outer)
    return BASE_MEMORY + max(passes, sessions + streams + logits)


def disk_bytes(sizes: Sizes, specs: Iterable[LayerSpec], model: Model, artifact: int) -> int:
    """Largest use of the output's disk: the store, the artifact, the baseline and spilled activations."""
    return model_bytes(specs, model) + artifact + sizes.source + sizes.activations


def seconds(sizes: Sizes, profile: Profile) -> float:
    """Forward passes over the calibration and quality tokens at a share of the float32 peak, plus what is fixed."""
    rate = profile.peak.dense_gflops_per_core["float32"].value * 1e9 * (profile.cpu.threads or 2) * 0.5
    forward = 2.0 * sizes.block_weights * (2 * sizes.tokens + 4 * sizes.quality_tokens)
    head = 2.0 * (sizes.outer / 4) * 4 * sizes.quality_tokens
    solve = sizes.block_weights * sizes.largest_inputs / 2.0 if sizes.tokens else 0.0
    return BASE_SECONDS + (forward + head + solve) / rate + sizes.source / 300e6
