"""GPTQ: quantize a weight column by column; the columns still to come absorb each column's error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress import solve
from compress.engine import backward
from compress.engine.blockpass import Block, BlockQuantPass, Changed
from compress.engine.in_turn import check_guided, check_mismatch, crossed
from compress.engine.layer_stats import LayerStats, Stat
from compress.errors import UsageError
from compress.formats.base import Format, Params
from compress.layer import Layer, LayerKind
from compress.maths.hessian import damped as hessian_damped
from compress.models.model import Model
from compress.solve import System


class Gptq(BlockQuantPass):
    """GPTQ (Frantar et al. 2023, arXiv 2210.17323), with static groups: scales are fitted to the original groups first,
    then columns are taken in descending order of the Hessian's diagonal, so that no reordering is left at run time.
    Then sweeps of descent choose scales and codes again, each with all others as they are (compress/solve.py).

    Settings: `format` the grid; `damp` share of the mean diagonal added to the Hessian (doubled, and reported, while it
    cannot be factorised); `clip` searches each group's range; `order`: `static` as above or `given` for the stored
    order; `refit` sweeps of descent after the columns (none for grouped convolutions and for formats that decide
    several columns together); `sequential` takes the layers of a block in the order in which data reach them, each with
    the inputs that the ones before it, already quantized, put out (not image models, nor within a mixture of experts);
    `mismatch` how much of the difference between those inputs and the uncompressed model's the weight makes up for
    first (`solve.matched`; needs `sequential`; 0 saves the second stream of activations, which is more than half of the
    time); `guided` groups of a layer's output rows that each get a Hessian in which tokens weigh as much as the loss
    feels these rows (GuidedQuant, Kim et al. 2025, arXiv 2505.07004; language models only; 0: one Hessian for all rows,
    unweighed). It takes a backward pass first, with the hidden states of every block's door on disk. `mismatch` goes by
    the plain Hessian still, since the mismatch of both streams is an unweighed mean too; experts, and layers outside
    the blocks, keep it altogether and say so. Off by default: on a code model of 7 M parameters it gained nothing at 4,
    3 or 2 bits (KL +5, 0 and +1 %, ± 4); the paper reports gains on models a thousand times as large.
    """

    name: ClassVar[str] = "gptq"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.HESSIAN})
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({LayerKind.LINEAR, LayerKind.EXPERT, LayerKind.CONV})
    any_dtype: ClassVar[bool] = True
    opaque: ClassVar[bool] = True
    keeps_zeros: ClassVar[bool] = True

    damp: float = Field(default=0.05, gt=0, le=1)
    clip: bool = True
    order: str = Field(default="static", pattern="^(static|given)$")
    refit: int = Field(default=4, ge=0)
    sequential: bool = True
    mismatch: float = Field(default=0.8, ge=0, le=1)
    guided: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check_order_of_work(self) -> Self:
        check_mismatch(self)
        form = self.resolved_format()
        if self.guided and form.row_params is None:
            raise UsageError(
                f"gptq: guided={self.guided} decides groups of output rows apart, which {form} cannot, since its "
                "blocks cross rows. Use an integer or float format, or set guided=0."
            )
        for pattern, settings in self.overrides.items():
            check_guided(self.name, pattern, settings, self.guided)
            late = "mismatch" in settings and Stat.CROSS not in self.wants
            if "sequential" in settings or late:
                name = "sequential" if "sequential" in settings else "mismatch"
                raise UsageError(
                    f"gptq: overrides of '{pattern}' may not set {name} here: it decides how data are collected for "
                    "all layers. Set it for the whole pass; an override may then lower mismatch."
                )
        return self

    @property
    def wants(self) -> frozenset[Stat]:
        return super().wants | crossed(self) | ({Stat.GUIDED} if self.guided else set())

    @property
    def row_groups(self) -> int:
        return self.guided

    @property
    def in_turn(self) -> bool:
        return self.sequential

    def check(self, model: Model) -> None:
        if self.guided:
            backward.check(model)

    def block(self, block: Block) -> Changed:
        together: dict[object, list[tuple[Gptq, Layer]]] = {}
        for name, item in block.chosen.items():
            assert isinstance(item, Gptq)
            layer, stats = block.layers[name], block.stats.get(name)
            # layers that are fed the same tensor have the same statistics, so they can share a solve
            alone = stats is None or layer.groups > 1 or stats.guided is not None
            form = item.resolved_format()
            alike = (id(stats), item.damp, item.order, item.mismatch, form.step, form.codes_per_unit)
            key = name if alone else alike
            together.setdefault(key, []).append((item, layer))
        changed: dict[str, Layer] = {}
        for pairs in together.values():
            item, layer = pairs[0]
            stats = block.stats.get(layer.name, LayerStats())
            if item.guided and stats.guided is not None:
                found = [_guided(item, layer, stats)]
            else:
                found = [_grouped(item, layer, stats)] if layer.groups > 1 else _solved(pairs, stats)
            changed |= {each.name: each for each in found}
        return Changed(changed)

    def layer(self, layer: Layer, stats: LayerStats) -> Layer:
        """One layer by itself."""
        one = {layer.name: layer}
        return self.block(Block(layer.name, one, one, {layer.name: self}, {}, {layer.name: stats})).layers[layer.name]

    def target(self, weight: Tensor, stats: LayerStats, system: System) -> Tensor:
        """The weight (out, in) to come close to."""
        weight = system.target(weight, stats.cross, self.mismatch)
        # what scale layers share was settled before, and no weight may grow out of it
        return weight if stats.peak is None else weight.clamp(-stats.peak, stats.peak)

    def fit(self, weight: Tensor, stats: LayerStats, mask: Tensor | None) -> Params:
        """The format's parameters for a weight (out, in), of which only what the mask leaves counts."""
        weight = weight if mask is None else weight.masked_fill(~mask, 0.0)
        return self.resolved_format().fit(weight, search=self.clip, peak=stats.peak)

    def prepare(self, hessian: Tensor) -> System:
        """What all rows that are multiplied with the same inputs have in common."""
        return System.of(hessian, self.damp, self.resolved_format().step, self.order)


