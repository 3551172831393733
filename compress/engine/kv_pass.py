"""Passes that say how keys and values are cached: what is stored, and which tokens go. They change no weight.

A model's caches are `Model.kv`, one `KvSpec` per layer of the cache; without such a pass it is empty. A pass may fit
them to data (`KvPass.measures`): it observes each layer of the finished model, all other passes done, and then
concludes for all layers together (compress/engine/kv_fit.py). What it finds are tensors, kept in `model/`
(compress/models/cache_tensors.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, NamedTuple, Protocol, Self, TypeVar

from pydantic import model_validator
from torch import Tensor

from compress.engine.layerpass import Pass
from compress.engine.part import Part
from compress.errors import UnsupportedError, UsageError
from compress.kv.attention import require_plain
from compress.kv.observed import Attended
from compress.kv.spec import KvSpec, LayerTensors
from compress.layer import LayerSpec
from compress.models.model import Model, Task
from compress.records import LayerResult

Held = TypeVar("Held")


class KvPass(Pass, ABC):
    """A pass that fills a part of every `KvSpec`.

    It has no targets: caches belong to attentions, not to layers. `fills_cache` names the part, which is filled once.
    """

    part: ClassVar[Part] = Part.NONE
    per_layer: ClassVar[bool] = False
    caches: ClassVar[bool] = True
    fills_cache: ClassVar[str]

    @model_validator(mode="after")
    def _check_patterns(self) -> Self:
        if self.targets or self.ignore or self.overrides:
            raise UsageError(f"{self.name} is for the cache of every layer: it takes no targets, ignore or overrides.")
        return self

    def precedes(self) -> frozenset[Part]:
        """Nothing: it may come anywhere."""
        return frozenset()

    def plan(self, spec: LayerSpec) -> LayerSpec:
        return spec

    def check(self, model: Model) -> None:
        if model.task is not Task.CAUSAL_LM:
            raise UnsupportedError(f"{self.name}: a model of task {model.task} generates nothing, so it has no cache.")
        try:
            require_plain(model.skeleton())
        except UnsupportedError as error:
            raise UnsupportedError(f"{self.name}: {error} Leave the pass out.") from error

    @abstractmethod
    def fill(self, spec: KvSpec, layer: int) -> KvSpec:
        """What the cache of a layer becomes, as far as it is known without data. Raises: UsageError."""

    def filled(self, caches: Sequence[KvSpec]) -> tuple[KvSpec, ...]:
        """What the caches of all layers become, as far as it is known without data. Raises: UsageError."""
        return tuple(self.fill(spec, layer) for layer, spec in enumerate(caches))

    def alternatives(self, spec: KvSpec) -> tuple[KvSpec, ...]:
        """What data may make of a layer's cache in place of what is known without: a target must take these too."""
        return ()

    @property
    def counts_layers(self) -> bool:
        """Whether these settings share something out over all layers, so that none may leave the model after it."""
        return False

    @property
    def measures(self) -> bool:
        """Whether these settings take calibration data: then `observe` and `conclude` are called."""
        return False

    @property
    def needs_data(self) -> bool:
        return self.measures

    def windows(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        """The token windows (batch, n) int64 that it observes, made of those of calibration."""
        return batches

    def observe(self, spec: KvSpec, layer: int, seen: Observed) -> dict[str, Tensor]:
        """What it takes from one layer of the finished model, by names of its own. A stopped run keeps it."""
        raise NotImplementedError(f"{self.name} measures, but observes nothing")

    def conclude(self, caches: Sequence[KvSpec], found: Sequence[Mapping[str, Tensor]]) -> Sequence[Settled]:
        """What the caches of all layers become. found: of each, what `observe` took."""
        raise NotImplementedError(f"{self.name} measures, but settles nothing")


class Observed(Protocol):
    """One layer's attention on all windows, batch by batch, computed anew each time it is gone through."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Attended]: ...


class Settled(NamedTuple):
    """One layer's cache as data settled it. tensors: more of what `spec.wants`; notes: for the report."""

    spec: KvSpec
    tensors: LayerTensors = MappingProxyType({})
    notes: tuple[str, ...] = ()


def check_filled(passes: Sequence[Pass], count: int) -> None:
    """Raises: UsageError for what cannot be of a model with so many cached layers."""
    ours = [item for item in passes if isinstance(item, KvPass)]
    parts: dict[str, str] = {}
    for item in ours:
        if item.fills_cache in parts:
            raise UsageError(
                f"{parts[item.fills_cache]} and {item} both say {item.fills_cache} of the cache. Leave one of them out."
            )
        parts[item.fills_cache] = str(item)
    _check_order(passes)
    caches = (KvSpec(),) * count
    for item in ours:
        caches = item.filled(caches)


def _check_order(passes: Sequence[Pass]) -> None:
    """Raises: UsageError where layers may leave a model that a budget was shared out over."""
    for place, item in enumerate(passes):
        later = next((each for each in passes[place:] if each.reshapes), None)
        if isinstance(item, KvPass) and item.counts_layers and later is not None:
            raise UsageError(
                f"{item} shares out over all layers, and {later.name} after it may take some away. Move it behind "
                f"{later.name}."
            )


def refilled(item: KvPass, caches: Sequence[KvSpec], model: Model) -> tuple[KvSpec, ...]:
    """The caches of a model after a pass. caches: before it, none where no pass was about them. Raises: UsageError."""
    before = caches or [KvSpec()] * len(cached_blocks(model))
    return item.filled(before)


def cached_blocks(model: Model) -> list[int]:
    """The places of the blocks that have a cache, in the order of the cache."""
    return model.blocks_without("no attention")


def carried(model: Model, made: Model) -> tuple[KvSpec, ...]:
    """The caches of a model of another shape, each as that of the block was."""
    return _by_block(model.kv, model, made) if model.kv else ()


def carried_tensors(model: Model, made: Model) -> tuple[LayerTensors, ...]:
    """What those caches had beside their specs."""
    return _by_block(model.kv_tensors, model, made) if model.kv else ({},) * len(cached_blocks(made))


def _by_block(held: Sequence[Held], model: Model, made: Model) -> tuple[Held, ...]:
    known = dict(zip((model.origins[place] for place in cached_blocks(model)), held, strict=True))
    return tuple(known[made.origins[place]] for place in cached_blocks(made))


def rows(item: KvPass, model: Model, settled: Sequence[Settled]) -> list[LayerResult]:
    """What a pass did, for the report: one row per cached layer. settled: the caches after it."""
    names = [f"{model.structure.blocks[place]}.cache" for place in cached_blocks(model)]
    return [
        LayerResult(layer=name, users=(), pass_text=str(item), changed=True, format=each.spec.told(), notes=each.notes)
        for name, each in zip(names, settled, strict=True)
    ]
