"""`Reader`: where a model's weights are read from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from compress.layer import Layer, LayerSpec


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
