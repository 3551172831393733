"""The parts of a layer that passes fill: what the order of a recipe is checked by."""

from __future__ import annotations

from enum import StrEnum


class Part(StrEnum):
    """What a pass decides about a layer. Each part may be filled once."""

    NONE = ""
    """Nothing: the pass rescales or rotates without loss, and what it makes is what later errors are taken against."""

    VALUES = "values"
    """What a weight is, while it stays a plain tensor: pruned, clipped, rounded without a format."""

    WEIGHT = "weight"
    """The format of the weight, with its codes."""

    ACT = "act"
    """The grid that inputs are rounded to when the model runs."""

    PRE = "pre"
    """The transform of the inputs when the model runs."""

    ROUNDING = "rounding"
    """Codes and grids of a weight that has a format, learned anew."""

    BIAS = "bias"
    """The bias, corrected."""

    TUNING = "tuning"
    """Whatever takes gradients once the weight has a format: scales, norms, biases."""


LOSSY = frozenset({Part.VALUES, Part.WEIGHT})
"""Parts whose filling loses something of the weight: errors are taken against what it was before the first of them."""

WORDS = {
    Part.ACT: "input rounding",
    Part.WEIGHT: "weight format",
    Part.ROUNDING: "learned rounding",
    Part.VALUES: "weight values",
    Part.PRE: "input transform",
}
"""What a part is to a reader, where its name does not say it."""
