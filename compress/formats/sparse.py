"""`Sparse`: the weights that are not zero, as they are, and where they stand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Self

import torch
from torch import Tensor

from compress.errors import InputError, UsageError, nearest
from compress.formats.base import Format, Params, QuantTensor, TensorSpec
from compress.maths import grid
from compress.maths.masks import keep_largest
from compress.spec import Call

BITMASK, TWO_OF_FOUR = "bitmask", "2:4"
MASKS = (BITMASK, TWO_OF_FOUR)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
UNITS = 10_000
"""Densities are whole multiples of one part of so many."""


@dataclass(frozen=True)
class Sparse(Format):
    """A layout of plain numbers that leaves zeros out; nothing is rounded but to `values`.

    Settings: `mask`: `bitmask`, a bit per weight, set where it is not zero, lowest bits first, each row padded to whole
    bytes (`bitmask`), and the weights that are not zero row by row (`values`, padded with zeros to `density` of the
    weight's size, the largest share that may be stored); or `2:4`, of every four input columns two values, also where
    fewer are not zero (`values`, (out, 2 · ceil(in / 4))), and the place of each among its four in 2 bits, lowest bits
    first, each row padded to whole bytes (`places`). That order is plain, not the one that tensor cores read. `values`:
    float16, bfloat16 or float32. No row offsets are stored: they are counts of set bits.
    Passes that choose values of their own round to this as to any format, keeping the largest weights; `pack_sparse`
    fills in `density` and `values` where they are left out.
    Text: `sparse(mask=bitmask, density=0.5, values=float16)`, `sparse(mask=2:4, values=bfloat16)`.
    """

    mask: str = BITMASK
    density: float | None = None
    values: str | None = None

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise UsageError(f"sparse: unknown mask '{self.mask}'.{nearest(str(self.mask), MASKS)}")
        if self.values is not None and self.values not in DTYPES:
            raise UsageError(f"sparse: unknown values '{self.values}'.{nearest(str(self.values), DTYPES)}")
        if self.mask == TWO_OF_FOUR and self.density is not None:
            raise UsageError(f"sparse: mask=2:4 stores half of the weights. Leave density={self.density} out.")
        if self.density is None:
            return
        parts = self.density * UNITS if isinstance(self.density, float) else 0.0
        if not 0 < parts < UNITS or abs(parts - round(parts)) > 1e-6:
            raise UsageError(
                f"sparse: density={self.density!r} is no share of the weights in steps of {1 / UNITS:g}, above 0 and "
                "below 1, such as 0.5."
            )

    @classmethod
    def from_call(cls, call: Call, **named: str) -> Self:
        if call.args:
            raise UsageError(f"{call.text()}: give settings by name, such as sparse(mask=bitmask, density=0.5).")
        call.require_known(("mask", "density", "values"))
        return cls(**call.kwargs)

    def __str__(self) -> str:
        density = "" if self.density is None else f", density={self.density:g}"
        values = "" if self.values is None else f", values={self.values}"
        return f"sparse(mask={self.mask}{density}{values})"

    @property
    def holds_zero(self) -> bool:
        return True

    @property
    def dense(self) -> torch.dtype:
        return DTYPES[self.values or "float32"]

    def filled(self, kept: int, shape: tuple[int, int], values: torch.dtype) -> Sparse:
        """With what was left out: the least density that holds `kept` weights of so many, and the dtype. Raises:
        UsageError for a dtype that it has not."""
        name = str(values).removeprefix("torch.")
        if self.values is None and name not in DTYPES:
            raise UsageError(f"sparse: weights are {name}; values are {', '.join(DTYPES)}.")
        density = self.density
        if self.mask == BITMASK and density is None:
            density = max(1, min(UNITS - 1, -(-kept * UNITS // prod(shape)))) / UNITS
        return replace(self, density=density, values=self.values or name)

    def capacity(self, shape: tuple[int, int]) -> int:
        """How many values are stored for a weight of this shape. Raises: UsageError where `density` was left out."""
        rows, columns = shape
        if self.mask == TWO_OF_FOUR:
            return rows * 2 * ceil(columns / 4)
        if self.density is None:
            raise UsageError(
                f"{self} says no density, the share of weights that are not zero. Give it, such as density=0.5, or use "
                "pack_sparse after a pass that prunes."
            )
        return -(-round(self.density * UNITS) * rows * columns // UNITS)

    def fit(
        self,
        weight: Tensor,
        *,
        search: bool = False,
        importance: Tensor | None = None,
        peak: float | None = None,
    ) -> Params:
        """The weights that stay, (out, in) bool: the largest. See Format.fit; nothing else is read."""
        size = weight.float().abs()
        if self.mask == BITMASK:
            return {"kept": keep_largest(size.reshape(1, -1), self.capacity(_shape(weight))).reshape(weight.shape)}
        kept = keep_largest(_fours(size).reshape(-1, 4), 2).reshape(len(weight), -1)
        return {"kept": kept[:, : weight.shape[1]]}

    def quantize(self, weight: Tensor, params: Params, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Codes are the bit patterns of the values, int32."""
        values = weight.to(self.dense).where(params["kept"][:, columns], 0)
        values = values.where(values != 0, 0)  # no negative zero, which is not told from a pruned one
        return values.contiguous().view(_BITS[self.dense]).int(), values.float()

    def pack(self, codes: Tensor, params: Params, shape: tuple[int, int]) -> QuantTensor:
        return self.packed(codes.to(_BITS[self.dense]).view(self.dense))

    def packed(self, weight: Tensor) -> QuantTensor:
        """A weight (out, in) of the dtype of `values` that has its zeros. Raises: UsageError where it has too few."""
        shape, present = _shape(weight), weight != 0
        capacity = self.capacity(shape)
        if self.mask == TWO_OF_FOUR:
            return QuantTensor(self, _two_of_four(weight, present), shape)
        values = weight[present]
        if len(values) > capacity:
            raise UsageError(
                f"{self} has room for {capacity} weights of {shape[0]} x {shape[1]}, and {len(values)} are not zero."
            )
        padded = torch.nn.functional.pad(values, (0, capacity - len(values)))
        return QuantTensor(self, {"bitmask": grid.pack_bits(present.byte(), 1), "values": padded}, shape)

    def dequantize(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        rows, columns = shape
        if self.mask == BITMASK:
            present = grid.unpack_bits(tensors["bitmask"], 1, columns).bool()
            found, count = torch.zeros(shape), int(present.sum())
            if count > len(tensors["values"]):
                raise InputError(
                    f"{self}: the mask of a weight names {count} values, and {len(tensors['values'])} are stored. The "
                    "file is damaged; run `compress run` again."
                )
            found[present] = tensors["values"][:count].float()
            return found
        values = tensors["values"].reshape(rows, -1, 2).float()
        places = grid.unpack_bits(tensors["places"], 2, values.shape[1] * 2).reshape(rows, -1, 2).long()
        return torch.zeros(rows, values.shape[1], 4).scatter(2, places, values).reshape(rows, -1)[:, :columns]

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        capacity = self.capacity(shape)
        if self.mask == BITMASK:
            return {"bitmask": ((rows, ceil(columns / 8)), torch.uint8), "values": ((capacity,), self.dense)}
        pairs = capacity // rows
        return {"places": ((rows, ceil(pairs / 4)), torch.uint8), "values": ((rows, pairs), self.dense)}


def _shape(weight: Tensor) -> tuple[int, int]:
    return int(weight.shape[0]), int(weight.shape[1])


def _fours(weight: Tensor) -> Tensor:
    """(out, in) → (out, ceil(in / 4), 4), filled up with zeros."""
    rows, columns = weight.shape
    return torch.nn.functional.pad(weight, (0, -columns % 4)).reshape(rows, ceil(columns / 4), 4)


def crowded(weight: Tensor) -> int:
    """How many runs of four input columns of a weight (out, in) have more than two that are not zero: none in 2:4."""
    return int((_fours(weight != 0).sum(-1) > 2).sum())


def _two_of_four(weight: Tensor, present: Tensor) -> dict[str, Tensor]:
    """Values and places of two of every four, those that are not zero first."""
    if more := crowded(weight):
        raise UsageError(f"mask=2:4: {more} runs of four input columns have more than two weights that are not zero.")
    order = torch.argsort(_fours(present).byte(), dim=-1, descending=True, stable=True)[..., :2]
    places = order.sort(-1).values
    rows = len(weight)
    values = _fours(weight).gather(2, places).reshape(rows, -1).contiguous()
    return {"places": grid.pack_bits(places.reshape(rows, -1).byte(), 2), "values": values}
