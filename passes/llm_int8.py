"""llm_int8: LLM.int8(), the 8-bit weights and inputs of bitsandbytes; inputs' outlier columns stay in float."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.engine.layer_stats import LayerStats
from compress.engine.layerpass import LayerPass
from compress.engine.part import Part
from compress.errors import InputError
from compress.formats.int_grid import IntGrid
from compress.layer import ActSpec, Layer, LayerKind, LayerSpec
from compress.maths import bnb, products

WEIGHT = IntGrid(8, "channel")
LIMIT = 127


class LlmInt8(LayerPass):
    """LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339). Needs no data.

    The weight: int8 per output row, codes as bitsandbytes makes them from the weight in float16. Its scales, largest
    magnitude / 127, are stored in float16, within 0.05 % of bitsandbytes' float32. The input: int8 per token, but for
    columns in which any magnitude reaches `threshold`; which ones is decided at every call.
    Settings: `threshold` (0: no column is kept); `library`: have the installed bitsandbytes (extra `bitsandbytes`)
    make the codes; ours are the same.
    """

    name: ClassVar[str] = "llm_int8"
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({LayerKind.LINEAR})
    also: ClassVar[frozenset[Part]] = frozenset({Part.ACT})
    keeps_zeros: ClassVar[bool] = True

    threshold: float = Field(default=6.0, ge=0, allow_inf_nan=False)
    library: bool = False

    def plan(self, spec: LayerSpec) -> LayerSpec:
        if self.library:
            bnb.require_bitsandbytes(self.name)
        return replace(spec, format=WEIGHT, act=ActSpec(self._inputs()))

    def _inputs(self) -> IntGrid:
        return IntGrid(8, "token", outliers=self.threshold or None)

    def layer(self, layer: Layer, stats: LayerStats) -> Layer:
        weight = layer.float_weight().half()
        if not products.all_finite(weight):
            raise InputError(
                f"llm_int8: the weight of {layer.name} holds magnitudes above 65504 or NaN, which float16 cannot. "
                "Leave it out (ignore), or use rtn(format=int8(channel))."
            )
        codes, largest = _from_library(weight) if self.library else vectorwise(weight)
        scale = (largest / LIMIT).half().clamp(min=2.0**-24)[:, None]
        params = {"scale": scale, "zero": torch.full_like(scale, 128.0, dtype=torch.float32)}
        packed = WEIGHT.pack((codes.short() + 128).to(torch.uint8), params, layer.shape)
        return replace(layer, weight=packed, act=ActSpec(self._inputs()))


def vectorwise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows to int8: round(w · (127 / max|w|)), ties to even.

    Args: weight (out, in) float16. Returns: codes (out, in) int8, largest magnitudes (out,) float32.
    """
    largest = weight.abs().amax(1).float()
    inverse = torch.where(largest > 0, LIMIT / largest, torch.zeros(1))  # a row of zeros
    return torch.round(weight.float() * inverse[:, None]).to(torch.int8), largest


def _from_library(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same from bitsandbytes.functional.int8_vectorwise_quant."""
    codes, largest, _ = bnb.functional(LlmInt8.name).int8_vectorwise_quant(weight.contiguous())
    return codes.masked_fill((largest == 0)[:, None], 0), largest