def _solved(pairs: Sequence[tuple[Gptq, Layer]], stats: LayerStats) -> list[Layer]:
    """Layers that share their inputs, solved on end: one factor, and one loop over columns for all of their rows."""
    first, layer = pairs[0]
    hessian = torch.eye(layer.shape[1]) if stats.hessian is None else stats.hessian
    system = first.prepare(hessian)
    rows = [layer.shape[0] for _, layer in pairs]
    whole = first.target(torch.cat([layer.float_weight() for _, layer in pairs]), stats, system)
    targets = torch.split(whole, rows)
    forms = [item.resolved_format() for item, _ in pairs]
    masks = [layer.mask for _, layer in pairs]
    params = [item.fit(target, stats, mask) for (item, _), target, mask in zip(pairs, targets, masks, strict=True)]
    rounders = [
        solve.masked(form.rounder(each, system.columns), mask, system.columns)
        for form, each, mask in zip(forms, params, masks, strict=True)
    ]
    code_rows = [form.code_rows(count) for form, count in zip(forms, rows, strict=True)]
    codes = torch.split(system.codes(whole, solve.stack(rounders, rows), forms[0].step), code_rows)
    notes, damp = _notes(first, stats, system), system.damp
    del system, rounders  # as large as the Hessian, and no longer needed
    can_refit = stats.hessian is not None and forms[0].step == 1 and any(item.refit for item, _ in pairs)
    damped = hessian_damped(hessian, damp) if can_refit else None
    found = []
    for (item, layer), form, target, chosen, fitted in zip(pairs, forms, targets, codes, params, strict=True):
        packed = form.pack(chosen, fitted, layer.shape)
        if damped is not None and item.refit:
            start = packed.dequantize()
            better = solve.improve(target, start, damped, form, fitted, item.refit, layer.mask)
            packed = form.pack(*better, layer.shape)
        found.append(replace(layer, weight=packed, notes=notes))
    return found


