"""`Reader`: where a model's weights are read from; `StateReader`: from a module in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from compress.errors import InputError
from compress.layer import Layer, LayerSpec
from compress.maths import products


class Reader(Protocol):
    """Where weights are read from: the source's files or a store."""

    def layer(self, spec: LayerSpec) -> Layer:
        """One layer in its stored form."""
        ...

    def plain(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors that are no layer's."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a parameter."""
        ...

    def release(self) -> None:
        """Let go of opened files; tensors that were read stay valid."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        ...


@dataclass(frozen=True)
class StateReader:
    """The tensors of a module in memory. nbytes: of all as the callable made them."""

    state: Mapping[str, Tensor] = field(repr=False)
    source: str
    nbytes: int

    def layer(self, spec: LayerSpec) -> Layer:
        """One layer, its weight seen as (out, in)."""
        weight = self._read(f"{spec.name}.weight").reshape(spec.shape)
        bias = self._read(f"{spec.name}.bias") if spec.has_bias else None
        return Layer(spec.name, spec.kind, weight, bias, users=spec.users, groups=spec.groups)

    def plain(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors that are no layer's."""
        return {name: self._read(name) for name in names}

    def dtype(self, name: str) -> torch.dtype:
        """As the callable made it; float32 where a normalisation is folded in."""
        return self.state[name].dtype

    def release(self) -> None:
        """Nothing is open: the tensors are the module's own."""

    def _read(self, name: str) -> Tensor:
        tensor = self.state[name]
        if tensor.is_floating_point() and not products.all_finite(tensor):
            raise InputError(f"{name} of {self.source} holds NaN or infinite values; compressing it would hide that.")
        return tensor


@dataclass(frozen=True)
class DenseReader:
    """Another reader's weights, those in a layout of plain numbers as plain tensors. stored: the layers as it has
    them, by name."""

    reader: Reader
    stored: Mapping[str, LayerSpec] = field(repr=False)

    def layer(self, spec: LayerSpec) -> Layer:
        """One layer, dense."""
        return self.reader.layer(self.stored[spec.name]).as_dense

    def plain(self, names: Iterable[str]) -> dict[str, Tensor]:
        """As the other reads them."""
        return self.reader.plain(names)

    def dtype(self, name: str) -> torch.dtype:
        """As the other has it."""
        return self.reader.dtype(name)

    def release(self) -> None:
        """Of the other's files."""
        self.reader.release()

    @property
    def nbytes(self) -> int:
        """As the other stores them."""
        return self.reader.nbytes
