"""Passes that say how keys and values are cached: what is stored, and which tokens go. They change no weight.

A model's caches are `Model.kv`, one `KvSpec` per layer of the cache; without such a pass it is empty.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

from pydantic import model_validator

from compress.engine.layerpass import Pass
from compress.engine.part import Part
from compress.errors import UnsupportedError, UsageError
from compress.kv.cache import require_plain
from compress.kv.spec import KvSpec
from compress.layer import LayerSpec
from compress.models.model import Model, Task
from compress.records import LayerResult


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
        """What the cache of a layer becomes. Raises: UsageError."""


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
    for layer in range(count):
        spec = KvSpec()
        for item in ours:
            spec = item.fill(spec, layer)


def refilled(item: KvPass, caches: Sequence[KvSpec], model: Model) -> tuple[KvSpec, ...]:
    """The caches of a model after a pass. caches: before it, none where no pass was about them. Raises: UsageError."""
    before = caches or [KvSpec()] * len(cached_blocks(model))
    return tuple(item.fill(spec, layer) for layer, spec in enumerate(before))


def cached_blocks(model: Model) -> list[int]:
    """The places of the blocks that have a cache, in the order of the cache."""
    return model.blocks_without("no attention")


def carried(model: Model, made: Model) -> tuple[KvSpec, ...]:
    """The caches of a model of another shape, each as that of the block was."""
    if not model.kv:
        return ()
    known = dict(zip((model.origins[place] for place in cached_blocks(model)), model.kv, strict=True))
    return tuple(known[made.origins[place]] for place in cached_blocks(made))


def rows(item: KvPass, model: Model, caches: Sequence[KvSpec]) -> list[LayerResult]:
    """What a pass did, for the report: one row per cached layer. caches: after it."""
    names = [f"{model.structure.blocks[place]}.cache" for place in cached_blocks(model)]
    return [
        LayerResult(layer=name, users=(), pass_text=str(item), changed=True, format=spec.told())
        for name, spec in zip(names, caches, strict=True)
    ]
