"""bnb4: the 4-bit weights that bitsandbytes makes (NF4 and FP4), bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self

import torch
from pydantic import model_validator
from torch import Tensor

from compress.engine.layer_stats import LayerStats
from compress.engine.quantizing import FormatField, QuantPass
from compress.errors import UsageError
from compress.formats.base import Params
from compress.formats.lookup import FIXED, Lookup
from compress.layer import Layer, LayerKind, LayerSpec
from compress.maths import bnb

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class Bnb4(QuantPass):
    """4-bit weights as bitsandbytes quantizes them (Dettmers et al. 2023, arXiv 2305.14314): rounding to NF4 or FP4 in
    blocks of the flattened weight. Needs no data.

    Settings: `format`: `nf4(block=64)`, `fp4(block=64)`, with `double` for scales in 8 bits; `library`: have the
    installed bitsandbytes (extra `bitsandbytes`) make the codes. Ours are the same, bit for bit, on every machine and
    without it, so that is for those who want them from the source.
    """

    name: ClassVar[str] = "bnb4"
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({LayerKind.LINEAR, LayerKind.EXPERT})
    keeps_zeros: ClassVar[bool] = True

    format: FormatField = Lookup()
    library: bool = False

    @model_validator(mode="after")
    def _check_format(self) -> Self:
        form = self.resolved_format()
        if not isinstance(form, Lookup) or form.table not in FIXED or not form.flat or form.size not in BLOCKS:
            raise UsageError(
                f"bnb4: format={form} is none of bitsandbytes'. Allowed: nf4(block=64), fp4(block=64), with or without "
                f"double, in blocks of {', '.join(map(str, BLOCKS))}. For other formats use rtn or gptq."
            )
        return self

    def plan(self, spec: LayerSpec) -> LayerSpec:
        if self.library:
            bnb.require_bitsandbytes(self.name)
        return super().plan(spec)

    def layer(self, layer: Layer, stats: LayerStats) -> Layer:
        form, weight = self.resolved_format(), layer.float_weight()
        assert isinstance(form, Lookup)
        if self.library:
            codes, params = _from_library(form, weight)
        else:
            params = form.fit(weight)
            codes, _ = form.quantize(weight, params, torch.arange(weight.shape[1]))
        packed = form.pack(codes, params, layer.shape)
        return replace(layer, weight=packed, notes=_notes(form, layer.shape[1]))


def _from_library(form: Lookup, weight: Tensor) -> tuple[Tensor, Params]:
    """Codes (out, in) uint8 and the stored scales, from bitsandbytes.functional.quantize_4bit."""
    quantize = bnb.functional(Bnb4.name).quantize_4bit
    packed, state = quantize(
        weight.contiguous(), blocksize=form.size, compress_statistics=form.double, quant_type=form.table
    )
    packed = packed.flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: weight.numel()].reshape(weight.shape)
    if not form.double:
        return codes, {"scale": state.absmax}
    nested = {"scale_codes": state.absmax, "scale_max": state.state2.absmax, "scale_mean": state.offset.reshape(1)}
    return codes, nested


def _notes(form: Lookup, columns: int) -> tuple[str, ...]:
    """What bitsandbytes itself gets wrong, as of 0.50.2: cdequantize_blockwise_cpu_nf4_fp32 and its like."""
    if columns % form.size == 0 or columns % 16:
        return ()
    return (
        f"blocks of {form.size} cross its rows of {columns}: bitsandbytes 0.50 decodes those wrongly on CPUs with "
        "AVX-512; other readers do not",
    )