def _grouped(item: Gptq, layer: Layer, stats: LayerStats) -> Layer:
    """A grouped convolution: each group of output channels sees its own input channels of a patch, which stand
    together."""
    size, rows, form = layer.shape[1], layer.shape[0] // layer.groups, item.resolved_format()
    if form.code_rows(layer.shape[0]) != layer.shape[0]:
        raise UsageError(
            f"gptq: {form} puts several output rows into one code, and {layer.name} is a convolution in "
            f"{layer.groups} groups, whose rows are decided apart. Choose another format for it, or leave it out."
        )
    whole = torch.eye(layer.groups * size) if stats.hessian is None else stats.hessian
    starts = range(0, layer.groups * size, size)
    systems = [item.prepare(whole[start : start + size, start : start + size]) for start in starts]
    never_on = torch.stack([system.hessian.diagonal() == 0 for system in systems])
    weight = layer.float_weight().masked_fill(never_on.repeat_interleave(rows, 0), 0.0)
    params = item.fit(weight, stats, layer.mask)
    # all rows each time, since a format's blocks may cross rows
    codes = [
        system.codes(weight, solve.masked(form.rounder(params, system.columns), layer.mask, system.columns), form.step)
        for system in systems
    ]
    chosen = torch.cat([each[place * rows :][:rows] for place, each in enumerate(codes)])
    worst = max(systems, key=lambda system: system.doubled)
    return replace(layer, weight=form.pack(chosen, params, layer.shape), notes=_notes(item, stats, worst))


def _guided(item: Gptq, layer: Layer, stats: LayerStats) -> Layer:
    """Each group of output rows with its own Hessian; the target and the first scales are those of all rows."""
    assert stats.guided is not None and stats.hessian is not None
    form, weight = item.resolved_format(), layer.float_weight()
    target = item.target(weight, stats, item.prepare(stats.hessian))
    params = item.fit(target, stats, layer.mask)
    parts = target.tensor_split(len(stats.guided))
    masks = [None] * len(parts) if layer.mask is None else layer.mask.tensor_split(len(parts))
    solved = []
    for hessian, part, mask, fitted in zip(stats.guided, parts, masks, _by_rows(form, params, parts), strict=True):
        system = item.prepare(hessian)
        rounder = solve.masked(form.rounder(fitted, system.columns), mask, system.columns)
        codes = system.codes(part, rounder, form.step)
        if item.refit and form.step == 1:
            start = form.pack(codes, fitted, (len(part), layer.shape[1])).dequantize()
            damped = hessian_damped(hessian, system.damp)
            codes, fitted = solve.improve(part, start, damped, form, fitted, item.refit, mask)
        solved.append((codes, fitted, system))
    codes = torch.cat([each for each, _, _ in solved])
    joined = {name: torch.cat([fitted[name] for _, fitted, _ in solved]) for name in form.row_params or ()}
    worst = max((system for _, _, system in solved), key=lambda system: system.doubled)
    packed = form.pack(codes, {**params, **joined}, layer.shape)
    return replace(layer, weight=packed, notes=_notes(item, stats, worst))


def _by_rows(form: Format, params: Params, parts: Sequence[Tensor]) -> list[Params]:
    """The parameters of runs of rows, as long as the parts of the weight."""
    rows = [len(part) for part in parts]
    split = {name: torch.split(params[name], rows) for name in form.row_params or ()}
    return [{**params, **{name: own[place] for name, own in split.items()}} for place in range(len(parts))]


def _notes(item: Gptq, stats: LayerStats, system: System) -> tuple[str, ...]:
    """What a reader of the report should know about the solve."""
    if stats.hessian is None:
        return ("no calibration token reached it: rounded as if its inputs were alike (identity Hessian)",)
    notes = system.notes(stats.tokens, len(stats.hessian))
    if item.guided and stats.guided is None:
        notes.append(solve.NOT_GUIDED)
    return tuple(notes)
