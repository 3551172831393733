"""What a lowering answers, and how the target asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from typing import Any

from compress.errors import UnsupportedError, UsageError
from compress.export.onnx import LOWERINGS, half
from compress.hwprofiles import Runtime
from compress.layer import Layer, LayerSpec
from compress.records import Bounds, Kernel
from compress.target import Refusal


@dataclass(frozen=True)
class Choice:
    """A layer's way into the graph.

    lowering: module path; stored_bytes: of all initializers it adds; bounds: published bounds on the relative
    logit difference.
    """

    operator: str
    kernel: Kernel
    lowering: str
    stored_bytes: int
    note: str = ""
    block: int = 0
    accuracy_level: int = 0
    stored_bits: int = 0
    bounds: Bounds = field(default_factory=Bounds)

    @property
    def module(self) -> Any:
        """The lowering's module."""
        return import_module(self.lowering)


@dataclass(frozen=True)
class Source:
    """A layer to lower: its spec, its choice, and how to read it."""

    spec: LayerSpec
    choice: Choice
    read: Callable[[], Layer]


@cache
def _modules() -> tuple[Any, ...]:
    return tuple(import_module(path) for path in LOWERINGS)


def choose(spec: LayerSpec, runtime: Runtime) -> Choice | Refusal:
    """The first lowering that takes the layer, or all reasons why none does."""
    problem = half.problem(runtime)
    if problem is not None:
        return problem
    refused: list[Refusal] = []
    for module in _modules():
        answer = module.choose(spec, runtime)
        if isinstance(answer, Choice):
            return _in_half(spec, answer) if half.wanted(runtime) else answer
        if answer is not None:
            refused.append(answer)
    if not refused:
        return Refusal(f"no operator stores {spec.format}", usage=False)
    return Refusal("; ".join(each.reason for each in refused), usage=any(each.usage for each in refused))


def _in_half(spec: LayerSpec, choice: Choice) -> Choice:
    """The same in float16: how its weight is stored where no pass quantized it, and how near it comes."""
    bounds = Bounds(
        shipped=max(choice.bounds.shipped, half.BOUNDS.shipped), exact=max(choice.bounds.exact, half.BOUNDS.exact)
    )
    wide = spec.format is None and spec.source_dtype.itemsize > 2
    saved = spec.shape[0] * spec.shape[1] * (spec.source_dtype.itemsize - 2) if wide else 0
    return replace(choice, bounds=bounds, stored_bytes=choice.stored_bytes - saved)


def require(spec: LayerSpec, runtime: Runtime, profile: str) -> Choice:
    """As `choose`. Raises: UsageError or UnsupportedError with the reasons, naming the layer."""
    answer = choose(spec, runtime)
    if isinstance(answer, Refusal):
        kind = UsageError if answer.usage else UnsupportedError
        raise kind(f"Layer {spec.name} cannot be exported for profile {profile}: {answer.reason}.")
    return answer
