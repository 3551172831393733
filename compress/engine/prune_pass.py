"""Settings of passes that prune weights, and what they report."""

from __future__ import annotations

from abc import ABC
from dataclasses import replace
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.engine.layer_stats import LayerStats
from compress.engine.layerpass import Pass
from compress.engine.part import Part
from compress.errors import InputError, UsageError
from compress.formats.base import QuantTensor
from compress.layer import Layer, LayerKind, LayerSpec, Zeros
from compress.maths import products
from compress.maths.masks import Pattern

UNREACHED = "no calibration token reached it: pruned as if its inputs were alike"


class Pruning(Pass, ABC):
    """Settings of passes that set weights to zero: `sparsity` the share that becomes zero, `pattern` which (see
    `Pattern`). Weights stay plain tensors; passes that give them a format later keep the zeros (`Layer.mask`)."""

    part: ClassVar[Part] = Part.VALUES
    before: ClassVar[frozenset[Part]] = frozenset({Part.WEIGHT})
    prunes: ClassVar[bool] = True
    any_dtype: ClassVar[bool] = True
    opaque: ClassVar[bool] = True

    sparsity: float = Field(default=0.5, gt=0, lt=1)
    pattern: str = "layer"

    @model_validator(mode="after")
    def _check_pattern(self) -> Self:
        pattern = self.parsed()
        if pattern.fixed is not None and "sparsity" in self.model_fields_set and self.sparsity != pattern.fixed:
            raise UsageError(
                f"{self.name}: sparsity={self.sparsity:g} and pattern={pattern}, which is a sparsity of "
                f"{pattern.fixed:g}, contradict each other. Leave sparsity out."
            )
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest share that a layer may lose."""
        return self.sparsity, self.sparsity

    def parsed(self) -> Pattern:
        try:
            return Pattern.parse(self.pattern)
        except UsageError as error:
            raise UsageError(f"{self.name}: {error}") from error

    def plan(self, spec: LayerSpec) -> LayerSpec:
        pattern = self.parsed()
        try:
            pattern.check(spec.shape)
        except UsageError as error:
            raise UsageError(
                f"{self.name}: layer {spec.name}: {error} Choose another pattern, or leave it out "
                f"(ignore=[{spec.name}])."
            ) from error
        rivals = pattern.rivals(spec.shape)
        for sparsity in self.bounds:
            kept = pattern.kept(spec.shape, sparsity)
            if kept in (0, rivals):
                raise UsageError(
                    f"{self.name}: sparsity={sparsity:g} (pattern={pattern}) of {spec.name}, which is "
                    f"{spec.shape[0]} x {spec.shape[1]}, rounds to {'nothing' if kept else 'all of it'}. Choose "
                    f"another sparsity, or leave it out (ignore=[{spec.name}])."
                )
        if pattern.kind == "n:m" and spec.kernel is not None and spec.kernel[1:] != (1, 1):
            raise UsageError(
                f"{self.name}: pattern={pattern} runs along input channels, and the columns of {spec.name} are taps of "
                f"a {spec.kernel[1]}x{spec.kernel[2]} kernel too. Choose layer or row, or leave it out "
                f"(ignore=[{spec.name}])."
            )
        return replace(spec, zeros=Zeros(pattern, pattern.left(spec.shape, self.sparsity)))

    def keep(self, layer: Layer, scores: Tensor) -> Tensor:
        """scores (out, in) ≥ 0 → (out, in) bool, true where a weight stays. Raises: InputError for NaN."""
        if not products.all_finite(scores):
            raise InputError(
                f"{self.name}: scores of {layer.name} are NaN or infinite: its weight or the statistics of its inputs "
                "are. Check the model and the calibration data."
            )
        pattern = self.parsed()
        return pattern.keep(scores, pattern.kept(layer.shape, self.sparsity))

    def pruned(self, layer: Layer, weight: Tensor | QuantTensor, notes: tuple[str, ...] = ()) -> Layer:
        """The layer with a weight (out, in) that has its zeros, with a note of them: float32, which is stored as the
        layer's was, or in a format."""
        assert isinstance(layer.weight, Tensor)
        stored = weight.to(layer.weight.dtype) if isinstance(weight, Tensor) else weight
        decoded = stored if isinstance(stored, Tensor) else stored.dequantize()
        zeros = 1 - int(torch.count_nonzero(decoded)) / decoded.numel()
        note = (
            f"{100 * zeros:.4g} % of the weights are zero ({self.pattern}), stored and computed like others; "
            "pack_sparse leaves them out of what is stored, which makes nothing faster"
        )
        return replace(layer, weight=stored, notes=(note, *notes))


def input_norms(layer: Layer, stats: LayerStats) -> tuple[Tensor, tuple[str, ...]]:
    """Root mean square of each input, (1, in), of a grouped convolution (out, in); a note where there is none: then
    they are 1."""
    power = stats.mean_square if stats.hessian is None else stats.hessian.diagonal()
    if power is None:
        return torch.ones(1, layer.shape[1]), (UNREACHED,)
    norms = power.clamp(min=0).sqrt().reshape(layer.groups, layer.shape[1])
    return norms.repeat_interleave(layer.shape[0] // layer.groups, 0) if layer.groups > 1 else norms, ()


REACHED: frozenset[LayerKind] = frozenset({LayerKind.LINEAR, LayerKind.EXPERT, LayerKind.CONV})
"""Kinds of layers whose inputs have second moments."""
