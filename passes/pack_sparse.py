"""pack_sparse: pruned weights stored without their zeros; none of them changes."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self

import torch
from pydantic import model_validator
from torch import Tensor

from compress.engine.layer_stats import LayerStats
from compress.engine.layerpass import LayerPass
from compress.engine.part import Part
from compress.engine.quantizing import FormatField
from compress.errors import UsageError
from compress.formats.sparse import TWO_OF_FOUR, Sparse, crowded
from compress.layer import Layer, LayerSpec
from compress.maths.masks import Pattern


class PackSparse(LayerPass):
    """Store what a pass before has pruned as the weights that are left and their places. Loses nothing, needs no data,
    and makes nothing faster: what computes with such a layer fills the zeros in again.

    Settings: `format`: `sparse(mask=bitmask)`, a bit per weight and those that are not zero, or `sparse(mask=2:4)`, two
    of every four input columns. Left out, `density` is what the layer has, `values` its own dtype. For a model that
    came pruned, where no pass of the recipe says how much is left, give `density`, the largest share of weights that
    are not zero, such as `sparse(density=0.5)`.
    """

    name: ClassVar[str] = "pack_sparse"
    part: ClassVar[Part] = Part.WEIGHT
    keeps_zeros: ClassVar[bool] = True

    format: FormatField = Sparse()

    @model_validator(mode="after")
    def _check_format(self) -> Self:
        self._sparse()
        return self

    def _sparse(self) -> Sparse:
        if not isinstance(self.format, Sparse):
            raise UsageError(
                f"{self.name}: format={self.format} is no layout for pruned weights. Allowed: sparse(mask=bitmask), "
                "sparse(mask=2:4). For grids and codes use rtn or gptq after the pass that prunes; they keep the zeros."
            )
        return self.format

    def plan(self, spec: LayerSpec) -> LayerSpec:
        form, zeros = self._sparse(), spec.zeros
        if zeros is None and form.mask != TWO_OF_FOUR and form.density is None:
            raise UsageError(
                f"{self.name}: no pass before it prunes layer {spec.name}, or one that cannot say beforehand how much. "
                "Add one that does (magnitude, wanda, ria, sparsegpt), leave the layer out "
                f"(ignore=[{spec.name}]), or, if the model came pruned, give the share of weights that are not zero: "
                "format=sparse(density=0.5)."
            )
        if zeros is not None and form.mask == TWO_OF_FOUR and not zeros.pattern.is_two_of_four:
            raise UsageError(f"{self.name}: layer {spec.name}: {_other(zeros.pattern)}")
        kept = 0 if zeros is None else zeros.kept
        return replace(spec, format=form.filled(kept, spec.shape, spec.source_dtype))

    def layer(self, layer: Layer, stats: LayerStats) -> Layer:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        left = int(torch.count_nonzero(weight))
        form = self._sparse().filled(left, layer.shape, weight.dtype)
        self._require_room(layer.name, weight, form, left)
        values = weight.to(form.dense)
        if not torch.equal(values.to(weight.dtype), weight):
            changed = int((values.to(weight.dtype) != weight).sum())
            raise UsageError(
                f"{self.name}: values={form.values} would change {changed} weights of {layer.name}, which are "
                f"{str(weight.dtype).removeprefix('torch.')}. Leave values out."
            )
        packed = form.packed(values)
        return replace(layer, weight=packed, notes=(_told(packed.nbytes, weight, left),))

    def _require_room(self, name: str, weight: Tensor, form: Sparse, left: int) -> None:
        """Raises: UsageError for a weight that is not pruned as the format stores it, with what was found."""
        share = f"{100 * (1 - left / weight.numel()):.4g} % of its weights are zero"
        if form.mask == TWO_OF_FOUR and (more := crowded(weight)):
            runs = len(weight) * -(-weight.shape[1] // 4)
            raise UsageError(
                f"{self.name}: layer {name} is not 2:4: {more} of its {runs} runs of four input columns have more than "
                f"two weights that are not zero ({share}). Prune it with pattern=2:4, take sparse(mask=bitmask), or "
                f"leave it out (ignore=[{name}])."
            )
        if left > form.capacity(_shape(weight)):
            raise UsageError(
                f"{self.name}: layer {name} is not pruned so far: {share}, and density={form.density:g} is for at "
                f"least {100 * (1 - (form.density or 0)):.4g} %. Give a larger density for it, in overrides, or leave "
                f"it out (ignore=[{name}])."
            )


def _shape(weight: Tensor) -> tuple[int, int]:
    return int(weight.shape[0]), int(weight.shape[1])


def _other(pattern: Pattern) -> str:
    return (
        f"it is pruned by pattern={pattern}, which may leave more than two of four input columns. Prune it with "
        "pattern=2:4, or take sparse(mask=bitmask)."
    )


def _told(size: int, weight: Tensor, left: int) -> str:
    """For the report: what it came to, and where it would have been better not to."""
    told = f"{100 * (1 - left / weight.numel()):.4g} % of the weights are zero, stored in {size} bytes"
    if size >= weight.nbytes:
        return f"{told}; dense they are {weight.nbytes}, which is no more: leave the layer out of pack_sparse"
    return f"{told}, {size / weight.nbytes:.3g} of the dense weight's; size only, since nothing computes from them"
