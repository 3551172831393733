"""`Trellis`: tiles of 16 by 16 weights as paths through a trellis with computed codes, between Hadamard matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from compress.errors import UsageError, nearest
from compress.formats.base import Format, Params, QuantTensor, TensorSpec
from compress.kernels import library
from compress.kernels import trellis as kernel
from compress.maths import trellis
from compress.maths.rotation import random_signs, transform
from compress.spec import Call

# what EXL3 files have
BLOCK = 128
BLOCKS = (16, 32, 64, 128, 256, 512, 1024)
CODES = tuple(trellis.MULTIPLIERS)
# Root mean square of what is coded over that of the values of all states, by bits: where the error of Gaussian noise is
# least, or within 3 % of that.
FILL = {1: 1.1, 2: 1.0, 3: 0.94, 4: 0.9, 5: 0.86, 6: 0.84, 7: 0.8, 8: 0.75}
# tiles that are packed or unpacked together
TOGETHER = 1024
# seeds of the signs of inputs and of outputs
SEEDS = (0, 1)


@dataclass(frozen=True)
class Trellis(Format):
    """W = diag(svh) · H · V · H · diag(suh): V holds the values of trellis codes, H is block-diagonal of Hadamard
    matrices, and the two vectors hold signs and scales of outputs and inputs (QTIP, Tseng et al. 2024, arXiv
    2406.11235, in the form of EXL3 files).

    Settings: `bits` of each weight, 1 to 8; `code`: `mul1`, `mcg` or `3inst`, what makes values of states
    (compress/maths/trellis.py); `block`: order of the Hadamard matrices, a power of two from 16; EXL3 has 128. Both
    sizes of a weight must be multiples of it: nothing is padded, which would cost what the codes save. Stored:
    `trellis` int16 (in / 16, out / 16, 16 · bits), `suh` (in) and `svh` (out) float16.
    Text: `trellis(bits=2)`, `trellis(bits=3, mcg)`, `trellis(bits=2, block=64)`.
    """

    bits: int = 2
    code: str = "mul1"
    block: int = BLOCK

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 1 <= self.bits <= 8:
            raise UsageError(f"trellis: bits={self.bits!r} is not allowed. Give a whole number, 1 to 8.")
        if self.code not in CODES:
            raise UsageError(f"trellis: code={self.code!r} is not allowed.{nearest(str(self.code), CODES)}")
        if type(self.block) is not int or self.block not in BLOCKS:
            raise UsageError(f"trellis: block={self.block!r} is not allowed. Give a power of two, 16 to {BLOCKS[-1]}.")

    @classmethod
    def from_call(cls, call: Call, **named: str) -> Self:
        settings: dict[str, Any] = dict(call.kwargs)
        for word in call.args:
            if "code" in settings:
                raise UsageError(f"{call.text()}: the code is given twice. Keep one of them.")
            settings["code"] = word
        call.require_known(("bits", "code", "block"))
        return cls(**settings)

    def __str__(self) -> str:
        parts = [f"bits={self.bits}"] + ([self.code] if self.code != "mul1" else [])
        return f"trellis({', '.join(parts + ([f'block={self.block}'] if self.block != BLOCK else []))})"

    @property
    def step(self) -> int:
        return self.block

    @property
    def notes(self) -> tuple[str, ...]:
        if kernel.has_kernel():
            return ()
        return (f"searched by torch, many times slower than compiled: {library.missing() or 'as asked'}",)

    @property
    def codes_per_unit(self) -> int:
        return self.block // trellis.SIDE * trellis.SYMBOLS

    def code_rows(self, rows: int) -> int:
        return rows // trellis.SIDE

    def fit(
        self,
        weight: Tensor,
        *,
        search: bool = False,
        importance: Tensor | None = None,
        peak: float | None = None,
    ) -> Params:
        """See Format.fit. Signs come from fixed seeds. A Hadamard matrix spreads errors evenly over what it mixes: with
        scales t of outputs and s of inputs the error is as Σ t² · Σ h s² · Σ (w / ts)², h being the `importance`. By
        Cauchy and Schwarz that is least where t² goes as the size of a row, and s² as that of a column over √h; where
        later columns make up for all they can, s goes as the size of a column alone, and what is taken lies halfway.
        Blocks are then brought to one size, since the values of states have one. `search` and `peak` are not read:
        nothing is cut off."""
        self.tensor_specs((weight.shape[0], weight.shape[1]))
        rows = self._levelled(_rms(weight, 1).sqrt(), weight)
        scaled = weight / _divisor(rows)[:, None]
        columns = _rms(scaled, 0).pow(0.75)
        if importance is not None:
            floor = 1e-4 * float(importance.mean())
            columns = columns / importance.clamp(min=floor or 1.0).pow(0.125)
        columns = self._levelled(columns, scaled.T)
        params = {"suh": _signed(columns, SEEDS[0]), "svh": _signed(rows, SEEDS[1])}
        size = float(self.turn(weight, params).square().mean().sqrt())
        if size:
            share = (size / float(trellis.table(self.code).std()) / FILL[self.bits]) ** 0.5
            # as large as each other, so that float16 holds both for weights of almost any size
            even = float((_rms(params["svh"], 0) / _rms(params["suh"], 0)).sqrt())
            params = {"suh": params["suh"] * share * even, "svh": params["svh"] * share / even}
        return {name: value.half().float() for name, value in params.items()}

    def _levelled(self, scale: Tensor, weight: Tensor) -> Tensor:
        """Scales (n,) of the rows of a weight (n, m), times the size that each block of rows then has."""
        squares = (weight / _divisor(scale)[:, None]).square().mean(1)
        return scale * _divisor(squares.reshape(-1, self.block).mean(1).sqrt()).repeat_interleave(self.block)

    def turn(self, weight: Tensor, params: Params, suh: Tensor | None = None) -> Tensor:
        """What the codes are to come close to, (in, out), for a weight (out, in), or some whole blocks of its columns
        with their part of `suh`."""
        inner = weight / _divisor(params["svh"])[:, None] / _divisor(params["suh"] if suh is None else suh)
        return self.mix(self.mix(inner).T)

    def turn_back(self, inner: Tensor, suh: Tensor, svh: Tensor) -> Tensor:
        """Inverse of `turn`: (in, out) → (out, in)."""
        return self.mix(self.mix(inner).T) * svh[:, None] * suh

    def mix(self, values: Tensor) -> Tensor:
        """(…, n) times H: each block of a row times the Hadamard matrix, which is its own inverse."""
        return transform(values.reshape(-1, self.block)).reshape(values.shape)

    def search(self, inner: Tensor) -> Tensor:
        """Symbols (in / 16, out / 16, 256) uint8 whose values come closest to (in, out), whole tiles."""
        tiles = trellis.to_tiles(inner)
        return self.search_tiles(tiles.flatten(0, 1)).reshape(tiles.shape)

    def search_tiles(self, tiles: Tensor) -> Tensor:
        """Symbols (n, 256) uint8 for tiles (n, 256) in their order, by the compiled kernel where there is one."""
        find = kernel.search if kernel.has_kernel() else trellis.search
        return find(tiles, self.bits, trellis.table(self.code))

    def values(self, symbols: Tensor) -> Tensor:
        """(in, out) float32 for symbols (in / 16, out / 16, 256)."""
        return trellis.from_tiles(trellis.decode(symbols, self.bits, self.code))

    def quantize(self, weight: Tensor, params: Params, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See Format.quantize. Columns come in whole blocks; codes are symbols, those of a tile together."""
        suh = params["suh"][columns]
        symbols = self.search(self.turn(weight, params, suh))
        return symbols.transpose(0, 1).flatten(1), self.turn_back(self.values(symbols), suh, params["svh"])

    def tiles(self, codes: Tensor) -> Tensor:
        """Codes (out / 16, in / 16 · 256) → symbols (in / 16, out / 16, 256)."""
        return codes.reshape(len(codes), -1, trellis.SYMBOLS).transpose(0, 1)

    def pack(self, codes: Tensor, params: Params, shape: tuple[int, int]) -> QuantTensor:
        words = torch.cat([trellis.pack(part, self.bits) for part in _parted(self.tiles(codes))])
        return QuantTensor(self, {"trellis": words, "suh": params["suh"].half(), "svh": params["svh"].half()}, shape)

    def dequantize(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        parts = _parted(tensors["trellis"])
        inner = torch.cat([self.values(trellis.unpack(part, self.bits)) for part in parts])
        return self.turn_back(inner, tensors["suh"].float(), tensors["svh"].float())

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, columns = shape
        if rows % self.block or columns % self.block:
            fitting = [block for block in BLOCKS if not rows % block and not columns % block]
            advice = f"Give block={fitting[-1]}, for which EXL3 files have no place" if fitting else "No block fits it"
            raise UsageError(
                f"{self}: a weight of {rows}x{columns} is not made of blocks of {self.block} by {self.block}. {advice}"
                f"{', or' if fitting else ': give'} another format."
            )
        words = (columns // trellis.SIDE, rows // trellis.SIDE, 16 * self.bits)
        return {
            "trellis": (words, torch.int16),
            "suh": ((columns,), torch.float16),
            "svh": ((rows,), torch.float16),
        }


def _parted(tiles: Tensor) -> tuple[Tensor, ...]:
    """(rows of tiles, tiles, …) in runs of rows: what a tile is unpacked to takes many times its memory."""
    return torch.split(tiles, max(1, TOGETHER // max(1, tiles.shape[1])))


def _rms(weight: Tensor, dim: int) -> Tensor:
    return weight.square().mean(dim).sqrt()


def _divisor(scale: Tensor) -> Tensor:
    """A row or column of zeros has scale 0, and stays what it is."""
    return torch.where(scale == 0, 1.0, scale)


def _signed(scale: Tensor, seed: int) -> Tensor:
    return scale * random_signs(len(scale), torch.Generator().manual_seed(seed)).float()
