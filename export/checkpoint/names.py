"""What transformers would call each tensor in a saved checkpoint, and where a layer's rows go in it.

In memory a mixture's experts are one 3-D parameter; in the files of Mixtral, Qwen-MoE and the like each is a module of
its own, gate and up apart. transformers knows the way back (`revert_weight_conversion`). It is run here once over
numbers of rows instead of weights, so that what comes out tells which rows of which layer each file tensor holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from compress.errors import UnsupportedError
from compress.layer import LayerKind, LayerSpec
from compress.models.model import Model

SUFFIX = ".weight"


@dataclass(frozen=True)
class Place:
    """A module of the files and the rows [start, stop) of the layer that are its weight."""

    module: str
    start: int
    stop: int


class FileNames:
    """File names of a model's parameters. Args: model: whose structure counts, not its weights."""

    def __init__(self, model: Model) -> None:
        self.module: Any = model.skeleton()

    def revert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by parameter name → by the names, and in the shapes, of a saved checkpoint."""
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(self.module, dict(tensors)))

    def places(self, spec: LayerSpec) -> tuple[Place, ...]:
        """The file modules that hold a layer, in order of its rows; those of its first user.

        Empty where the files have no module of its own for it: then it can only be stored in float.
        """
        if spec.kind is LayerKind.EXPERT:
            stack, _, index = spec.name.rpartition(".")
            return self._by_layer.get((stack, int(index)), ())
        return self._by_layer.get((f"{spec.name}{SUFFIX}", 0), ())

    def module_name(self, user: str) -> str:
        """The file's name of a module in memory; the same where it has no weight of its own."""
        found = self._by_layer.get((f"{user}{SUFFIX}", 0), ())
        return found[0].module if found else user

    @cached_property
    def _by_layer(self) -> dict[tuple[str, int], tuple[Place, ...]]:
        """(parameter, expert or 0) → its places, only where they hold each row once."""
        numbers, homes, rows_of = {}, [], {}
        start = 0
        for name, value in self.module.state_dict().items():
            if value.ndim < 2:
                continue
            shape = tuple(value.shape) if value.ndim == 3 else (1, *value.shape[:1], 1)
            turned = value.ndim == 3 and self._is_turned(name)
            experts, rows = shape[0], shape[2] if turned else shape[1]
            ids = torch.arange(start, start + experts * rows).reshape(experts, rows)
            numbers[name] = (ids[:, None] if turned else ids[..., None]) if value.ndim == 3 else ids[0, :, None]
            homes.append((start, name, rows))
            rows_of[name] = rows
            start += experts * rows
        found: dict[tuple[str, int], list[Place]] = {}
        starts = torch.tensor([home[0] for home in homes])
        for key, ids in self.revert(numbers).items():
            self._note(key, ids, homes, starts, found)
        whole = {key: tuple(sorted(places, key=lambda place: place.start)) for key, places in found.items()}
        return {key: places for key, places in whole.items() if _covers(places, rows_of[key[0]])}

    def _is_turned(self, name: str) -> bool:
        owner = self.module.get_submodule(name.rpartition(".")[0])
        return bool(getattr(owner, "is_transposed", False))

    def _note(
        self, key: str, ids: Tensor, homes: list[tuple[int, str, int]], starts: Tensor, found: dict[Any, list[Place]]
    ) -> None:
        """Enter one file tensor where it is a module's weight, made of consecutive rows of one layer."""
        flat = ids.reshape(-1)
        ordered = torch.equal(flat, torch.arange(int(flat[0]), int(flat[0]) + len(flat)))
        if ids.ndim != 2 or ids.shape[1] != 1 or not ordered or not key.endswith(SUFFIX):
            return
        start, name, rows = homes[int(torch.searchsorted(starts, flat[0], right=True)) - 1]
        expert, row = divmod(int(flat[0]) - start, rows)
        if row + len(flat) <= rows:
            place = Place(key.removesuffix(SUFFIX), row, row + len(flat))
            found.setdefault((name, expert), []).append(place)


def require_expert_names(
    specs: Mapping[str, LayerSpec], places: Mapping[str, tuple[Place, ...]], layout: str, reader: str
) -> None:
    """Raises: UnsupportedError for experts whose files name them otherwise than memory, which a layout's reader (empty:
    any) then does not find, or leaves random."""
    for name, spec in specs.items():
        if not reader or spec.kind is not LayerKind.EXPERT or spec.format is None:
            continue
        stack, _, index = name.rpartition(".")
        home = f"{stack.rpartition('.')[0]}.{index}."
        for place in places.get(name, ()):
            if not place.module.startswith(home):
                raise UnsupportedError(
                    f"Layer {name} cannot be stored as {layout}: this model's files name it {place.module}, and "
                    f"{reader}, which reads experts of that layout, looks under {home} only. Export for checkpoint "
                    "(--target checkpoint), whose experts transformers reads."
                )


def _covers(places: tuple[Place, ...], rows: int) -> bool:
    ends = [0, *(place.stop for place in places)]
    return [place.start for place in places] == ends[:-1] and ends[-1] == rows
