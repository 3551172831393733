"""Trellis codes: two-sided Hadamard mixing, then tiles of weights as paths through a trellis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator

from compress import solve_trellis
from compress.engine.blockpass import Block, BlockQuantPass, Changed
from compress.engine.in_turn import Systems, check_mismatch, crossed, refuse_fixed
from compress.engine.layer_stats import LayerStats, Stat
from compress.engine.quantizing import FormatField
from compress.errors import UsageError
from compress.formats.base import Format
from compress.formats.trellis import Trellis as Form
from compress.layer import Layer, LayerKind
from compress.maths.hessian import damped
from compress.solve import System


class Trellis(BlockQuantPass):
    """Trellis-coded quantization (QTIP, Tseng et al. 2024, arXiv 2406.11235) in the form of EXL3 files. Inputs and
    outputs are scaled, given random signs and mixed by Hadamard matrices, 128 at a time, which makes weights look like
    Gaussian noise; rows of tiles of 16 by 16 are coded in turn, each by the best path through a trellis of 2^16 states
    (no shortcut: compress/maths/trellis.py), and those after it absorb what it loses.

    Settings: `format` a trellis, or `bits`, 1 to 8, for its width; `damp`, `order` (of rows of tiles), `sequential` and
    `mismatch` as in gptq; `refit` sweeps in which the scales of outputs and of inputs are chosen again for the codes
    (0: none), which never makes the error of the output larger. Layers whose sizes are not multiples of 128 are
    refused: leave them out, or write a smaller `block` in the format. Without compiled kernels the search takes some
    forty times as long, and the report says so.
    """

    name: ClassVar[str] = "trellis"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.HESSIAN})
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({LayerKind.LINEAR, LayerKind.EXPERT})
    any_dtype: ClassVar[bool] = True
    opaque: ClassVar[bool] = True

    format: FormatField = Form()
    bits: int | None = Field(default=None, ge=1, le=8)
    damp: float = Field(default=0.05, gt=0, le=1)
    order: str = Field(default="static", pattern="^(static|given)$")
    sequential: bool = True
    mismatch: float = Field(default=0.8, ge=0, le=1)
    refit: int = Field(default=2, ge=0)

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        if not isinstance(self.format, Form):
            raise UsageError(
                f"trellis: format={self.format} is no trellis. Give trellis(bits=2), or use another pass: vptq for "
                "codebooks, gptq for grids."
            )
        if self.group_size is not None:
            raise UsageError("trellis: group_size is for integer formats. Leave it out.")
        check_mismatch(self)
        for pattern, settings in self.overrides.items():
            refuse_fixed(self.name, pattern, settings, ("sequential", "mismatch"))
        return self

    def _shortened(self, form: Format, short: Mapping[str, Any]) -> Format:
        bits = short.get("bits")
        return form if bits is None or not isinstance(form, Form) else replace(form, bits=bits)

    @property
    def wants(self) -> frozenset[Stat]:
        return super().wants | crossed(self)

    @property
    def in_turn(self) -> bool:
        return self.sequential

    def block(self, block: Block) -> Changed:
        changed, systems = {}, Systems()
        for name, item in block.chosen.items():
            assert isinstance(item, Trellis)
            layer, stats = block.layers[name], block.stats.get(name, LayerStats())
            changed[name] = _coded(item, layer, stats, _system(item, layer, stats, systems))
        return Changed(changed)


def _system(item: Trellis, layer: Layer, stats: LayerStats, systems: Systems) -> System:
    """The second moments of a layer's inputs, factorised where the target is found by them; codes are chosen by a
    factor of the turned ones (`solve_trellis.encode`)."""
    if item.mismatch and stats.cross is not None:
        return systems.of(layer, stats, item.damp, 1, "given")
    hessian = torch.eye(layer.shape[1]) if stats.hessian is None else stats.hessian
    return System(hessian, torch.arange(len(hessian)), torch.empty(0), item.damp, 0)


def _coded(item: Trellis, layer: Layer, stats: LayerStats, system: System) -> Layer:
    form = item.resolved_format()
    assert isinstance(form, Form)
    target = system.target(layer.float_weight(), stats.cross, item.mismatch)
    hessian = damped(system.hessian, system.damp)
    params = form.fit(target, importance=hessian.diagonal())
    codes = solve_trellis.encode(form, target, hessian, params, item.order)
    params = solve_trellis.refit(form, target, hessian, codes, params, item.refit)
    return replace(layer, weight=form.pack(codes, params, layer.shape), notes=tuple(_notes(stats, system)))


def _notes(stats: LayerStats, system: System) -> list[str]:
    """What a reader of the report should know about the solve of one layer."""
    if stats.hessian is None:
        return ["no calibration token reached it: coded as if its inputs were alike (identity Hessian)"]
    return system.notes(stats.tokens, len(system.hessian))
