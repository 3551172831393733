"""What a lowering answers, and how the target asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib import import_module
from typing import Protocol, cast

import onnx_ir as ir

from compress.export.onnx import LOWERINGS, half
from compress.export.onnx.graph import GraphBuilder
from compress.formats.trellis import Trellis
from compress.honours import Honours
from compress.hwprofiles import KernelSpeed, Runtime
from compress.layer import Layer, LayerKind, LayerSpec
from compress.models.model import Model
from compress.records import Bounds, Kernel
from compress.target import Refusal, honoured

TRANSFORMED = frozenset({LayerKind.LINEAR})
"""The kinds whose `pre` is written in front of the layer, whatever its lowering."""


@dataclass(frozen=True)
class Choice:
    """A layer's way into the graph.

    lowering: path of a module with `LOWERS`; stored_bytes: of all initializers it adds; bounds: published bounds on
    the relative logit difference; rounds_inputs, decodes, speed: see compress.target.Choice; graph_bytes: of its nodes
    in a file beyond those of a layer that is one operator.
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
    rounds_inputs: bool = False
    decodes: bool = False
    speed: KernelSpeed | None = None
    graph_bytes: int = 0

    @property
    def lowers(self) -> Lowering:
        """What its lowering offers."""
        return cast(Offered, import_module(self.lowering)).LOWERS


@dataclass(frozen=True)
class Source:
    """A layer to lower: its spec, its choice, and how to read it."""

    spec: LayerSpec
    choice: Choice
    read: Callable[[], Layer]


class Linear(Protocol):
    """values (…, in) → (…, out); of `gather`: ids (…) → (…, features)."""

    def __call__(self, graph: GraphBuilder, source: Source, values: ir.Value, /) -> ir.Value:
        """Adds the layer's nodes at a place in the graph, and its tensors."""
        ...


class Convolution(Protocol):
    """values (batch, channels, h, w) → (batch, out, h', w'); node: the placeholder."""

    def __call__(self, graph: GraphBuilder, source: Source, values: ir.Value, node: ir.Node, /) -> ir.Value:
        """Adds the layer's nodes at a place in the graph, and its tensors."""
        ...


@dataclass(frozen=True)
class Lowering:
    """What a lowering's module declares as `LOWERS`: what of a layer it writes, and how each kind is written.

    linear, gather, conv: None where `honours` takes no layers of that kind. An embedding has both `gather` and
    `linear`, with which a tied head reads it. half: contributed operators that compute in float16 where what they are
    handed is; without it their inputs are cast to float32.
    Raises: TypeError for a kind that is declared and has no function.
    """

    honours: Honours
    linear: Linear | None = None
    gather: Linear | None = None
    conv: Convolution | None = None
    half: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for kind in sorted(self.honours.kinds):
            needed = {LayerKind.EMBEDDING: ("gather", "linear"), LayerKind.CONV: ("conv",)}.get(kind, ("linear",))
            missing = [name for name in needed if getattr(self, name) is None]
            if missing:
                raise TypeError(f"a lowering that takes layers of kind {kind} offers {' and '.join(missing)}")

    def write(self, graph: GraphBuilder, source: Source, values: ir.Value, node: ir.Node) -> ir.Value:
        """What the placeholder `node` puts out for `values`, by the function for what it computes with the layer."""
        if node.op_type == "Conv":
            assert self.conv is not None
            return self.conv(graph, source, values, node)
        made = self.gather if node.op_type == "Embedding" else self.linear
        assert made is not None
        return made(graph, source, values)


class Offered(Protocol):
    """The module of a lowering."""

    @property
    def LOWERS(self) -> Lowering:  # noqa: N802 (a constant of the module)
        """What it writes."""
        ...


class Asked(Offered, Protocol):
    """One of `LOWERINGS`."""

    def choose(self, spec: LayerSpec, runtime: Runtime) -> Choice | Refusal | None:
        """Its way for a layer, why it does not take it, or None where another lowering says so."""
        ...


@cache
def lowerings() -> tuple[Asked, ...]:
    """The modules of `LOWERINGS`, in their order."""
    return tuple(cast(Asked, import_module(path)) for path in LOWERINGS)


def choose(spec: LayerSpec, runtime: Runtime) -> Choice | Refusal:
    """The first lowering that takes the layer, or all reasons why none does."""
    problem = half.problem(runtime)
    if problem is not None:
        return problem
    refused: list[Refusal] = []
    for module in lowerings():
        answer = module.choose(spec, runtime)
        if isinstance(answer, Choice):
            answer = honoured(spec, answer, answer.lowers.honours, answer.operator)
        if isinstance(answer, Choice):
            return _in_half(spec, answer) if half.wanted(runtime) else answer
        if answer is not None:
            refused.append(answer)
    if not refused:
        other = ". Trellis codes go to --target checkpoint-exl3" if isinstance(spec.format, Trellis) else ""
        return Refusal(f"no operator stores {spec.format}{other}")
    return Refusal("; ".join(each.reason for each in refused), usage=any(each.usage for each in refused))


def _in_half(spec: LayerSpec, choice: Choice) -> Choice:
    """The same in float16: how its weight is stored where no pass quantized it, and how near it comes."""
    wide = spec.format is None and spec.source_dtype.itemsize > 2
    saved = spec.shape[0] * spec.shape[1] * (spec.source_dtype.itemsize - 2) if wide else 0
    bounds = Bounds.loosest((choice.bounds, half.BOUNDS))
    return replace(choice, bounds=bounds, stored_bytes=choice.stored_bytes - saved)


def sources_of(model: Model, choices: Mapping[str, Choice]) -> dict[str, Source]:
    """All layers to lower, by name."""
    layers = model.structure.layers
    return {name: Source(spec, choices[name], partial(model.layer, spec)) for name, spec in layers.items()}


def by_user(sources: Mapping[str, Source]) -> dict[str, Source]:
    """The same by the modules that use them, as placeholders name them."""
    return {user: source for source in sources.values() for user in source.spec.users}
