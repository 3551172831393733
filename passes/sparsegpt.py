"""SparseGPT: weights become zero column by column; those that are left absorb the error."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.engine.blockpass import Block, BlockPass, Changed
from compress.engine.layer_stats import LayerStats, Stat
from compress.engine.prune_pass import REACHED, UNREACHED, Pruning
from compress.errors import UsageError
from compress.layer import Layer, LayerKind, LayerSpec
from compress.maths import pruning
from compress.maths.hessian import damped, inverse_factor
from compress.solve import System


class SparseGpt(Pruning, BlockPass):
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
    activations; none in image models and among experts).
    """

    name: ClassVar[str] = "sparsegpt"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.HESSIAN})
    kinds: ClassVar[frozenset[LayerKind]] = REACHED

    damp: float = Field(default=0.05, gt=0, le=1)
    refit: int = Field(default=16, ge=0)
    mismatch: float = Field(default=0.8, ge=0, le=1)

    @property
    def wants(self) -> frozenset[Stat]:
        found = [self, *(self.with_settings(each) for each in self.overrides.values())]
        return self.needs | ({Stat.CROSS} if any(item.mismatch for item in found) else set())

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
        return super().plan(spec)

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
            return self.pruned(layer, weight.where(self.keep(layer, weight.abs()), 0.0), (UNREACHED,))
        parts, used = [], []
        # a grouped convolution's output channels see their own input channels of a patch, which stand together
        for place, rows in enumerate(weight.chunk(layer.groups)):
            key = id(stats), place, self.damp, self.pattern
            if key not in systems:
                own = slice(place * size, (place + 1) * size)
                systems[key] = self._system(stats.hessian[own, own])
            used.append(systems[key])
            parts.append(self._solved(rows, stats.cross if layer.groups == 1 else None, systems[key]))
        worst = max(used, key=lambda system: system.doubled)
        return self.pruned(layer, torch.cat(parts), tuple(worst.notes(stats.tokens, len(stats.hessian))))

    def _system(self, hessian: Tensor) -> System:
        columns = pruning.column_order(hessian.diagonal(), self.parsed())
        return System(hessian, columns, *inverse_factor(hessian, self.damp, columns))

    def _solved(self, weight: Tensor, cross: Tensor | None, system: System) -> Tensor:
        """weight (rows, in) → the same with its zeros."""
        target = system.target(weight, cross, self.mismatch)
        found, mask = pruning.prune(target[:, system.columns], system.factor, self.parsed(), self.sparsity)
        places = torch.argsort(system.columns)
        found, mask = found[:, places], mask[:, places]
        return pruning.refit(target, found, mask, damped(system.hessian, system.damp), self.refit)
