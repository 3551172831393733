"""Predicted bytes, memory and time of a run. Constants were fitted on runs of this code (benchmarks/plan_accuracy.py)
and are marked; predictions never share a field with measurements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from compress import defaults
from compress.engine.codebook_pass import CodebookPass
from compress.engine.layerpass import Pass
from compress.engine.modelpass import ModelPass
from compress.engine.training_cost import float_bytes, inner_shapes, saved_bytes, trained_tokens, training_bytes
from compress.hwprofiles import Profile
from compress.inputs.images import BATCH
from compress.inputs.windows import BATCH_TOKENS
from compress.layer import LayerKind, LayerSpec
from compress.models import cache_tensors
from compress.models.image_source import ImageSource
from compress.models.model import Model, Task
from compress.recipe import Recipe

# Fitted: resident memory of the process with its libraries loaded, a graph captured and its sessions timed.
BASE_MEMORY = 1_150_000_000
BASE_SECONDS = 100.0
"""Fitted: load, capture, verification, and the timing of a small grid."""
HOST_GFLOPS_PER_CORE = 40.0  # of the machine that compresses for another one
QUALITY_IMAGES = 1000
"""Assumed where no number is given: how many the data hold is not known before they are read."""
LOADED_MEMORY = 450_000_000
"""Fitted: resident memory of the process with its libraries loaded, before anything is captured."""
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
    backward: int = 0  # what a backward pass keeps beside the stream: hidden states at every door, saliencies
    backward_tokens: int = 0
    training: int = 0  # what the hungriest pass that trains holds at once
    trained_tokens: int = 0  # passes of one token through all blocks, forward or back, that training takes
    headed_tokens: int = 0  # of them, those that also run through what comes after the blocks
    between: int = 0  # stores of earlier stages, and the weights that errors are taken against
    saved: int = 0  # of the state of a training, on disk

    @classmethod
    def of(
        cls, model: Model, specs: Iterable[LayerSpec], recipe: Recipe, needs_data: bool, passes: Sequence[Pass] = ()
    ) -> Sizes:
        """From shapes alone. passes: of the recipe, for what they train and what they ask of a backward pass."""
        specs = list(specs)
        if model.image is not None:
            return _image_sizes(model.image, model.source_bytes, specs, recipe, needs_data, passes)
        per_segment: dict[int, int] = {}
        for spec in specs:
            per_segment[spec.segment] = per_segment.get(spec.segment, 0) + spec.shape[0] * spec.shape[1] * 4
        blocks = {segment: size for segment, size in per_segment.items() if segment >= 0}
        config = model.config.get_text_config()
        hidden = int(config.hidden_size)
        calibration = recipe.calibration
        tokens = calibration.samples * calibration.length if needs_data else 0
        quality = (recipe.quality.samples or defaults.QUALITY_SAMPLES) * recipe.quality.length
        inner = [spec.shape[1] for spec in specs if spec.segment >= 0]
        guided = [item for item in passes if item.row_groups]
        columns = max((item.row_groups for item in guided), default=0) * len(inner)  # of the saliencies
        doors = len(blocks) * hidden if guided else 0
        window = min(calibration.samples, max(1, BATCH_TOKENS // calibration.length)) * calibration.length
        values = sum(map(sum, inner_shapes(specs)))
        logits = int(config.vocab_size) if model.task is Task.CAUSAL_LM else hidden
        return cls(
            source=model.source_bytes,
            float_weights=sum(per_segment.values()),
            largest_block=max(blocks.values(), default=0),
            outer=per_segment.get(-1, 0),
            activations=tokens * hidden * (2 if calibration.dtype == "bfloat16" else 4),
            largest_inputs=max(inner, default=0),
            statistics=_statistics(specs) + _guided(specs, guided) if needs_data else 0,
            block_weights=sum(blocks.values()) // 4,
            tokens=tokens,
            quality_tokens=quality,
            hidden_bytes=quality * hidden * 4,
            vocabulary=int(config.vocab_size),
            window=recipe.quality.length,
            backward=tokens * 4 * (doors + columns),
            backward_tokens=tokens * len({item.row_groups for item in guided}),
            training=training_bytes(specs, passes, window, values, logits, float_bytes(model)),
            trained_tokens=trained_tokens(passes, window, tokens, len(model.structure.blocks), images=False),
            headed_tokens=int(tokens * sum(item.trials(len(model.structure.blocks))[1] for item in passes)),
            between=_between(passes, model.source_bytes, sum(per_segment.values())),
            saved=saved_bytes(specs, passes),
        )


def _image_sizes(
    image: ImageSource, source: int, specs: list[LayerSpec], recipe: Recipe, needs_data: bool, passes: Sequence[Pass]
) -> Sizes:
    """Of an image classifier: an image is a token that takes as many multiplications as all layers do for it."""
    weights = sum(spec.shape[0] * spec.shape[1] * 4 for spec in specs)
    # what a graph puts out is looked at as a whole, and may be much more than an image's classes
    pixels = 4 * (prod(image.shape) + (0 if image.is_image else image.classes))
    calibration, quality = recipe.calibration, recipe.quality
    given = calibration.samples if "samples" in calibration.model_fields_set else defaults.IMAGES
    images = given if needs_data else 0
    # of the inputs and outputs of all layers: an output takes as many multiplications as the layer has columns
    values = 2 * image.multiplications * len(specs) // sum(spec.shape[1] for spec in specs)
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
        training=training_bytes(specs, passes, min(images, BATCH), values, image.classes, weights),
        trained_tokens=trained_tokens(passes, min(images, BATCH), images, images=True),
        between=_between(passes, source, weights),
        saved=saved_bytes(specs, passes),
    )


def _statistics(specs: Iterable[LayerSpec]) -> int:
    """Second moments of one block: of its widest input with the working copies of a solve, and of every expert's."""
    specs = [spec for spec in specs if spec.segment >= 0]
    widest = max((spec.shape[1] for spec in specs), default=0)
    first = [spec for spec in specs if spec.segment == 0 and spec.kind is LayerKind.EXPERT]
    return 6 * widest**2 * 4 + sum(spec.shape[1] ** 2 * 4 for spec in first)


