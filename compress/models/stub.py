"""Stand-ins for blocks: they let the parts of a model around its blocks run, and note how the blocks are called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Stub(nn.Module):
    """Stands in for a block: notes how it was called and returns `value`, or what came in.

    size: of the tuple that it returns, 0 for a tensor alone.
    """

    def __init__(self, block: nn.Module, size: int, value: Tensor | None = None) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # not a submodule
        self.size = size
        self.value = value
        self.calls: list[Call] = []

    def __getattr__(self, name: str) -> Any:
        """What models read from their blocks, as `attention_type`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        result = self.hidden if self.value is None else self.value
        return (result, *[None] * (self.size - 1)) if self.size else result

    @property
    def hidden(self) -> Tensor:
        """The hidden states that came in."""
        args, kwargs = self.calls[0]
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return hidden

    @property
    def call(self) -> Call:
        """How it was called, hidden states left out."""
        args, kwargs = self.calls[0]
        return args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}


def same_arguments(first: Any, second: Any) -> bool:
    """Whether two recorded calls, or lists of them, hold equal values."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        both = isinstance(first, Tensor) and isinstance(second, Tensor)
        return both and first.shape == second.shape and bool(torch.equal(first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same_arguments(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same_arguments, first, second))
    if isinstance(first, int | float | str | None) or isinstance(second, int | float | str | None):
        return bool(first == second)
    return type(first) is type(second)  # objects of the model's own, an empty cache say, have no equality to go by


@contextmanager
def shortened(blocks: nn.ModuleList, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
    """The list of blocks holds only `stand_ins` meanwhile."""
    before = blocks._modules
    blocks._modules = {str(place): module for place, module in enumerate(stand_ins)}
    try:
        yield
    finally:
        blocks._modules = before
