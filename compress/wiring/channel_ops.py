"""What the operations between layers do to the channels of a tensor: kept, moved, or no longer to be told apart.

A tensor's channels are one of its dimensions, with a label for each place in it. Operations are seen as torch's own
(ATen), below functions and methods. What is not in these tables is taken to mix channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CURVES = ("relu", "hardtanh", "hardswish", "hardsigmoid", "sigmoid", "tanh", "silu", "gelu", "elu", "leaky_relu")
_FUNCTIONS = (
    "softplus",
    "mish",
    "clamp",
    "clamp_min",
    "clamp_max",
    "abs",
    "neg",
    "exp",
    "sqrt",
    "rsqrt",
    "square",
    "pow",
)
ENTRYWISE = frozenset((*_CURVES, *_FUNCTIONS, "reciprocal", "clone", "detach", "alias", "_to_copy"))
"""Each entry by itself, with numbers that are the same for all channels."""
_POOLS = ("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d")
_SCALES = ("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "reflection_pad2d", "replication_pad2d")
PLANAR = frozenset((*_POOLS, *_SCALES))
"""Over the last two dimensions of an image."""
PAIRWISE = frozenset(("add", "sub", "mul", "div", "maximum", "minimum", "copy"))
"""Entries of two tensors, of like place."""
REDUCING = frozenset(("mean", "sum", "amax", "amin"))


FIXED = 0
"""The label of channels that have to stay."""


@dataclass(frozen=True, eq=False)
class Channels:
    """The dimension of a tensor that its channels are, and the label of each."""

    dim: int
    labels: tuple[int, ...]


def moved(name: str, channels: Channels, before: Tensor, after: Tensor, args: Sequence[Any]) -> Channels | None:
    """Where the channels of `before` are in what an operation of one tensor made of it; None where they are mixed, or
    left out in part. Args: name: of the operation; args: those after the tensor."""
    if name in ENTRYWISE:
        return channels
    if name in PLANAR:
        return channels if channels.dim < before.ndim - 2 else None
    rule = _MOVES.get(name)
    return None if rule is None else rule(channels, before, after, args)


def aligned(channels: Channels, tensor: Tensor, result: Tensor) -> int:
    """The dimension of `tensor` that meets the channels of another one in what both gave; −1 where it has none there,
    or one entry for all of them."""
    dim = channels.dim - (result.ndim - tensor.ndim)
    return dim if dim >= 0 and tensor.shape[dim] > 1 else -1


def _view(channels: Channels, before: Tensor, after: Tensor, args: Sequence[Any]) -> Channels | None:
    """Dimensions before the channels as they were; those after them kept, or joined to them (a flattened image)."""
    lead = before.shape[: channels.dim].numel()
    size, place, count = len(channels.labels), 0, 1
    while place < after.ndim and (count < lead or after.shape[place] == 1 < size):
        count *= after.shape[place]
        place += 1
    if count != lead or place == after.ndim:
        return None
    if after.shape[place] == size:
        return Channels(place, channels.labels)
    each, rest = divmod(after.shape[place], size)
    tail = before.shape[channels.dim + 1 :]
    joined = any(tail[:stop].numel() == each for stop in range(1, len(tail) + 1))
    if rest or not joined:
        return None
    return Channels(place, tuple(label for label in channels.labels for _ in range(each)))


def _permuted(channels: Channels, before: Tensor, after: Tensor, args: Sequence[Any]) -> Channels:
    order = [dim % before.ndim for dim in args[0]]
    return Channels(order.index(channels.dim), channels.labels)


def _transposed(channels: Channels, before: Tensor, after: Tensor, args: Sequence[Any]) -> Channels:
    first, second = (dim % before.ndim for dim in (args or (0, 1)))
    return Channels({first: second, second: first}.get(channels.dim, channels.dim), channels.labels)


def _unsqueezed(channels: Channels, before: Tensor, after: Tensor, args: Sequence[Any]) -> Channels:
    return Channels(channels.dim + (args[0] % after.ndim <= channels.dim), channels.labels)


def _without(channels: Channels, before: Tensor, dims: Sequence[int]) -> Channels | None:
    gone = {dim % before.ndim for dim in dims}
    if channels.dim in gone:
        return None
    return Channels(channels.dim - sum(dim < channels.dim for dim in gone), channels.labels)


def _squeezed(channels: Channels, before: Tensor, after: Tensor, args: Sequence[Any]) -> Channels | None:
    named = [args[0]] if args and isinstance(args[0], int) else list(args[0] if args else range(before.ndim))
    return _without(channels, before, [dim for dim in named if before.shape[dim] == 1])


def _reduced(channels: Channels, before: Tensor, after: Tensor, args: Sequence[Any]) -> Channels | None:
    dims = args[0] if args else None
    dims = [dims] if isinstance(dims, int) else dims
    if not dims or channels.dim in {dim % before.ndim for dim in dims}:
        return None
    return channels if after.ndim == before.ndim else _without(channels, before, dims)


def _sliced(channels: Channels, before: Tensor, after: Tensor, args: Sequence[Any]) -> Channels | None:
    return channels if after.shape[channels.dim] == len(channels.labels) else None


def _selected(channels: Channels, before: Tensor, after: Tensor, args: Sequence[Any]) -> Channels | None:
    return _without(channels, before, [args[0]])


def _expanded(channels: Channels, before: Tensor, after: Tensor, args: Sequence[Any]) -> Channels | None:
    dim = channels.dim + after.ndim - before.ndim
    return Channels(dim, channels.labels) if after.shape[dim] == len(channels.labels) else None


def _padded(channels: Channels, before: Tensor, after: Tensor, args: Sequence[Any]) -> Channels | None:
    """New channels of constants are fixed: the code that adds so many of them stays as it is."""
    pads, place = list(args[0]), 2 * (before.ndim - 1 - channels.dim)
    if place + 1 >= len(pads):
        return channels
    front, back = pads[place], pads[place + 1]
    if min(front, back) < 0:
        return None
    return Channels(channels.dim, (*(FIXED,) * front, *channels.labels, *(FIXED,) * back))


_MOVES: dict[str, Callable[[Channels, Tensor, Tensor, Sequence[Any]], Channels | None]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), _view),
    **dict.fromkeys(REDUCING, _reduced),
    "permute": _permuted,
    "transpose": _transposed,
    "t": _transposed,
    "unsqueeze": _unsqueezed,
    "squeeze": _squeezed,
    "slice": _sliced,
    "select": _selected,
    "expand": _expanded,
    "constant_pad_nd": _padded,
}


def names_of(function: Any) -> tuple[str, bool]:
    """An operation's name without its form, and whether it writes into a tensor that it is given."""
    schema = function._schema
    name = str(schema.name).removeprefix("aten::")
    is_writing = bool(schema.is_mutable)
    return (name.removesuffix("_") if is_writing else name), is_writing


def first_tensor(result: Any) -> Tensor | None:
    """What an operation made, where it is one tensor with its by-products."""
    found = result[0] if isinstance(result, tuple | list) and result else result
    return found if isinstance(found, torch.Tensor) else None
