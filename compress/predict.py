"""Predicted bytes, memory and time of a run. Constants were fitted on runs of this code (benchmarks/plan_accuracy.py)
and are marked; predictions never share a field with measurements."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from compress.hwprofiles import Profile
from compress.image_model import ImageModule
from compress.images import BATCH, CALIBRATION_SAMPLES
from compress.layer import LayerKind, LayerSpec
from compress.model import Model
from compress.recipe import Recipe

# Fitted: resident memory of the process with its libraries loaded and a graph captured.
BASE_MEMORY = 830_000_000
BASE_SECONDS = 45.0
"""Fitted: load, capture, verification, and the timing of a small grid."""
QUALITY_IMAGES = 1000
"""Assumed where no number is given: how many the data hold is not known before they are read."""
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
    statistics: int
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
        if model.image is not None:
            return _image_sizes(model.image, model.source_bytes, specs, recipe, needs_data)
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
            statistics=_statistics(specs) if needs_data else 0,
            block_weights=sum(blocks.values()) // 4,
            tokens=tokens,
            quality_tokens=quality,
            hidden_bytes=quality * hidden * 4,
            vocabulary=int(config.vocab_size),
            window=recipe.quality.length,
        )


def _image_sizes(image: ImageModule, source: int, specs: list[LayerSpec], recipe: Recipe, needs_data: bool) -> Sizes:
    """Of an image classifier: an image is a token that takes as many multiplications as all layers do for it."""
    weights = sum(spec.shape[0] * spec.shape[1] * 4 for spec in specs)
    pixels = image.shape[0] * image.shape[1] * image.shape[2] * 4
    calibration, quality = recipe.calibration, recipe.quality
    given = calibration.samples if "samples" in calibration.model_fields_set else CALIBRATION_SAMPLES
    images = given if needs_data else 0
    return Sizes(
        source=source,
        float_weights=weights,
        largest_block=weights,
        outer=0,
        activations=images * pixels,
        largest_inputs=0,
        statistics=sum(spec.shape[1] ** 2 * 4 for spec in specs) if needs_data else 0,
        block_weights=image.multiplications,
        tokens=images,
        quality_tokens=quality.samples or QUALITY_IMAGES,
        hidden_bytes=0,
        vocabulary=image.classes,
        window=BATCH,
    )


def _statistics(specs: Iterable[LayerSpec]) -> int:
    """Second moments of one block: of its widest input with the working copies of a solve, and of every expert's."""
    specs = [spec for spec in specs if spec.segment >= 0]
    widest = max((spec.shape[1] for spec in specs), default=0)
    first = [spec for spec in specs if spec.segment == 0 and spec.kind is LayerKind.EXPERT]
    return 6 * widest**2 * 4 + sum(spec.shape[1] ** 2 * 4 for spec in first)


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


def peak_memory(sizes: Sizes, artifact: int, stored: int) -> int:
    """Resident memory of the whole process when the evaluation has everything open: what the passes left behind, the
    mapped files of the source and the store, both sessions, both streams, and the logits of one window for four models.

    Args: artifact, stored: predicted bytes of the deployable folder and of `model/`.
    """
    from compress.activations import SPILL_BYTES

    passes = 3 * sizes.largest_block + sizes.statistics + min(sizes.activations, SPILL_BYTES)
    sessions = int(1.1 * sizes.float_weights) + int(1.7 * artifact)
    streams = 3 * sizes.outer + 2 * min(sizes.hidden_bytes, SPILL_BYTES)
    logits = 6 * sizes.window * sizes.vocabulary * 4
    return BASE_MEMORY + passes + sizes.source + stored + sessions + streams + logits


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
