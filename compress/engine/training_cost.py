"""What passes that train take: memory, disk, and tokens through the model. Predicted from shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

from compress.engine.layerpass import Pass
from compress.formats.codebook import Codebook
from compress.formats.int_grid import IntGrid
from compress.formats.trellis import Trellis
from compress.layer import LayerSpec
from compress.models.model import Model
from compress.training.distill import MOST_HELD

LINEAR_COPIES, LOGIT_COPIES = 1.25, 6
"""Fitted: tensors kept for a backward pass, per input and output of a linear layer and per logit."""
CHECK_STEPS, HELD_OUT = 25, 0.125
"""Of compress/training/distill.py: steps between two looks at the held-out loss, and the share of batches that is held
out."""


def inner_shapes(specs: Iterable[LayerSpec]) -> list[tuple[int, int]]:
    """Shapes of the layers inside the blocks."""
    return [spec.shape for spec in specs if spec.segment >= 0]


def float_bytes(model: Model) -> int:
    """Of all layers of a model in float32."""
    return 4 * sum(spec.shape[0] * spec.shape[1] for spec in model.structure.layers.values())


def training_bytes(
    specs: Sequence[LayerSpec], passes: Sequence[Pass], tokens: int, values: int, logits: int, source: int
) -> int:
    """Bytes of the hungriest pass that has the whole model in memory, or trains: both models where it has the whole of
    them, copies of what it trains, and what one batch keeps for its way back.

    Args: tokens: of a batch; values: inputs and outputs of all layers inside the blocks, per token; logits: per token;
    source: bytes of the original's layers in float32.
    """
    whole = sum(spec.shape[0] * spec.shape[1] * 4 for spec in specs)
    grids: dict[int, int] = {}
    for spec in specs:
        if spec.segment >= 0 and isinstance(spec.format, IntGrid | Codebook | Trellis):
            grids[spec.segment] = grids.get(spec.segment, 0) + spec.shape[0] * spec.shape[1] * 4
    found = [0]
    for item in passes:
        if item.held_models and not item.training:
            found.append(int(item.held_models * source + 4 * tokens * LOGIT_COPIES * logits))
        elif item.training:
            kept = LINEAR_COPIES * values + LOGIT_COPIES * logits
            trained = _plain_bytes(specs) if item.renews else sum(grids.values())
            found.append(int(source + whole + item.trained_copies * trained + 4 * tokens * kept))
        elif item.trained_batches:
            kept = LINEAR_COPIES * values / max(1, len({spec.segment for spec in specs if spec.segment >= 0}))
            found.append(int(item.trained_copies * max(grids.values(), default=0) + 4 * tokens * kept))
    return max(found)


def trained_tokens(passes: Sequence[Pass], tokens: int, calibration: int, blocks: int = 0, *, images: bool) -> int:
    """Forward and backward passes of tokens through all blocks: back counts twice, and the original runs too where a
    pass has the whole of both models; in between, held-out batches. Those that try models out run forward only.

    Args: tokens, or images: of a batch; calibration: of all its batches.
    """
    total = 0.0
    for item in passes:
        total += item.trials(blocks)[0] * calibration
        models = 2 if item.training else 1
        rows = item.trained_rows(images) or item.trained_batches * tokens
        held = MOST_HELD * tokens if item.trains_rest else HELD_OUT * calibration
        if rows:
            checks = 2 + rows // max(1, tokens) // CHECK_STEPS
            total += (2 + models) * rows + checks * models * held
    return int(total)


def saved_bytes(specs: Iterable[LayerSpec], passes: Iterable[Pass]) -> int:
    """Bytes of the largest file with the state of a training (compress/training/checkpoint.py)."""
    return int(max((item.saved_copies for item in passes), default=0.0) * _plain_bytes(specs))


def _plain_bytes(specs: Iterable[LayerSpec]) -> int:
    """Of the layers inside the blocks in float32: what is trained where plain weights are."""
    return 4 * sum(map(prod, inner_shapes(specs)))
