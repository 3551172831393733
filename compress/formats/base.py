"""What every format offers, and `QuantTensor`: a format with its stored tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Self, TypeVar

import torch
from torch import Tensor

from compress.errors import UsageError
from compress.spec import Call

Params = dict[str, Tensor]
"""A format's fitted parameters by name (scales, zero points, codebooks …), with the values that are stored: whoever
decides codes by them sees what will be decoded."""

Held = TypeVar("Held")

TensorSpec = tuple[tuple[int, ...], torch.dtype]

Rounder = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Codes, turned, and values (step, out) for columns (step, out) float32 and the place of the first: see
`Format.quantize`."""


class Format(ABC):
    """A frozen dataclass of settings with pure functions on tensors. Weights are (out, in) float32."""

    row_params: ClassVar[frozenset[str] | None] = None
    """The parameters that hold a row for each output row, so that runs of rows can be decided apart; None where rows
    cannot, since blocks cross them."""

    @property
    def step(self) -> int:
        """Input columns that are decided together: 1 for grids, the vector length for input-side codebooks. Passes take
        only weights whose columns are a multiple of it."""
        return 1

    @property
    def holds_zero(self) -> bool:
        """Whether a weight of zero stays exactly zero, whatever the parameters: what pruned weights need."""
        return False

    @property
    def dense(self) -> torch.dtype | None:
        """Of a layout of plain numbers, without a grid: their dtype. A target that has no form for it takes them as
        they are (`LayerSpec.as_dense`)."""
        return None

    @property
    def shares_peak(self) -> bool:
        """Whether layers that are fed the same tensor must share a tensor-wide scale: `fit` then takes their peak."""
        return False

    @property
    def only_learned(self) -> tuple[str, ...]:
        """Settings that only passes which learn codebooks can choose by data, and others refuse."""
        return ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the report should tell of each layer that is put in this format here: what makes it slow, say."""
        return ()

    @property
    def holders(self) -> dict[str, int]:
        """Stored tensors that several layers hold in common → how many do. Their bytes are counted once among them."""
        return {}

    @classmethod
    @abstractmethod
    def from_call(cls, call: Call, **named: str) -> Self:
        """Build from parsed text; `named` holds the groups of the name's pattern. Raises UsageError."""

    @abstractmethod
    def __str__(self) -> str:
        """The canonical text, which parses back to an equal format."""

    @abstractmethod
    def fit(
        self,
        weight: Tensor,
        *,
        search: bool = False,
        importance: Tensor | None = None,
        peak: float | None = None,
    ) -> Params:
        """Parameters for a weight (out, in), rounded as they are stored (their dtype may be wider).

        Args: search: look for the range of least error instead of the extremes; importance: (in,) float32 ≥ 0 weighs
        the error of each column in that search; peak: the largest |w| over the layers that must share a tensor-wide
        scale (None: the weight's own), read only where `shares_peak`.
        """

    @abstractmethod
    def quantize(self, weight: Tensor, params: Params, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and decoded values for some columns: weight (out, len(columns)), columns (n,) int64 original
        positions. Returns codes (rows of codes, n / step · …), uint8 or where they have more than 8 bits int32, as
        `rounder` and `pack` have them, and values (out, n) float32."""

    @property
    def codes_per_unit(self) -> int:
        """Codes that are decided together at one place: as many rows as `rounder` gives."""
        return 1

    def code_rows(self, rows: int) -> int:
        """Rows of codes for so many output rows."""
        return rows

    def rounder(self, params: Params, columns: Tensor) -> Rounder:
        """`quantize` for a loop over columns (n,) int64, `step` at a time, with weights turned to (in, out)."""

        def turned(weight: Tensor, at: int) -> tuple[Tensor, Tensor]:
            codes, values = self.quantize(weight.T, params, columns[at : at + self.step])
            return codes.T, values.T

        return turned

    def refit_span(self, columns: int) -> int:
        """How many input columns share a scale that `rescale` can change in each row by itself; 0: there is none."""
        return 0

    def rescale(self, params: Params, group: int, factor: Tensor) -> Tensor:
        """Multiply the scales of one group of columns, in place, by factor (out,) > 0.

        Returns: what they were multiplied with once stored, (out,).
        """
        raise NotImplementedError(f"{self} has no scales to refit")

    @abstractmethod
    def pack(self, codes: Tensor, params: Params, shape: tuple[int, int]) -> QuantTensor:
        """Codes of the whole weight in original column order, with its parameters, as stored tensors."""

    @abstractmethod
    def dequantize(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """The weight (out, in) float32."""

    @abstractmethod
    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        """Shape and dtype of every stored tensor, known without the weight."""

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of everything stored for a weight of this shape."""
        specs = self.tensor_specs(shape).items()
        return self.counted({name: prod(size) * dtype.itemsize for name, (size, dtype) in specs})

    def counted(self, sizes: Mapping[str, int]) -> int:
        """Sum of the bytes of tensors by name, with its share of those that other layers hold too, rounded up."""
        return sum(-(-size // self.holders.get(name, 1)) for name, size in sizes.items())


class ActivationFormat(ABC):
    """A format that can also round activations at run time."""

    @property
    def rounds_activations(self) -> bool:
        """Whether these settings can; some are for weights only."""
        return True

    @abstractmethod
    def round_activation(self, values: Tensor) -> Tensor:
        """values (…, features) float32 → the same shape, on the grid fitted to these values."""

    def fit_activation(self, low: Tensor, high: Tensor) -> Params:
        """A static grid's parameters from the range it is to hold: low, high () or (features,) float32.

        Raises: UsageError where the format has no static grid.
        """
        raise UsageError(f"{self} has no static grid for activations; leave static off to fit it at run time.")

    def round_static(self, values: Tensor, params: Params) -> Tensor:
        """values (…, features) float32 → the same shape, on the grid of `params`."""
        raise UsageError(f"{self} has no static grid for activations; leave static off to fit it at run time.")


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A stored weight: format, its tensors by name, and the shape (out, in) it decodes to."""

    format: Format
    tensors: dict[str, Tensor]
    shape: tuple[int, int]

    def dequantize(self) -> Tensor:
        """(out, in) float32."""
        return self.format.dequantize(self.tensors, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors; see `Format.counted`."""
        return self.format.counted({name: tensor.nbytes for name, tensor in self.tensors.items()})

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight with scales, zero points and padding counted."""
        return 8 * self.nbytes / prod(self.shape)


def alike(tensor: Tensor, known: Iterable[tuple[Tensor, Held]]) -> Held | None:
    """What stands beside the first tensor with the same values; None where there is none. What layers hold in common
    is found by it, since a layer that was read from a file has a tensor of its own."""
    return next((held for other, held in known if other is tensor or torch.equal(other, tensor)), None)
