"""Statistics of layer inputs, added up while blocks run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compress import experts, hessian
from compress.layer import LayerKind, LayerSpec


@dataclass
class LayerStats:
    """What a pass may ask for about a layer's input. hessian: (in, in) float32, mean of x xᵀ; tokens: rows seen."""

    hessian: Tensor | None = None
    tokens: int = 0


class Collector:
    """Sums x xᵀ per input tensor: layers that are fed the same tensor (q, k, v; gate, up) share one sum.

    An expert has its own, of the tokens routed to it; one that sees none has no statistics.
    """

    def __init__(self, module: nn.Module, specs: Sequence[LayerSpec]) -> None:
        self.experts = {spec.name for spec in specs if spec.kind is LayerKind.EXPERT}
        self.mixtures = {path: module.get_submodule(path) for path in {experts.owner(name)[0] for name in self.experts}}
        self.modules = {s.name: module.get_submodule(s.name) for s in specs if s.name not in self.experts}
        self.leader: dict[str, str] = {}
        self.total: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self._seen: list[tuple[Tensor, str]] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Meanwhile the layers' inputs are added up."""
        handles = [
            child.register_forward_pre_hook(self._hook(name), prepend=True) for name, child in self.modules.items()
        ]
        for path, child in self.mixtures.items():
            experts.set_observer(child, self._observer(path))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for child in self.mixtures.values():
                experts.set_observer(child, None)

    def _observer(self, path: str) -> experts.Observer:
        def add(key: str, expert: int, values: Tensor) -> None:
            name = f"{path}.{key}.{expert}"
            if name in self.experts:
                self._add(name, values)

        return add

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            values = inputs[0]
            for tensor, owner in self._seen:
                if tensor is values:
                    self.leader[name] = owner
                    return
            self._seen.append((values, name))
            self._add(name, values)

        return add

    def _add(self, name: str, values: Tensor) -> None:
        self.leader[name] = name
        self.total[name] = hessian.accumulate(self.total.get(name), values.float())
        self.tokens[name] = self.tokens.get(name, 0) + values.numel() // values.shape[-1]

    def next_batch(self) -> None:
        """Forget which tensors were seen: the next batch has others."""
        self._seen.clear()

    def finish(self) -> dict[str, LayerStats]:
        """Statistics by layer; layers that share inputs share them."""
        # passes compute on the CPU, wherever the blocks ran
        means = {name: (total / self.tokens[name]).cpu() for name, total in self.total.items()}
        return {name: LayerStats(means[owner], self.tokens[owner]) for name, owner in self.leader.items()}
