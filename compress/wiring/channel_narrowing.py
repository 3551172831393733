"""Channels taken out of a classifier: the modules that are left, and the same module with these channels silent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.models import placing
from compress.models.edits import Edit, apply_edits
from compress.wiring.channels import Group

TOLERANCE = 1e-4
"""Largest change of an output, as a share of the largest output, that rounding in float32 may make."""


@dataclass(frozen=True)
class Gone:
    """What is taken out: by module path, rows of its weight and input channels."""

    rows: dict[str, set[int]] = field(default_factory=dict)
    columns: dict[str, set[int]] = field(default_factory=dict)

    @property
    def paths(self) -> list[str]:
        """The modules that change."""
        return list(dict.fromkeys((*self.rows, *self.columns)))


Choice = tuple[Group, Sequence[int]]
"""Units to take out of a group."""


def gone_of(chosen: Iterable[Choice]) -> Gone:
    """All that goes when units of some groups do."""
    gone = Gone()
    for group, units in chosen:
        for table, parts in ((gone.rows, {**group.rows, **group.along}), (gone.columns, group.columns)):
            for path, places in parts.items():
                table.setdefault(path, set()).update(place for unit in units for place in places[unit])
    return Gone(*({path: places for path, places in table.items() if places} for table in (gone.rows, gone.columns)))


def left_of(size: int, gone: Mapping[str, set[int]], path: str) -> Tensor:
    """Places (kept,) int64 of a dimension that stay."""
    away = gone.get(path, set())
    return torch.tensor([place for place in range(size) if place not in away], dtype=torch.int64)


def edits_of(module: nn.Module, gone: Gone) -> tuple[Edit, ...]:
    """The changes of shape."""
    found = []
    for path in gone.paths:
        weight = module.get_submodule(path)._parameters["weight"]
        assert weight is not None
        sizes = list(weight.shape)
        sizes[0] -= len(gone.rows.get(path, ()))
        if path in gone.columns:
            sizes[1] -= len(gone.columns[path])
        found.append(Edit(path, "resized", tuple(sizes)))
    return tuple(found)


def narrowed(module: nn.Module, gone: Gone) -> nn.Module:
    """A copy without the channels. module: with its weights."""
    made = deepcopy(module)
    apply_edits(made, edits_of(module, gone))
    for path in gone.paths:
        source, child = module.get_submodule(path), made.get_submodule(path)
        for name, tensor in (*source.named_parameters(recurse=False), *source.named_buffers(recurse=False)):
            if tensor.ndim:
                placing.set_tensor(child, name, cut(tensor, gone, path))
            else:
                placing.set_tensor(child, name, tensor)
    return made


def cut(tensor: Tensor, gone: Gone, path: str) -> Tensor:
    """A module's weight, bias or statistics without what is taken out of it."""
    kept = tensor[left_of(tensor.shape[0], gone.rows, path)]
    return kept[:, left_of(tensor.shape[1], gone.columns, path)] if path in gone.columns and tensor.ndim > 1 else kept


def silenced(module: nn.Module, gone: Gone) -> nn.Module:
    """A copy as wide as it was, in which no layer reads the channels."""
    made = deepcopy(module)
    for path, places in gone.columns.items():
        weight = made.get_submodule(path)._parameters["weight"]
        assert weight is not None
        weight.data[:, sorted(places)] = 0.0
    return made


def agree(module: nn.Module, gone: Gone, images: Tensor) -> bool:
    """Whether taking channels out leaves what silencing them does: then the module's own code follows the change."""
    with torch.no_grad():
        expected = silenced(module, gone)(images)
        try:
            found = narrowed(module, gone)(images)
        except CompressError:
            raise
        except Exception:  # the user's code, which may count on a number of channels
            return False
    if found.shape != expected.shape:
        return False
    scale = expected.abs().max().clamp(min=1e-30)
    return bool((found - expected).abs().max() <= TOLERANCE * scale)
