"""`Lookup`: each weight is an entry of a small table of values, times the scale of its block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from compress.errors import UsageError, nearest
from compress.formats.base import Format, Params, QuantTensor, TensorSpec
from compress.maths import grid, tables
from compress.spec import Call

FIXED = ("nf4", "fp4")
LEARNED = "table"


@dataclass(frozen=True)
class Lookup(Format):
    """value = table[code] · scale, where the scale is the largest magnitude of the block.

    Settings: `table`: `nf4` and `fp4` as bitsandbytes has them, with float32 scales, or `table`: 2^`bits` values
    (2–8 bits) learned per tensor and stored with it, with float16 scales. `size` weights share a scale: a run of the
    whole weight row by row (`block=N`, bitsandbytes' layout, may cross rows), or of one row (`group=N`). `double`:
    the scales are quantized again to 8 bits in blocks of 256.
    Text: `nf4(block=64)`, `fp4(block=64, double)`, `table(bits=3, group=64)`.
    """

    table: str = "nf4"
    bits: int = 4
    size: int = 64
    flat: bool = True
    double: bool = False

    def __post_init__(self) -> None:
        if self.table not in (*FIXED, LEARNED):
            raise UsageError(f"Unknown table '{self.table}'.{nearest(self.table, (*FIXED, LEARNED))}")
        if type(self.bits) is not int or not 2 <= self.bits <= 8 or (self.table in FIXED and self.bits != 4):
            allowed = "2 to 8 bits" if self.table == LEARNED else "4 bits, always"
            raise UsageError(f"{self.table}: bits={self.bits!r} is not allowed. It has {allowed}.")
        if type(self.size) is not int or self.size < 2:
            name = "block" if self.flat else "group"
            raise UsageError(f"{self.table}: {name}={self.size!r} is not a count of weights; give 16, 32, 64, 128 …")
        if type(self.double) is not bool:
            raise UsageError(f"{self.table}: double={self.double!r} is neither true nor false.")

    @classmethod
    def from_call(cls, call: Call, **named: str) -> Self:
        settings: dict[str, Any] = dict(call.kwargs)
        for word in call.args:
            if word != "double":
                raise UsageError(f"{call.name}: unknown word '{word}'.{nearest(str(word), ('double',))}")
            if "double" in settings:
                raise UsageError(f"{call.text()}: double is given twice. Keep one of them.")
            settings["double"] = True
        call.require_known(("block", "group", "double", "bits")[: 3 if call.name in FIXED else 4])
        if {"block", "group"} <= set(settings):
            raise UsageError(f"{call.text()}: block and group are two layouts of the scales. Keep one of them.")
        flat = "block" in settings or ("group" not in settings and call.name in FIXED)
        size = settings.pop("block", settings.pop("group", 64))
        return cls(named["table"], size=size, flat=flat, **settings)

    def __str__(self) -> str:
        bits = "" if self.table in FIXED else f"bits={self.bits}, "
        layout = "block" if self.flat else "group"
        return f"{self.table}({bits}{layout}={self.size}{', double' if self.double else ''})"

    @property
    def holds_zero(self) -> bool:
        return self.table in FIXED  # a learned table may have its nearest value beside zero

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of the stored scales, where they are not quantized again."""
        return torch.float32 if self.table in FIXED else torch.float16

    def blocks(self, shape: tuple[int, int]) -> int:
        """How many scales a weight of this shape has."""
        rows, columns = shape
        return -(-rows * columns // self.size) if self.flat else rows * -(-columns // self.size)

    def fit(
        self,
        weight: Tensor,
        *,
        search: bool = False,
        importance: Tensor | None = None,
        peak: float | None = None,
    ) -> Params:
        """See Format.fit. `peak` is not read: there is no tensor-wide scale. A learned table weighs each weight's
        squared error by `importance`, with or without `search`."""
        groups = self._to_blocks(weight)
        absmax = self._stored(groups.abs().amax(-1))
        weights = self._weights(weight, importance) if search or self.table == LEARNED else groups
        table = self._table(groups, absmax, weights)
        if search:
            absmax = self._shrunken(groups, absmax, weights, table)
            table = self._table(groups, absmax, weights)
        return self._params(absmax, table, weight.shape[1])

    def _to_blocks(self, weight: Tensor) -> Tensor:
        """(out, in) → (blocks, size), the last block of the weight (or of each row) filled with zeros."""
        whole = weight.reshape(1, -1) if self.flat else weight
        return grid.to_groups(whole, self.size).reshape(-1, self.size)

    def _weights(self, weight: Tensor, importance: Tensor | None) -> Tensor:
        """(blocks, size): what an error counts; nothing where a block was filled up."""
        each = torch.ones(weight.shape[1]) if importance is None else importance
        return self._to_blocks(each.expand_as(weight))

    def _stored(self, absmax: Tensor) -> Tensor:
        """As storage will hold them, so that the codes are chosen for what is stored."""
        largest = torch.finfo(self.scale_dtype).max
        return absmax.clamp(max=largest).to(self.scale_dtype).float()

    def _table(self, groups: Tensor, absmax: Tensor, weights: Tensor) -> Tensor:
        if self.table in FIXED:
            return tables.fixed(self.table)
        unit = groups / absmax.clamp(min=tables.TINY)[:, None]
        return tables.learn(unit.flatten(), (weights * absmax.square()[:, None]).flatten(), 2**self.bits)

    def _shrunken(self, groups: Tensor, absmax: Tensor, weights: Tensor, table: Tensor) -> Tensor:
        """The scale of least Σ weight · |w − ŵ|^2.4 per block, among those that `IntGrid` searches too."""
        rows, errors = max(1, grid.SEARCH_ELEMENTS // self.size), tables.error_bins(table, grid.CLIP_NORM)
        parts = zip(torch.split(groups, rows), torch.split(absmax, rows), torch.split(weights, rows), strict=True)
        return torch.cat([self._shrink_rows(part, largest, each, errors) for part, largest, each in parts])

    def _shrink_rows(self, groups: Tensor, absmax: Tensor, weights: Tensor, errors: Tensor) -> Tensor:
        best, least = absmax, torch.full_like(absmax, torch.inf)
        for step in range(grid.CLIP_STEPS + 1):
            tried = self._stored(absmax * (1 - step / 100))
            unit = groups * (1.0 / tried.clamp(min=tables.TINY))[:, None]
            error = tables.binned(unit, errors).mul_(weights).sum(-1) * tried.pow(grid.CLIP_NORM)
            better = error < least
            best, least = torch.where(better, tried, best), torch.where(better, error, least)
        return best

    def _params(self, absmax: Tensor, table: Tensor, columns: int) -> Params:
        """absmax chooses the codes, scale decodes them: the same, but where scales are quantized again."""
        params = {"table": table, "absmax": absmax, "scale": absmax, "columns": torch.tensor(columns)}
        if self.double:
            codes, largest, offset = tables.compress_scales(absmax)
            params |= {"scale_codes": codes, "scale_max": largest, "scale_mean": offset}
            params["scale"] = tables.expand_scales(codes, largest, offset)
        return params

    def _index(self, rows: int, columns: Tensor, width: int) -> Tensor:
        """(rows, len(columns)) int64: the block of each weight of some columns of a weight `width` wide."""
        row = torch.arange(rows)[:, None]
        if self.flat:
            return (row * width + columns) // self.size
        return row * -(-width // self.size) + columns // self.size

    def quantize(self, weight: Tensor, params: Params, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See Format.quantize. Needs all rows: blocks may cross them."""
        width = int(params["columns"])
        index = self._index(weight.shape[0], columns, width)
        absmax = params["absmax"][index].clamp_(min=tables.TINY)
        unit = weight * (1.0 / absmax)
        if self.flat and weight.shape[0] * width % self.size:
            # bitsandbytes divides in a short last block, where it otherwise multiplies by the inverse
            unit = torch.where(index == len(params["absmax"]) - 1, weight / absmax, unit)
        codes = tables.nearest(unit, params["table"])
        return codes.to(torch.uint8), params["table"][codes] * params["scale"][index]

    def pack(self, codes: Tensor, params: Params, shape: tuple[int, int]) -> QuantTensor:
        tensors = {"codes": grid.pack_bits(codes, self.bits)}
        if self.table == LEARNED:
            tensors["table"] = params["table"].contiguous()
        if self.double:
            tensors |= {"scale": params["scale_codes"], "scale_max": params["scale_max"]}
            tensors["scale_mean"] = params["scale_mean"]
        else:
            tensors["scale"] = params["scale"].to(self.scale_dtype)
        return QuantTensor(self, tensors, shape)

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (out, in) uint8, scales (blocks,) float32, table (entries,) float32."""
        codes = grid.unpack_bits(tensors["codes"], self.bits, shape[1])
        scale = tensors["scale"]
        if self.double:
            scale = tables.expand_scales(scale, tensors["scale_max"], tensors["scale_mean"])
        return codes, scale.float(), tensors["table"] if self.table == LEARNED else tables.fixed(self.table)

    def dequantize(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        codes, scale, table = self.unpack(tensors, shape)
        return table[codes.int()] * scale[self._index(shape[0], torch.arange(shape[1]), shape[1])]

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        blocks = self.blocks(shape)
        specs: dict[str, TensorSpec] = {
            "codes": ((rows, grid.packed_bytes(1, columns, self.bits)), torch.uint8),
            "scale": ((blocks,), torch.uint8 if self.double else self.scale_dtype),
        }
        if self.table == LEARNED:
            specs["table"] = ((2**self.bits,), torch.float32)
        if self.double:
            specs["scale_max"] = ((-(-blocks // tables.NESTED_BLOCK),), torch.float32)
            specs["scale_mean"] = ((1,), torch.float32)
        return specs


def nibbles(codes: Tensor, table: Tensor) -> Tensor:
    """4-bit codes (out, in) uint8 → (ceil(out · in / 2),) uint8: row by row without a gap, the first of two codes in
    the high half of its byte, an odd one followed by the code of zero. The layout of bitsandbytes and of MatMulBnb4;
    our own storage has the low half first."""
    flat = codes.flatten()
    if flat.numel() % 2:
        flat = torch.cat([flat, tables.nearest(torch.zeros(1), table).to(torch.uint8)])
    return (flat[::2] << 4) | flat[1::2]
