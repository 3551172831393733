"""One run of a loaded block, watched: which modules were called with which tensor objects, and what they put out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.engine.blockpass import Block, Runner
from compress.layer import Layer
from compress.models import experts, placing


@dataclass(frozen=True)
class Call:
    """One call of a module that has parameters of its own."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def inputs(self) -> Tensor | None:
        values = (*self.args, *self.kwargs.values())
        return next((value for value in values if isinstance(value, Tensor)), None)


@dataclass
class Trace:
    """One run of a block: calls in order, what entered each expert, what came out."""

    calls: list[Call] = field(default_factory=list)
    experts: dict[str, Tensor] = field(default_factory=dict)
    output: Tensor = field(default_factory=lambda: torch.empty(0))

    def entering(self, name: str) -> Tensor | None:
        """What a layer was fed; None where it did not run."""
        found = (call.inputs for call in self.calls if call.path == name)
        return self.experts.get(name, next(found, None))


def run(block: Block, runner: Runner) -> Trace:
    """Run the block on its first batch and note who was fed what. Tensors stay alive, so none takes another's place."""
    with watching(runner.module.named_modules(prefix=block.name)) as trace:
        trace.output = runner.forward(0)
    return trace


@contextmanager
def watching(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[Trace]:
    """Meanwhile calls of the modules that have parameters of their own are noted. modules: by path."""
    trace = Trace()
    with ExitStack() as stack:
        for path, module in modules:
            if any(True for _ in module.parameters(recurse=False)):
                stack.enter_context(_watched(path, module, trace))
        yield trace


@contextmanager
def _watched(path: str, module: nn.Module, trace: Trace) -> Iterator[None]:
    entered: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append((args, kwargs))  # as they are before the layer's own rounding of them

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        trace.calls.append(Call(path, module, *entered.pop(), output))

    def inside(key: str, expert: int, values: Tensor) -> None:
        trace.experts[f"{path}.{key}.{expert}"] = values

    handles = [
        module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]
    if experts.is_experts(module):
        experts.set_observer(module, inside)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if experts.is_experts(module):
            experts.set_observer(module, None)


@contextmanager
def replaced(runner: Runner, block: Block, layers: Mapping[str, Layer], plain: Mapping[str, Tensor]) -> Iterator[None]:
    """Some layers and tensors of the loaded block are others meanwhile."""
    device = next(runner.module.parameters()).device

    def put(layers: Mapping[str, Layer], plain: Mapping[str, Tensor]) -> None:
        for layer in layers.values():
            assert isinstance(layer.weight, Tensor)
            bias = None if layer.bias is None else layer.bias.to(device)
            placing.put_layer(runner.root, replace(layer, weight=layer.weight.to(device), bias=bias))
        placing.put_plain(runner.root, {name: tensor.to(device) for name, tensor in plain.items()}, {})

    put(layers, plain)
    try:
        yield
    finally:
        put({name: block.layers[name] for name in layers}, {name: block.plain[name] for name in plain})


def same(one: Any, other: Tensor | None) -> bool:
    """Whether two tensors are one, whatever leading shape they are seen in."""
    if not isinstance(one, Tensor) or other is None:
        return False
    alike = (one.numel(), one.shape[-1:], one.dtype) == (other.numel(), other.shape[-1:], other.dtype)
    return alike and one.data_ptr() == other.data_ptr()
