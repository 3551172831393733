"""What a pass may ask for about the inputs of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from compress.maths.histogram import Histogram


class Stat(StrEnum):
    """Statistics that a pass may need; the engine collects them with the block as it then is.

    The last four are the engine's: `sharing` which layers are fed the same tensor, `reference` the stream of the model
    as the stage received it (targets of block passes), `cross` the mismatch between both streams, `guided` second
    moments by groups of output rows, weighed by how much the loss feels these (`Pass.row_groups`).
    """

    HESSIAN = "hessian"
    MEAN_SQUARE = "mean_square"
    ABS_MEAN = "abs_mean"
    ABS_MAX = "abs_max"
    HISTOGRAM = "histogram"
    OUTPUTS = "outputs"
    SHARING = "sharing"
    REFERENCE = "reference"
    CROSS = "cross"
    GUIDED = "guided"


@dataclass
class LayerStats:
    """What a pass may ask for about a layer's input x (in,), over all tokens.

    hessian: (in, in) float32, mean of x xᵀ (a convolution's x is an unfolded patch); mean_square (its
    diagonal), abs_mean, abs_max: (in,) float32;
    histogram: of all entries; cross: (in, in) float32, mean of (x_ref − x) xᵀ, x_ref being what the uncompressed prefix
    would put in, and drift: (in, in) float32, that of (x_ref − x)(x_ref − x)ᵀ over one token in `collect.DRIFT_STEP`;
    tokens: rows seen; sharing: the layers that are fed the same tensor, itself included; peak: largest |w| among those
    layers; outputs: histogram of what a convolution puts out, of which integer kernels need the range too (of other
    layers None); guided: (groups, in, in) float32, mean of s x xᵀ for each run of output rows (as
    `Tensor.tensor_split` cuts them), s being the squared gradient of the loss by these rows, 1 in the mean over tokens;
    None for a layer that has no such gradient (compress/engine/backward.py).
    """

    hessian: Tensor | None = None
    mean_square: Tensor | None = None
    abs_mean: Tensor | None = None
    abs_max: Tensor | None = None
    histogram: Histogram | None = None
    cross: Tensor | None = None
    drift: Tensor | None = None
    tokens: int = 0
    sharing: tuple[str, ...] = ()
    peak: float | None = None
    outputs: Histogram | None = None
    guided: Tensor | None = None
