"""`Codebook`: short vectors of weights as sums of entries of learned codebooks (vector quantization)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from compress.errors import UsageError, nearest
from compress.formats import codebook_columns
from compress.formats.base import Format, Params, QuantTensor, TensorSpec
from compress.maths import codebooks, grid
from compress.spec import Call

MOST_ENTRIES, MOST_STAGES = 65536, 4
AXES, SCALES = ("in", "out"), ("row", "column", "none")
# candidates kept where codes of several stages are chosen together
BEAM = 16
SEED = 0


class Parts(NamedTuple):
    """What a stored weight is made of.

    codes (rows, units, stages) int32; codebook (groups, stages, entries, vector) float32; scale float32 (out, 1),
    (1, in) or (1, 1).
    """

    codes: Tensor
    codebook: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Codebook(Format):
    """value = scale · Σ over stages of codebook[stage][code], a vector of weights at a time.

    Settings: `vector` weights to a code, of one output row side by side (`axis=in`: AQLM, Egiazarian et al. 2024,
    arXiv 2401.06118; the layout that is quick to compute with) or of one input column (word `out`: VPTQ, Liu et al.
    2024, arXiv 2409.17066); `entries` of a codebook, a power of two; `stages` codebooks whose entries are added;
    `groups` runs of input columns with codebooks of their own; `scale`: a float16 factor per `row`, per `column`, or
    `none`; `share`: so many layers hold the codebooks in common, whose bytes are counted once among them (set by the
    pass that learns them).
    Beside these (compress/formats/codebook_columns.py): `outliers`, the share of the input columns that are kept apart,
    in codes of `outlier_vector` weights with `outlier_entries` entries of their own; `bias`, a float16 summand per
    `row` or `column`; `permuted`: columns lie in an order of their own. What was chosen is stored and counted; a row's
    scale and bias are not those of its outliers. Which columns come first only passes with data can decide.
    Text: `codebook(vector=8, entries=256, stages=2)`, `codebook(vector=6, entries=4096, stages=1, out)`.
    """

    vector: int = 8
    entries: int = 256
    stages: int = 2
    axis: str = "in"
    groups: int = 1
    scale: str = ""
    share: int = 1
    outliers: float = 0.0
    outlier_vector: int = 2
    outlier_entries: int = 64
    bias: str = "none"
    permuted: bool = False

    def __post_init__(self) -> None:
        if self.axis not in AXES:
            raise UsageError(f"codebook: axis={self.axis!r} is not allowed.{nearest(str(self.axis), AXES)}")
        object.__setattr__(self, "scale", self.scale or self._own_scale)
        if self.scale not in SCALES:
            raise UsageError(f"codebook: scale={self.scale!r} is not allowed.{nearest(str(self.scale), SCALES)}")
        bounds = {"vector": (1, 64), "entries": (2, MOST_ENTRIES), "stages": (1, MOST_STAGES)}
        for name, (low, high) in {**bounds, "groups": (1, 4096), "share": (1, 1 << 20)}.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise UsageError(f"codebook: {name}={value!r} is not allowed. Give a whole number, {low} to {high}.")
        if self.entries & (self.entries - 1):
            raise UsageError(f"codebook: entries={self.entries} is no power of two. Give 2, 4, 8 … {MOST_ENTRIES}.")
        codebook_columns.check(self)

    @classmethod
    def from_call(cls, call: Call, **named: str) -> Self:
        settings: dict[str, Any] = dict(call.kwargs)
        for word in call.args:
            if word not in (*AXES, "permuted"):
                raise UsageError(f"codebook: unknown word '{word}'.{nearest(str(word), (*AXES, 'permuted'))}")
            name = "permuted" if word == "permuted" else "axis"
            if name in settings:
                raise UsageError(f"{call.text()}: {name} is given twice. Keep one of them.")
            settings[name] = True if word == "permuted" else word
        call.require_known(cls.__dataclass_fields__)
        return cls(**settings)

    def __str__(self) -> str:
        parts = [f"vector={self.vector}", f"entries={self.entries}", f"stages={self.stages}"]
        parts += ["out"] if self.axis == "out" else []
        parts += [f"groups={self.groups}"] if self.groups > 1 else []
        parts += [f"scale={self.scale}"] if self.scale != self._own_scale else []
        parts += codebook_columns.texts(self)
        return f"codebook({', '.join(parts + ([f'share={self.share}'] if self.share > 1 else []))})"

    @property
    def _own_scale(self) -> str:
        return "row" if self.axis == "in" else "column"

    @property
    def step(self) -> int:
        return self.vector if self.axis == "in" and not self.outliers else 1

    @property
    def only_learned(self) -> tuple[str, ...]:
        return (*(("outliers",) if self.outliers else ()), *(("permuted",) if self.permuted else ()))

    @property
    def extras(self) -> tuple[str, ...]:
        """The settings that take more than codes, entries and scales to decode: what `pieces` is for."""
        return (*self.only_learned, *(("bias",) if self.bias != "none" else ()))

    @property
    def main(self) -> Codebook:
        """Of the columns that are no outliers, without any of `extras`."""
        return codebook_columns.main_form(self) if self.extras else self

    def pieces(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> list[codebook_columns.Piece]:
        """A weight as runs of columns without any of `extras`: the outliers, where there are any, and the others."""
        return codebook_columns.pieces(self, tensors, shape)

    def main_columns(self, columns: int) -> int:
        """How many of the input columns are no outliers."""
        return columns - codebook_columns.outlier_count(self, columns)

    @property
    def holders(self) -> dict[str, int]:
        return {"codebook": self.share}

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.entries.bit_length() - 1

    @property
    def codes_per_unit(self) -> int:
        return self.stages

    def code_rows(self, rows: int) -> int:
        return rows if self.axis == "in" else -(-rows // self.vector)

    def units(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows of codes, and vectors in each, outlier columns left out."""
        return self.code_rows(shape[0]), self.main_columns(shape[1]) // self.main.step

    def fits(self, columns: int) -> bool:
        """Whether input columns can be cut into the groups, and these into whole vectors."""
        main = self.main_columns(columns)
        return main > 0 and main % (self.groups * self.main.step) == 0

    def run(self, columns: int) -> int:
        """Input columns of one group. Raises: UsageError where they do not fit."""
        codebook_columns.require_others(self, columns)
        if not self.fits(columns):
            raise UsageError(
                f"{self}: {columns} input columns cannot be cut into {self.groups} groups of whole vectors. Choose "
                "another number of groups."
            )
        return self.main_columns(columns) // self.groups

    def fit(
        self,
        weight: Tensor,
        *,
        search: bool = False,
        importance: Tensor | None = None,
        peak: float | None = None,
    ) -> Params:
        """See Format.fit. Codebooks by k-means of the scaled weights, one stage after the other, each weight counting
        by `importance` and its squared scale. `search` and `peak` are not read: nothing is cut off."""
        self.run(weight.shape[1])
        if self.only_learned:
            raise UsageError(f"{self}: {' and '.join(self.only_learned)} need data. Use vptq or aqlm.")
        bias = self.fit_bias(weight)
        weight = weight if bias is None else weight - bias
        scale = self.fit_scale(weight)
        counts = torch.ones(1, weight.shape[1]) if importance is None else importance[None]
        book = self.learn([(weight / scale, (counts * scale.square()).expand(weight.shape))])
        return self.params(book, scale, weight.shape[1], bias)

    def learn(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Codebooks (groups, stages, entries, vector), as float16 holds them, for layers that hold them in common.

        parts: of each the scaled weight (out, in) and what the squared error of each counts, of the same shape.
        """
        vectors = [(self.vectors(weight), self.vectors(counts)) for weight, counts in parts]
        found = []
        for place in range(self.groups):
            runs = [self.runs(each.shape[1])[place] for each, _ in vectors]
            flat = [torch.cat([pair[at][:, run].flatten(0, 1) for pair, run in zip(vectors, runs, strict=True)])
                    for at in (0, 1)]  # fmt: skip
            found.append(codebooks.learn(flat[0], flat[1], self.entries, self.stages, SEED))
        return codebooks.stored(torch.stack(found))

    def runs(self, units: int) -> list[slice]:
        """The vectors of a row of codes by the group that they belong to."""
        width = units // self.groups
        return [slice(place * width, (place + 1) * width) for place in range(self.groups)]

    def fit_scale(self, weight: Tensor) -> Tensor:
        """(out, 1), (1, in) or (1, 1) float32: the root mean square of a row or column as float16 holds it; 1 where all
        are 0."""
        if self.scale == "none":
            return torch.ones(1, 1)
        size = weight.square().mean(1 if self.scale == "row" else 0, keepdim=True).sqrt()
        stored = codebooks.stored(size)
        return torch.where(stored > 0, stored, torch.ones(()))

    def fit_bias(self, weight: Tensor) -> Tensor | None:
        """(out, 1) or (1, in) float32: the mean of a row or column as float16 holds it; None without a bias."""
        if self.bias == "none":
            return None
        return codebooks.stored(weight.mean(1 if self.bias == "row" else 0, keepdim=True))

    def params(self, codebook: Tensor, scale: Tensor, columns: int, bias: Tensor | None = None) -> Params:
        """Parameters as storage will hold them: codebook (groups, stages, entries, vector), scale as `Parts`."""
        self.run(columns)
        found = {"codebook": codebooks.stored(codebook), "scale": scale, "columns": torch.tensor(columns)}
        return found if bias is None else {**found, "bias": bias}

    def vectors(self, weight: Tensor) -> Tensor:
        """(out, n) → (rows, units, vector); `axis=out` fills the last vector of a column with zeros."""
        rows, columns = weight.shape
        if self.axis == "in":
            return weight.reshape(rows, columns // self.vector, self.vector)
        padded = torch.nn.functional.pad(weight, (0, 0, 0, -rows % self.vector))
        return padded.reshape(-1, self.vector, columns).transpose(1, 2)

    def weights(self, vectors: Tensor, rows: int) -> Tensor:
        """Inverse of `vectors`: (rows, units, vector) → (out, n)."""
        if self.axis == "in":
            return vectors.reshape(rows, -1)
        return vectors.transpose(1, 2).reshape(-1, vectors.shape[1])[:rows]

    def _groups(self, units: Tensor, width: int) -> Tensor:
        """(n,) int64: the group of each of some vectors, by the place of its first column."""
        return units // self.run(width)

    def quantize(self, weight: Tensor, params: Params, columns: Tensor) -> tuple[Tensor, Tensor]:
        """See Format.quantize. Codes (rows, units · stages), int32 where they have more than 8 bits; columns come in
        whole vectors. The codes of a vector are those of least error together."""
        scale = _at(params["scale"], columns)
        bias = _at(params["bias"], columns) if "bias" in params else torch.zeros(())
        vectors = self.vectors((weight - bias) / scale)
        group = self._groups(columns[:: self.step], int(params["columns"]))
        codes = torch.empty(*vectors.shape[:2], self.stages, dtype=torch.int32)
        values = torch.empty_like(vectors)
        for each in sorted(set(group.tolist())):
            chosen, book = group == each, params["codebook"][each]
            found = codebooks.assign(vectors[:, chosen].reshape(-1, self.vector), book, BEAM)
            codes[:, chosen] = found.reshape(len(vectors), -1, self.stages)
            values[:, chosen] = codebooks.decode(found, book).reshape(len(vectors), -1, self.vector)
        return codes.flatten(1).to(grid.code_dtype(self.bits)), self.weights(values, len(weight)) * scale + bias

    def pack(self, codes: Tensor, params: Params, shape: tuple[int, int]) -> QuantTensor:
        tensors = {"codes": grid.pack_bits(codes, self.bits), "codebook": params["codebook"].half()}
        if self.scale != "none":
            tensors["scale"] = params["scale"].flatten().half()
        if self.bias != "none":
            tensors["bias"] = params["bias"].flatten().half()
        return QuantTensor(self, tensors, shape)

    def unpack(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Parts:
        """See `Parts`. Of a format with `extras` each of the `pieces` is unpacked: ValueError."""
        if self.extras:
            raise ValueError(f"{self}: {' and '.join(self.extras)} would be lost")
        rows, units = self.units(shape)
        codes = grid.unpack_bits(tensors["codes"], self.bits, units * self.stages)
        factor = tensors.get("scale", torch.ones(1)).float()
        scale = factor[None] if self.scale == "column" else factor[:, None]
        return Parts(codes.int().reshape(rows, units, self.stages), tensors["codebook"].float(), scale)

    def dequantize(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        if self.extras:
            parts = self.pieces(tensors, shape)
            return codebook_columns.assembled(parts, [each.decode() for each in parts])
        return self.decode(self.unpack(tensors, shape), shape)

    def decode(self, parts: Parts, shape: tuple[int, int]) -> Tensor:
        """(out, in) float32, with gradients in the codebook and the scale."""
        codes, books, scale = parts
        return self.unit(codes, books, shape[0]) * scale

    def unit(self, codes: Tensor, books: Tensor, rows: int) -> Tensor:
        """(out, in) float32 before it is scaled. codes, books: see `Parts`; rows: out."""
        values = torch.empty(*codes.shape[:2], self.vector)
        for book, run in zip(books, self.runs(codes.shape[1]), strict=True):
            found = codebooks.decode(codes[:, run].flatten(0, 1), book)
            values[:, run] = found.reshape(len(values), -1, self.vector)
        return self.weights(values, rows)

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        self.run(shape[1])
        if self.extras:
            return codebook_columns.specs(self, shape)
        rows, units = self.units(shape)
        specs: dict[str, TensorSpec] = {
            "codes": ((rows, grid.packed_bytes(1, units * self.stages, self.bits)), torch.uint8),
            "codebook": ((self.groups, self.stages, self.entries, self.vector), torch.float16),
        }
        if self.scale != "none":
            specs["scale"] = ((shape[0] if self.scale == "row" else shape[1],), torch.float16)
        return specs


def _at(values: Tensor, columns: Tensor) -> Tensor:
    """(out, 1) as it is, (1, in) at some columns."""
    return values if values.shape[1] == 1 else values[:, columns]
