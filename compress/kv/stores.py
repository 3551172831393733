"""What a layer's cache holds of keys or of values: tensors (batch, heads, slots, …), one row per token and head.

A store grows by tokens and gives all of them back in float; where each token has a slot of its own, single ones are
dropped or overwritten (`SlotStore`). What it holds is what its `nbytes` count.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Self

import torch
from torch import Tensor

from compress.errors import InputError
from compress.formats.base import Format, QuantTensor
from compress.formats.int_grid import IntGrid
from compress.kv import static
from compress.maths.rotation import rotation


class Store(ABC):
    """Keys or values of one layer: of `slots` tokens."""

    slots: int = 0

    @abstractmethod
    def append(self, states: Tensor) -> None:
        """Take more tokens, (batch, heads, n, size) float."""

    @abstractmethod
    def read(self) -> Tensor | None:
        """All tokens in float, (batch, heads, slots, size); None where there are none."""

    def take(self, index: Tensor) -> Tensor:
        """These tokens of each head in float: index (batch, heads, n) int64 → (batch, heads, n, size)."""
        found = self.read()
        assert found is not None, "nothing is stored yet"
        return found.gather(2, wide(index, found))

    @abstractmethod
    def rows(self, index: Tensor) -> None:
        """Take these rows of the batch, in this order."""

    def fork(self) -> Self:
        """One that may grow while this one stays."""
        return copy.copy(self)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Of all tensors that are held."""


class SlotStore(Store):
    """Tensors by name, all of them (batch, heads, slots, …): what a cache that drops tokens holds."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def _put(self, more: dict[str, Tensor]) -> None:
        self.held = {k: torch.cat([self.held[k], v], 2) if k in self.held else v.clone() for k, v in more.items()}
        self.slots = next(iter(self.held.values())).shape[2]

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.held = {name: change(tensor) for name, tensor in self.held.items()}
        self.slots = next(iter(self.held.values())).shape[2] if self.held else 0

    @abstractmethod
    def replace(self, index: Tensor, states: Tensor) -> None:
        """Overwrite one slot of each head: index (batch, heads, 1) int64, states (batch, heads, 1, size)."""

    def keep(self, index: Tensor) -> None:
        """Drop all slots but these, (batch, heads, n) int64, in their order."""
        self._each(lambda held: held.gather(2, wide(index, held)))

    def _overwrite(self, index: Tensor, more: dict[str, Tensor]) -> None:
        for name, tensor in more.items():
            self.held[name].scatter_(2, wide(index, tensor), tensor)

    def rows(self, index: Tensor) -> None:
        slots = self.slots
        self._each(lambda held: held.index_select(0, index))
        self.slots = slots  # rows are of the batch, and not all stores have a token per place

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.held.values())


def wide(index: Tensor, like: Tensor) -> Tensor:
    """(batch, heads, n) → (batch, heads, n, rest)."""
    return index[..., None].expand(*index.shape, like.shape[-1])


class FloatStore(SlotStore):
    """As computed."""

    def append(self, states: Tensor) -> None:
        self._put({"states": states})

    def read(self) -> Tensor | None:
        return self.held.get("states")

    def replace(self, index: Tensor, states: Tensor) -> None:
        self._overwrite(index, {"states": states})


class RowStore(SlotStore):
    """Each token's vector of one head is a row of a format. rotated: see `turn`."""

    def __init__(self, form: Format, rotated: bool = False) -> None:
        super().__init__()
        self.form, self.rotated = form, rotated
        self.size, self.dtype = 0, torch.float32

    def append(self, states: Tensor) -> None:
        self.size, self.dtype = states.shape[-1], states.dtype
        if states.shape[2]:
            self._put(self._encoded(states))

    def _encoded(self, states: Tensor) -> dict[str, Tensor]:
        return encode(self.form, states.float() @ turn(self.size).to(states.device) if self.rotated else states)

    def read(self) -> Tensor | None:
        if not self.slots:
            return None
        return self._decoded(self.held)

    def _decoded(self, held: dict[str, Tensor]) -> Tensor:
        found = decode(self.form, held, self.size)
        return (found @ turn(self.size).T.to(found.device) if self.rotated else found).to(self.dtype)

    def take(self, index: Tensor) -> Tensor:
        return self._decoded({name: held.gather(2, wide(index, held)) for name, held in self.held.items()})

    def replace(self, index: Tensor, states: Tensor) -> None:
        self._overwrite(index, self._encoded(states))


@cache
def turn(size: int) -> Tensor:
    """The orthogonal matrix (size, size) float32 that vectors are multiplied with before they are rounded: Hadamard's
    with random signs, always the same; where none of that order is known, a random one (compress/maths/rotation.py).
    Outliers are spread over all channels (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456). It is no state of a cache:
    `nbytes` do not count it, and callers do not write to it."""
    return rotation(size, "hadamard", torch.Generator().manual_seed(0)).matrix().float()


