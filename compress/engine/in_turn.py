"""What passes have in common that solve layers by second moments, one after the other as data reach them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Protocol

import torch

from compress.engine.layer_stats import LayerStats, Stat
from compress.errors import UsageError
from compress.layer import Layer
from compress.solve import System


class InTurn(Protocol):
    """The settings: `sequential` whether layers are taken in turn, `mismatch` how much of the difference to the inputs
    of the uncompressed model is made up for (`solve.matched`)."""

    name: ClassVar[str]

    @property
    def sequential(self) -> bool: ...

    @property
    def mismatch(self) -> float: ...

    @property
    def model_fields_set(self) -> set[str]: ...


def crossed(item: InTurn) -> frozenset[Stat]:
    """The statistic that `mismatch` asks for, where there is any."""
    return frozenset({Stat.CROSS} if item.sequential and item.mismatch else ())


def check_mismatch(item: InTurn) -> None:
    """Raises: UsageError where `mismatch` is given to layers that are not taken in turn."""
    if item.mismatch and "mismatch" in item.model_fields_set and not item.sequential:
        raise UsageError(
            f"{item.name}: mismatch={item.mismatch:g} needs sequential=true: a correction that does not know the "
            "errors made inside the block does harm. Leave one of the two out, or set mismatch=0."
        )


def refuse_fixed(name: str, pattern: str, settings: Mapping[str, Any], fixed: Collection[str]) -> None:
    """Raises: UsageError where a pass's overrides set what holds for all layers."""
    refused = sorted(set(fixed) & set(settings))
    if refused:
        raise UsageError(
            f"{name}: overrides of '{pattern}' may not set {refused[0]}: it decides how data are collected for all "
            "layers. Set it for the whole pass."
        )


def check_guided(name: str, pattern: str, settings: Mapping[str, Any], guided: int) -> None:
    """Raises: UsageError where a pass's overrides set another number of guided groups than the pass's own."""
    if settings.get("guided", 0) not in (0, guided):
        raise UsageError(
            f"{name}: overrides of '{pattern}' may not set guided={settings['guided']}: one backward pass serves all "
            "layers. Set it for the whole pass; an override may then set guided=0."
        )


class Systems:
    """Systems of layers, one for those that are fed the same; unknown: the second moment of the inputs of a layer that
    no token reached, which count alike."""

    def __init__(self, unknown: float = 1.0) -> None:
        self._unknown = unknown
        self._made: dict[object, System] = {}

    def of(self, layer: Layer, stats: LayerStats, damp: float, step: int, order: str) -> System:
        """See `System.of`."""
        key = (layer.name if stats.hessian is None else id(stats.hessian), damp, step, order)
        if key not in self._made:
            hessian = torch.eye(layer.shape[1]) * self._unknown if stats.hessian is None else stats.hessian
            self._made[key] = System.of(hessian, damp, step, order)
        return self._made[key]
