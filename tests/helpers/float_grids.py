"""Weights on a floating-point grid."""

import torch

from compress.formats.base import QuantTensor
from compress.formats.float_grid import FloatGrid

FORMATS = [
    "fp8_e4m3(channel)",
    "fp8_e5m2(tensor)",
    "fp8_e4m3(group=24)",
    "fp6_e3m2(group=32)",
    "fp5_e2m2(channel, scale=e8m0)",
    "fp3_e2m0(group=16, scale=float32)",
    "fp4_e2m1(channel, scale=float8_e4m3)",
    "mxfp4",
    "mxfp6_e2m3",
    "mxfp6_e3m2",
    "mxfp8_e4m3",
    "mxfp8_e5m2",
    "nvfp4",
]


def weights(rows: int = 7, columns: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def stored(form: FloatGrid, weight: torch.Tensor, **settings: object) -> QuantTensor:
    params = form.fit(weight, **settings)
    codes, _ = form.quantize(weight, params, torch.arange(weight.shape[1]))
    return form.pack(codes, params, tuple(weight.shape))


def loss(form: FloatGrid, weight: torch.Tensor, **settings: object) -> float:
    return float((stored(form, weight, **settings).dequantize() - weight).pow(2).mean())