def _guided(specs: Iterable[LayerSpec], passes: Sequence[Pass]) -> int:
    """Guided second moments that are held at once: of the first block's layers of one width, at most, where they come
    in turn, else of all of them. Where codebooks are learned, each with the working copies of its solve."""
    widths: dict[int, int] = {}
    for spec in specs:
        if spec.segment == 0 and spec.kind is LayerKind.LINEAR:
            widths[spec.shape[1]] = widths.get(spec.shape[1], 0) + spec.shape[1] ** 2 * 4
    held = []
    for item in passes:
        layers = max if item.in_turn and not item.surveys else sum
        copies = 4 if isinstance(item, CodebookPass) else 1
        held.append(layers(widths.values() or (0,)) * item.row_groups * copies)
    return max(held, default=0)


def _between(passes: Sequence[Pass], source: int, weights: int) -> int:
    """Bytes that stages leave for those after them (compress/engine/stages.py): a store, in float32 where a pass
    rescales weights, which are then also kept for the report's errors."""
    if len(passes) < 2 or not any(isinstance(item, ModelPass) for item in passes):
        return 0
    return 2 * weights if any(item.rescales and not item.part for item in passes) else source


def artifact_bytes(target: Any, specs: Iterable[LayerSpec], model: Model, profile: Profile) -> int:
    """Bytes of the target's folder."""
    return int(target.predict_bytes(specs, model, profile))


def deployed_bytes(target: Any, specs: Iterable[LayerSpec], model: Model, profile: Profile, artifact: int) -> int:
    """Bytes of what the machine needs, where the folder also holds other forms of the same model; else `artifact`,
    those of the whole folder."""
    predict = getattr(target, "predict_deployed_bytes", None)
    return artifact if predict is None else int(predict(specs, model, profile))


def predicted_parts(target: Any, specs: Iterable[LayerSpec], model: Model, profile: Profile) -> dict[str, int]:
    """Bytes by part of the target's folder, where it holds several forms of the same model; else nothing."""
    predict = getattr(target, "predict_parts", None)
    return {} if predict is None else dict(predict(specs, model, profile))


def model_bytes(specs: Iterable[LayerSpec], model: Model) -> int:
    """Bytes of `model/`: the store and the files copied into it."""
    total = model.plain_bytes + model.side_bytes + cache_tensors.predict_bytes(model)
    for spec in specs:
        stored = spec.source_bytes if spec.format is None else spec.format.stored_bytes(spec.shape)
        total += stored + spec.bias_bytes + STORE_HEADER_BYTES
    return total


def peak_memory(sizes: Sizes, artifact: int) -> int:
    """Resident memory of the whole process: while a pass trains, or when the evaluation has everything open, which is
    what the passes left behind, both sessions, both streams, and the logits of one window for four models. The files of
    the source and the store are let go of block by block, so they do not add up.

    Args: artifact: predicted bytes of the deployable folder.
    """
    from compress.maths.activations import SPILL_BYTES

    passes = 3 * sizes.largest_block + sizes.statistics + min(sizes.activations, SPILL_BYTES)
    passes += min(sizes.backward, 2 * SPILL_BYTES)
    # beside the baseline's session, or as verification holds them: as shipped, exact, and the folder's other graph
    sessions = max(int(1.1 * sizes.float_weights) + int(1.7 * artifact), 3 * int(1.7 * artifact))
    streams = 3 * sizes.outer + 2 * min(sizes.hidden_bytes, SPILL_BYTES)
    logits = 6 * sizes.window * sizes.vocabulary * 4
    evaluation = BASE_MEMORY + passes + sessions + streams + logits
    training = LOADED_MEMORY + sizes.training if sizes.training else 0
    return max(evaluation, training)


def disk_bytes(sizes: Sizes, specs: Iterable[LayerSpec], model: Model, artifact: int) -> int:
    """Largest use of the output's disk: the store, and then the artifact and the baseline, or what passes need before:
    spilled activations, earlier stages, and the state of a training twice while it is written anew."""
    passes = sizes.activations + sizes.backward + sizes.between + 2 * sizes.saved
    return model_bytes(specs, model) + artifact + sizes.source + passes


def seconds(sizes: Sizes, profile: Profile) -> float:
    """Passes over the calibration and quality tokens and through what is trained, at a share of the float32 peak, plus
    what is fixed."""
    peak = profile.peak.dense_gflops_per_core.get("float32")
    threads = (profile.cpu and profile.cpu.threads) or 2
    rate = (peak.value if peak else HOST_GFLOPS_PER_CORE) * 1e9 * threads * 0.5
    # forward once, then each block again, and back through it by its inputs alone
    tokens = 2 * sizes.tokens + 3 * sizes.backward_tokens + sizes.trained_tokens
    forward = 2.0 * sizes.block_weights * (tokens + 4 * sizes.quality_tokens)
    head = 2.0 * (sizes.outer / 4) * (4 * sizes.quality_tokens + sizes.headed_tokens)
    solve = sizes.block_weights * sizes.largest_inputs / 2.0 if sizes.tokens else 0.0
    return BASE_SECONDS + (forward + head + solve) / rate + sizes.source / 300e6
