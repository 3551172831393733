"""SparseGPT: weights become zero column by column; those that are left absorb the error."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress import solve
from compress.engine.allocating import Allocating
from compress.engine.blockpass import Block, BlockPass, Changed
from compress.engine.layer_stats import LayerStats, Stat
from compress.engine.part import Part
from compress.engine.prune_pass import REACHED, UNREACHED
from compress.engine.quantizing import FormatField, stored_as
from compress.errors import UsageError
from compress.formats.base import Format, Params, QuantTensor, Rounder
from compress.layer import Layer, LayerKind, LayerSpec
from compress.maths import pruning
from compress.maths.hessian import damped, inverse_factor
from compress.solve import System


class SparseGpt(Allocating, BlockPass):
    """SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774): which weights become zero is decided column by column,
    as they then are, and the columns after them absorb the error. Other than in the paper, the count is kept over the
    whole weight rather than in every run of columns (`maths.pruning.prune`), weak columns come first (for N:M strong
    ones), the values that are left are then solved for again, and layers are taken in the order in which data reach
    them, each with the inputs that the ones before it, already pruned, put out.

    Settings: `sparsity` the share that becomes zero; `pattern` among which weights: `layer`, `row`, `N:M` such as 2:4
    (N kept of every M input columns), `RxC` such as 16x16 (whole blocks), in a grouped convolution within each group;
    `damp` share of the mean diagonal added to the Hessian (doubled, and reported, while it cannot be factorised);
    `refit` rounds of the second solve (`maths.pruning.refit`); `mismatch` how much of the difference between the inputs
    and the uncompressed model's the weight makes up for first (`solve.matched`; 0 saves the second stream of
    activations; none in image models and among experts); `format` rounds what stays in the same pass: each column's
    mask and codes are decided when its turn comes, and the columns after it absorb both errors. Groups are fitted to
    what a first solve leaves, pruned weights not counted; `clip` searches each group's range; then `sweeps` of descent
    choose scales and codes again within the mask, in place of `refit`, as in gptq. For a format that decides one column
    at a time and stores zero exactly.
    """

    name: ClassVar[str] = "sparsegpt"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.HESSIAN})
    kinds: ClassVar[frozenset[LayerKind]] = REACHED

    damp: float = Field(default=0.05, gt=0, le=1)
    refit: int = Field(default=16, ge=0)
    mismatch: float = Field(default=0.8, ge=0, le=1)
    format: FormatField | None = None
    clip: bool = True
    sweeps: int = Field(default=4, ge=0)

    @model_validator(mode="after")
    def _check_format(self) -> Self:
        form = self.format
        if form is not None and (form.step != 1 or form.codes_per_unit != 1 or not form.holds_zero):
            reason = "cannot store zero exactly" if form.step == 1 else "decides several columns together"
            raise UsageError(
                f"{self.name}: {form} {reason}, so what is pruned could not be rounded in the same pass. Choose an "
                "integer grid with symmetric or asymmetric scheme, a float format, nf4, or leave format out."
            )
        return self

    @property
    def wants(self) -> frozenset[Stat]:
        found = [self, *(self.with_settings(each) for each in self.overrides.values())]
        cross = {Stat.CROSS} if any(item.mismatch for item in found) else set()
        shared = {Stat.SHARING} if any(item.format and item.format.shares_peak for item in found) else set()
        return self.needs | cross | shared

    def fills(self) -> frozenset[Part]:
        return super().fills() | ({Part.WEIGHT} if self.format else set())

    @property
    def in_turn(self) -> bool:
        return True

    def plan(self, spec: LayerSpec) -> LayerSpec:
        pattern = self.parsed()
        if pattern.kind == "block" and spec.shape[0] // spec.groups % pattern.size[0]:
            raise UsageError(
                f"{self.name}: layer {spec.name}: pattern={pattern} takes runs of {pattern.size[0]} output rows, and "
                f"each of its groups has {spec.shape[0] // spec.groups}. Choose another pattern, or leave it out "
                f"(ignore=[{spec.name}])."
            )
        if self.format is None:
            return super().plan(spec)
        if spec.groups > 1:
            raise UsageError(
                f"{self.name}: {spec.name} is a convolution in {spec.groups} groups, which format={self.format} cannot "
                f"round in the same pass. Leave format out and add gptq after it, or leave the layer out "
                f"(ignore=[{spec.name}])."
            )
        return stored_as(self.name, self.format, super().plan(spec))

    def block(self, block: Block) -> Changed:
        systems: dict[object, System] = {}  # layers that are fed the same tensor have the same statistics
        changed: dict[str, Layer] = {}
        for name, item in block.chosen.items():
            assert isinstance(item, SparseGpt)
            changed[name] = item._pruned(block.layers[name], block.stats.get(name, LayerStats()), systems)
        return Changed(changed)

    def _pruned(self, layer: Layer, stats: LayerStats, systems: dict[object, System]) -> Layer:
        size, weight = layer.shape[1], layer.float_weight()
        if stats.hessian is None:
            left = weight.where(self.keep(layer, weight.abs()), 0.0)
            return self.pruned(layer, left if self.format is None else self._nearest(left, stats), (UNREACHED,))
        parts: list[Tensor | QuantTensor] = []
        used = []
        # a grouped convolution's output channels see their own input channels of a patch, which stand together
        for place, rows in enumerate(weight.chunk(layer.groups)):
            key = id(stats), place, self.damp, self.pattern
            if key not in systems:
                own = slice(place * size, (place + 1) * size)
                systems[key] = self._system(stats.hessian[own, own])
            used.append(systems[key])
            parts.append(self._solved(rows, stats if layer.groups == 1 else replace(stats, cross=None), systems[key]))
        worst = max(used, key=lambda system: system.doubled)
        whole = parts[0] if self.format else torch.cat([part for part in parts if isinstance(part, Tensor)])
        return self.pruned(layer, whole, tuple(worst.notes(stats.tokens, len(stats.hessian))))

    def _system(self, hessian: Tensor) -> System:
        columns = pruning.column_order(hessian.diagonal(), self.parsed())
        return System(hessian, columns, *inverse_factor(hessian, self.damp, columns))

    def _solved(self, weight: Tensor, stats: LayerStats, system: System) -> Tensor | QuantTensor:
        """weight (rows, in) → the same with its zeros."""
        target, hessian = system.target(weight, stats.cross, self.mismatch), damped(system.hessian, system.damp)
        found, mask = self._in_columns(target, system)
        if self.format is None:
            return pruning.refit(target, found, mask, hessian, self.refit)
        form, params = self.format, self._fitted(found, stats)
        found, mask = self._in_columns(target, system, form.rounder(params, system.columns))
        if not self.sweeps:
            return self._packed(found, form, params)
        codes, params = solve.improve(target, found, hessian, form, params, self.sweeps, mask)
        return form.pack(codes, params, (weight.shape[0], weight.shape[1]))

    def _in_columns(self, target: Tensor, system: System, rounder: Rounder | None = None) -> tuple[Tensor, Tensor]:
        """See `maths.pruning.prune`, in stored order."""
        ordered, places = target[:, system.columns], torch.argsort(system.columns)
        found, mask = pruning.prune(ordered, system.factor, self.parsed(), self.sparsity, rounder=rounder)
        return found[:, places], mask[:, places]

    def _fitted(self, weight: Tensor, stats: LayerStats) -> Params:
        """The format's parameters for what is left of a weight (out, in); zeros ask for no range."""
        assert self.format is not None
        return self.format.fit(weight, search=self.clip, peak=stats.peak)

    def _nearest(self, weight: Tensor, stats: LayerStats) -> QuantTensor:
        """A weight (out, in) with zeros, rounded as it is."""
        assert self.format is not None
        return self._packed(weight, self.format, self._fitted(weight, stats))

    @staticmethod
    def _packed(weight: Tensor, form: Format, params: Params) -> QuantTensor:
        codes, _ = form.quantize(weight, params, torch.arange(weight.shape[1]))
        return form.pack(codes, params, (weight.shape[0], weight.shape[1]))
