"""Transforms of a layer's input at run time (`Layer.pre`), whose inverse its weight has folded in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from compress.maths.rotation import Rotation, random_signs
from compress.spec import parse_call, print_value

NAME = "hadamard"


@dataclass(frozen=True)
class Hadamard:
    """Each `block` neighbouring inputs, a power of two, are multiplied by diag(±1) · H / √block, H being Sylvester's
    Hadamard matrix; the signs are of the seed and the same in every block, all of them + without a seed."""

    block: int
    seed: int | None = 0

    def __post_init__(self) -> None:
        if self.block < 2 or self.block & (self.block - 1):
            raise ValueError(f"hadamard: block={self.block} is no power of two above 1")

    def matrix(self) -> Tensor:
        """T (block, block) float64, orthogonal: a block of inputs x becomes x T."""
        return _matrix(self.block, self.seed)

    def __call__(self, values: Tensor) -> Tensor:
        """values (…, in) → the same shape and dtype. Raises: ValueError where the block does not divide `in`."""
        if values.shape[-1] % self.block:
            raise ValueError(f"{self}: {values.shape[-1]} inputs are no multiple of the block")
        return (values.reshape(-1, self.block) @ self.matrix().to(values)).reshape(values.shape)

    def __str__(self) -> str:
        return f"{NAME}(block={self.block}, seed={print_value(self.seed)})"


def transformed(pre: Iterable[Hadamard], values: Tensor) -> Tensor:
    """Inputs (…, in) as a layer's transforms hand them on."""
    for transform in pre:
        values = transform(values)
    return values


@cache
def _matrix(block: int, seed: int | None) -> Tensor:
    signs = torch.ones(block, dtype=torch.float64)
    if seed is not None:
        signs = random_signs(block, torch.Generator().manual_seed(seed))
    return Rotation(signs, torch.ones(1, 1, dtype=torch.float64), block).matrix()


def parse_transform(text: str) -> Hadamard:
    """From its own text. Raises: ValueError."""
    call = parse_call(text)
    if call.name != NAME or call.args or set(call.kwargs) != {"block", "seed"}:
        raise ValueError(f"'{text}' is no transform of inputs; known is {NAME}(block=…, seed=…)")
    seed = call.kwargs["seed"]
    return Hadamard(int(call.kwargs["block"]), None if seed is None else int(seed))