class StaticStore(SlotStore):
    """Codes alone, by scales that all tokens share (compress/kv/static.py), which count once."""

    def __init__(self, form: static.StaticFormat, scale: Tensor) -> None:
        super().__init__()
        self.form, self.scale = form, scale
        self.size, self.dtype = 0, torch.float32

    def append(self, states: Tensor) -> None:
        self.size, self.dtype = states.shape[-1], states.dtype
        self.scale = self.scale.to(states.device)
        heads = states.shape[1]
        if self.scale.shape != (expected := static.scale_shape(self.form, heads, self.size)):
            raise InputError(
                f"Scales of a cache in {self.form} are {list(self.scale.shape)}, and {heads} heads of {self.size} "
                f"take {list(expected)}. They are of another model."
            )
        if states.shape[2]:
            self._put({"codes": static.encode(self.form, states, self.scale)})

    def read(self) -> Tensor | None:
        return self._decoded(self.held["codes"]) if self.slots else None

    def _decoded(self, codes: Tensor) -> Tensor:
        return static.decode(self.form, codes, self.scale, self.size).to(self.dtype)

    def take(self, index: Tensor) -> Tensor:
        return self._decoded(self.held["codes"].gather(2, wide(index, self.held["codes"])))

    def replace(self, index: Tensor, states: Tensor) -> None:
        self._overwrite(index, {"codes": static.encode(self.form, states, self.scale)})

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.scale.numel() * self.scale.element_size()


def encode(form: Format, states: Tensor) -> dict[str, Tensor]:
    """(…, n, size) float → the format's tensors, (…, n, bytes of a row or parameters)."""
    flat = states.reshape(-1, states.shape[-1]).float()
    params = form.fit(flat)
    codes, _ = form.quantize(flat, params, torch.arange(flat.shape[1], device=flat.device))
    packed = form.pack(codes, params, (flat.shape[0], flat.shape[1]))
    return {name: tensor.reshape(*states.shape[:-1], -1) for name, tensor in packed.tensors.items()}


def decode(form: Format, held: dict[str, Tensor], size: int) -> Tensor:
    """What `encode` gave, in float32: (…, n, size)."""
    shape = next(iter(held.values())).shape[:-1]
    count = int(torch.Size(shape).numel())
    specs = form.tensor_specs((count, size))
    tensors = {name: tensor.reshape(specs[name][0]) for name, tensor in held.items()}
    return QuantTensor(form, tensors, (count, size)).dequantize().reshape(*shape, size)


class RecentStore(Store):
    """Rounded but for the newest tokens, which stay in float and are rounded as they leave (KIVI's values)."""

    def __init__(self, older: Store, residual: int) -> None:
        self.older, self.recent, self.residual = older, FloatStore(), residual

    def append(self, states: Tensor) -> None:
        self.recent.append(states)
        leaving = self._leaving()
        if leaving > 0:
            held = self.recent.held["states"]
            self.older.append(held[:, :, :leaving])
            self.recent = FloatStore()
            self.recent.append(held[:, :, leaving:])
        self.slots = self.older.slots + self.recent.slots

    def _leaving(self) -> int:
        return self.recent.slots - self.residual

    def read(self) -> Tensor | None:
        parts = [part for part in (self.older.read(), self.recent.read()) if part is not None]
        return torch.cat(parts, 2) if parts else None

    def take(self, index: Tensor) -> Tensor:
        before = self.older.slots
        if not before or not self.recent.slots:
            return (self.older if before else self.recent).take(index)
        newer = self.recent.take((index - before).clamp(min=0))
        return torch.where((index < before)[..., None], self.older.take(index.clamp(max=before - 1)), newer)

    def fork(self) -> Self:
        forked = copy.copy(self)
        forked.older, forked.recent = self.older.fork(), self.recent.fork()
        return forked

    def rows(self, index: Tensor) -> None:
        self.older.rows(index)
        self.recent.rows(index)

    @property
    def nbytes(self) -> int:
        return self.older.nbytes + self.recent.nbytes


class ChannelStore(RecentStore):
    """Keys as KIVI has them (arXiv 2402.02750): runs of tokens of one channel share a scale. Tokens are rounded for
    good, a whole residual at a time, once that many are there."""

    def __init__(self, form: IntGrid, residual: int) -> None:
        super().__init__(_Runs(form), residual)

    def _leaving(self) -> int:
        return self.recent.slots // self.residual * self.residual


class _Runs(RowStore):
    """Channels over runs of `group` tokens as rows: (batch, heads, runs · channels, group)."""

    form: IntGrid

    def append(self, states: Tensor) -> None:
        batch, heads, count, channels = states.shape
        self.channels, self.run = channels, int(self.form.group)
        turned = states.reshape(batch, heads, count // self.run, self.run, channels).transpose(3, 4)
        super().append(turned.reshape(batch, heads, -1, self.run))

    def read(self) -> Tensor | None:
        found = super().read()
        if found is None:
            return None
        batch, heads = found.shape[:2]
        runs = found.reshape(batch, heads, -1, self.channels, self.run).transpose(3, 4)
        return runs.reshape(batch, heads, -1, self.channels)

    def take(self, index: Tensor) -> Tensor:
        return Store.take(self, index)  # a token's channels lie in many rows

    def _put(self, more: dict[str, Tensor]) -> None:
        super()._put(more)
        self.slots = self.slots // self.channels * self.run
