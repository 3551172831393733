"""The forward stream: batches of token windows pass through a model one block at a time (design §3).

Memory is one block plus the activations, which go to a memory-mapped file above `SPILL_BYTES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress import experts, hessian, skeleton
from compress.errors import InputError, UnsupportedError
from compress.layer import Layer, LayerKind, LayerSpec
from compress.model import Model
from compress.skeleton import OUTER
from compress.stub import Call, Stub, shortened

SPILL_BYTES = 128 * 2**20


@dataclass
class LayerStats:
    """What a pass may ask for about a layer's input. hessian: (in, in) float32, mean of x xᵀ; tokens: rows seen."""

    hessian: Tensor | None = None
    tokens: int = 0


class BlockStream:
    """Windows on their way through a model.

    Args: model: whose outer tensors and config are used; batches: (B, T) int64 ids each; spill: folder for
    activations that do not fit in memory, or None to keep them there.
    """

    def __init__(self, model: Model, batches: Sequence[Tensor], *, device: str = "cpu", spill: Path | None = None):
        self.model = model
        self.batches = batches
        self.device = torch.device(device)
        self.module = model.skeleton()
        self.hidden: list[Tensor] = []
        self.outer: Mapping[str, Layer] = {}
        self._calls: dict[tuple[int, ...], list[Call]] = {}
        self._size = 0
        self._spill = spill

    def start(self, outer: Mapping[str, Layer]) -> None:
        """Load the outer tensors and bring every batch to the first block."""
        self.outer = outer
        self._put_outer()
        self._learn_return_type()
        self.hidden = self._keep([self._enter(batch) for batch in self.batches])
        self._release_outer()

    def _put_outer(self) -> None:
        for layer in self.outer.values():
            skeleton.put_layer(self.module, layer)
        skeleton.put_plain(self.module, self.model.plain(OUTER), self.model.structure.aliases)
        self._to_device(self.module)

    def _release_outer(self) -> None:
        for layer in self.outer.values():
            for user in layer.users:
                skeleton.release(self.module, user)

    def _to_device(self, module: nn.Module) -> None:
        if self.device.type == "cpu":
            return
        for child in module.modules():
            for table in (child._parameters, child._buffers):
                for key, tensor in table.items():
                    if tensor is not None and tensor.device.type != "meta":
                        table[key] = tensor.to(self.device)  # type: ignore[assignment]

    def _learn_return_type(self) -> None:
        """What a block returns, a tensor or a tuple of some size, from the real first block on two tokens."""
        self.load(0, self.model.layers(0), self.model.plain(0))
        returned: list[Any] = []
        block = self._blocks()[0]
        hook = block.register_forward_hook(lambda _m, _i, output: returned.append(output))
        with torch.no_grad(), shortened(self._blocks(), [block]):
            self._call_model(self.batches[0][:1, :2].to(self.device))
        hook.remove()
        self._size = len(returned[0]) if isinstance(returned[0], tuple) else 0
        self.release(0)

    def _blocks(self) -> nn.ModuleList:
        blocks = self.module.get_submodule(self.model.structure.blocks_path)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def _call_model(self, ids: Tensor) -> Any:
        base = getattr(self.module, str(self.module.base_model_prefix), self.module)
        return base(input_ids=ids, **_no_cache(self.module))

    def _enter(self, batch: Tensor) -> Tensor:
        """Hidden states at the first block; notes once per shape how each block is called."""
        stubs = [Stub(block, self._size) for block in self._blocks()]
        with torch.no_grad(), shortened(self._blocks(), stubs):
            self._call_model(batch.to(self.device))
        for stub, name in zip(stubs, self.model.structure.blocks, strict=True):
            if len(stub.calls) != 1:
                raise UnsupportedError(
                    f"{type(self.module).__name__} runs {name} {len(stub.calls)} times in one pass, so it cannot be "
                    "walked block by block. Supported: models that run each block once."
                )
        hidden = stubs[0].hidden
        if hidden.shape[:2] != batch.shape:
            raise UnsupportedError(
                f"{type(self.module).__name__} does not lay out its hidden states as (batch, length)."
            )
        if tuple(batch.shape) not in self._calls:
            self._calls[tuple(batch.shape)] = [stub.call for stub in stubs]
        return hidden.cpu()

    def _keep(self, hidden: list[Tensor]) -> list[Tensor]:
        size = sum(tensor.numel() for tensor in hidden)
        if self._spill is None or size * 4 <= SPILL_BYTES:
            return hidden
        path = self._spill / "activations.bin"
        flat = torch.from_file(str(path), shared=True, size=size, dtype=torch.float32)
        views, at = [], 0
        for tensor in hidden:
            view = flat[at : at + tensor.numel()].view(tensor.shape)
            view.copy_(tensor)
            views.append(view)
            at += tensor.numel()
        return views

    def load(self, index: int, layers: Mapping[str, Layer], plain: Mapping[str, Tensor]) -> None:
        """Put a block's weights in place."""
        for layer in layers.values():
            skeleton.put_layer(self.module, layer)
        skeleton.put_plain(self.module, plain, self.model.structure.aliases)
        self._to_device(self.module.get_submodule(self.model.structure.blocks[index]))

    def put(self, layer: Layer) -> None:
        """Replace one layer of the loaded block."""
        skeleton.put_layer(self.module, layer)
        for user in layer.users:
            path = experts.owner(user)[0] if layer.kind is LayerKind.EXPERT else user
            self._to_device(self.module.get_submodule(path))

    def release(self, index: int) -> None:
        """Give a block's memory back."""
        skeleton.release(self.module, self.model.structure.blocks[index])

    def _outputs(self, index: int) -> Iterator[tuple[int, Tensor]]:
        block = self.module.get_submodule(self.model.structure.blocks[index])
        for place, hidden in enumerate(self.hidden):
            args, kwargs = self._calls[tuple(hidden.shape[:2])][index]
            with torch.no_grad():
                output = block(hidden.to(self.device), *args, **kwargs)
            yield place, output[0] if isinstance(output, tuple) else output

    def advance(self, index: int) -> None:
        """Run the loaded block on every batch; its outputs become the next block's inputs."""
        for place, output in self._outputs(index):
            self.hidden[place].copy_(output)
        if not bool(torch.isfinite(self.hidden[-1]).all()):
            name = self.model.structure.blocks[index]
            raise InputError(f"{name} puts out NaN or infinite values. The run stops here; check model and recipe.")

    def collect(self, index: int, names: Iterable[str]) -> dict[str, LayerStats]:
        """Second moments of the inputs of some layers of the loaded block."""
        collector = _Collector(self.module, [self.model.structure.layers[name] for name in names])
        with collector.attached():
            for _ in self._outputs(index):
                collector.next_batch()
        return collector.finish()

    def collect_head(self, names: Iterable[str]) -> dict[str, LayerStats]:
        """The same for layers after the last block."""
        collector = _Collector(self.module, [self.model.structure.layers[name] for name in names])
        with collector.attached():
            for _ in self.logits():
                collector.next_batch()
        return collector.finish()

    def logits(self) -> Iterator[Tensor]:
        """The model's output for each batch, from the hidden states after the last block: (B, T, V) float32, or
        (B, T, features) for an encoder."""
        self._put_outer()
        for place, batch in enumerate(self.batches):
            stub = Stub(self._blocks()[0], self._size, self.hidden[place].to(self.device))
            with torch.no_grad(), shortened(self._blocks(), [stub]):
                output = self.module(input_ids=batch.to(self.device), **_no_cache(self.module))
            result: Tensor = output.logits if "logits" in output else output.last_hidden_state
            yield result.float().cpu()
        self._release_outer()


def _no_cache(module: nn.Module) -> dict[str, Any]:
    return {"use_cache": False} if hasattr(module.config, "use_cache") else {}


class _Collector:
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
        self._seen.clear()

    def finish(self) -> dict[str, LayerStats]:
        means = {name: (total / self.tokens[name]) for name, total in self.total.items()}
        return {name: LayerStats(means[owner], self.tokens[owner]) for name, owner in self.leader.items()}
