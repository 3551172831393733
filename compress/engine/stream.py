"""The forward stream: batches of token windows pass through a model one block at a time (design §3).

Memory is one block plus the activations, which go to a mapped file above a limit (compress/maths/activations.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.engine.collect import Collector
from compress.engine.layer_stats import LayerStats, Stat
from compress.errors import InputError, UnsupportedError
from compress.layer import Layer, LayerKind
from compress.maths import products
from compress.maths.activations import allocate, rest
from compress.models import experts, placing
from compress.models.model import Model
from compress.models.skeleton import OUTER
from compress.models.stub import Call, Stub, same_arguments, shortened

if TYPE_CHECKING:
    from compress.engine.image_stream import Stream


class BlockStream:
    """Windows on their way through a model.

    Args: model: whose outer tensors and config are used; batches: (B, T) int64 ids each; device: where blocks run;
    spill: folder for activations above the limit (None: the system's temporary folder); reference: also carry the
    stream of the model as it is before any pass, for `Stat.REFERENCE` and `Stat.CROSS`; dtype: of weights and hidden
    states, as transformers computes in it.
    """

    def __init__(
        self,
        model: Model,
        batches: Sequence[Tensor],
        *,
        device: str = "cpu",
        spill: Path | None = None,
        reference: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        self.model = model
        self.batches = batches
        self.device = torch.device(device)
        self.dtype = dtype
        self.module = model.skeleton()
        self.hidden: list[Tensor] = []
        self.reference: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.outer: Mapping[str, Layer] = {}
        self._calls: dict[tuple[int, ...], list[Call]] = {}
        self._size = 0
        self.spill = spill
        self._with_reference = reference

    def start(self, outer: Mapping[str, Layer]) -> None:
        """Load the outer tensors and bring every batch to the first block."""
        self.outer = outer
        self.put_outer()
        self._learn_return_type()
        first = self._enter(self.batches[0])
        self.hidden = allocate([(*batch.shape, first.shape[-1]) for batch in self.batches], self.spill, self.dtype)
        self.hidden[0].copy_(first)
        for place, batch in enumerate(self.batches[1:], 1):
            self.hidden[place].copy_(self._enter(batch))
            rest(self.hidden[place])
        self.release_outer()
        if self._with_reference:
            shapes = [tuple(hidden.shape) for hidden in self.hidden]
            self.reference = allocate(shapes, self.spill, self.dtype)
            self.targets = allocate(shapes, self.spill, self.dtype)
            for kept, hidden in zip(self.reference, self.hidden, strict=True):
                kept.copy_(hidden)
                rest(kept, hidden)

    def put_outer(self) -> None:
        """Put the outer tensors in place."""
        for layer in self.outer.values():
            placing.put_layer(self.module, layer, self.dtype)
        placing.put_plain(self.module, self.model.plain(OUTER), self.model.structure.aliases, self.dtype)
        self._to_device(self.module)

    def release_outer(self) -> None:
        """Give the memory of the outer layers back."""
        for layer in self.outer.values():
            for user in layer.users:
                placing.release(self.module, user)

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
        calls = [stub.call for stub in stubs]
        known = self._calls.setdefault(tuple(batch.shape), calls)
        if not same_arguments(known, calls):
            raise UnsupportedError(
                f"{type(self.module).__name__} hands its blocks something that depends on the tokens besides the "
                "hidden states (embeddings per layer, say), so it cannot be walked block by block."
            )
        return hidden

    def load(self, index: int, layers: Mapping[str, Layer], plain: Mapping[str, Tensor]) -> None:
        """Put a block's weights in place."""
        for layer in layers.values():
            placing.put_layer(self.module, layer, self.dtype)
        placing.put_plain(self.module, plain, self.model.structure.aliases, self.dtype)
        self._to_device(self.module.get_submodule(self.model.structure.blocks[index]))

    def put(self, layer: Layer) -> None:
        """Replace one layer of the loaded block."""
        placing.put_layer(self.module, layer, self.dtype)
        for user in layer.users:
            path = experts.owner(user)[0] if layer.kind is LayerKind.EXPERT else user
            self._to_device(self.module.get_submodule(path))

    def release(self, index: int) -> None:
        """Give a block's memory back, and that of the file it was read from."""
        placing.release(self.module, self.model.structure.blocks[index])
        self.model.release()

    def call(self, index: int, hidden: Tensor) -> Tensor:
        """What the loaded block puts out for hidden states of a known shape. Keeps gradients."""
        block = self.module.get_submodule(self.model.structure.blocks[index])
        args, kwargs = self._calls[tuple(hidden.shape[:2])][index]
        output = block(hidden.to(self.device), *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _outputs(self, index: int) -> Iterator[tuple[int, Tensor]]:
        for place, hidden in enumerate(self.hidden):
            with torch.no_grad():
                output = self.call(index, hidden)
            yield place, output

    def look_ahead(self, index: int) -> None:
        """Note what the loaded block, still as the stage received it, puts out in the reference stream."""
        for place, hidden in enumerate(self.reference):
            with torch.no_grad():
                self.targets[place].copy_(self.call(index, hidden))
            rest(hidden, self.targets[place])

    def runner(self, index: int) -> BlockRunner:
        """The loaded block for a block pass."""
        return BlockRunner(self, index)

    def advance(self, index: int, outputs: Iterable[Tensor] | None = None) -> None:
        """Run the loaded block on every batch (or take its `outputs`); they become the next block's inputs."""
        for place, output in self._outputs(index) if outputs is None else enumerate(outputs):
            if not products.all_finite(output):
                name = self.model.structure.blocks[index]
                raise InputError(f"{name} puts out NaN or infinite values. The run stops here; check model and recipe.")
            self.hidden[place].copy_(output)
            rest(self.hidden[place])
        self.reference, self.targets = self.targets, self.reference

    def collect(
        self,
        index: int,
        names: Iterable[str],
        wants: Collection[Stat],
        guides: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> dict[str, LayerStats]:
        """Statistics of the inputs of some layers of the loaded block. Args: guides: see `Collector`."""
        return collected(self, index, names, wants, guides)

    def collect_head(self, names: Iterable[str], wants: Collection[Stat]) -> dict[str, LayerStats]:
        """The same for layers after the last block; there is no reference stream there."""
        collector = Collector(self.module, [self.model.structure.layers[name] for name in names], wants)
        with collector.attached():
            for _ in self.logits():
                collector.next_batch()
        return collector.finish()

    @torch.no_grad()
    def logits(self) -> Iterator[Tensor]:
        """The model's output for each batch, from the hidden states after the last block: (B, T, V) float32, or
        (B, T, features) for an encoder."""
        for _, output in self.tail():
            yield output.float().cpu()

    def tail(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Per batch the hidden states after the last block, which take gradients where those are on, and the output."""
        self.put_outer()
        for place in range(len(self.batches)):
            hidden = self.hidden[place].to(self.device)
            if torch.is_grad_enabled():
                hidden = hidden.clone().requires_grad_(True)
            yield hidden, self.output(place, hidden)
        self.release_outer()

    def output(self, place: int, hidden: Tensor) -> Tensor:
        """What the model puts out for a batch, by its hidden states after the last block; with the outer tensors in
        place."""
        stub = Stub(self._blocks()[0], self._size, hidden)
        with shortened(self._blocks(), [stub]):
            output = self.module(input_ids=self.batches[place].to(self.device), **_no_cache(self.module))
        result: Tensor = output.logits if "logits" in output else output.last_hidden_state
        return result


def collected(
    stream: Stream,
    index: int,
    names: Iterable[str],
    wants: Collection[Stat],
    guides: Mapping[str, Sequence[Tensor]] | None = None,
) -> dict[str, LayerStats]:
    """Statistics of the inputs of some layers of a stream's loaded block. Args: guides: see `Collector`."""
    collector = Collector(stream.module, [stream.model.structure.layers[name] for name in names], wants, guides)
    with collector.attached(), torch.no_grad():
        for place, hidden in enumerate(stream.hidden):
            if Stat.CROSS in wants:
                with collector.recording():
                    stream.call(index, stream.reference[place])
            stream.call(index, hidden)
            collector.next_batch()
            rest(hidden)
    return collector.finish()


class BlockRunner:
    """A loaded block and its batches, as block passes see them (`compress.engine.blockpass.Runner`).

    Of a classifier the block is the module, its hidden states are images, and what it puts out is logits.
    """

    def __init__(self, stream: Stream, index: int) -> None:
        self._stream, self._index = stream, index
        self.root = stream.module
        self.module = stream.module.get_submodule(stream.model.structure.blocks[index])

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return len(self._stream.hidden)

    def inputs(self, place: int) -> Tensor:
        """Hidden states of a batch as the compressed prefix puts them out."""
        return self._stream.hidden[place]

    def reference(self, place: int) -> Tensor:
        """The same as the uncompressed prefix puts them out."""
        return self._stream.reference[place]

    def targets(self, place: int) -> Tensor:
        """What the block as the stage received it puts out in the reference stream."""
        return self._stream.targets[place]

    def forward(self, place: int, hidden: Tensor | None = None) -> Tensor:
        """The block's output for a batch, by its own inputs or by others of the same shape."""
        return self._stream.call(self._index, self.inputs(place) if hidden is None else hidden)


def _no_cache(module: nn.Module) -> dict[str, Any]:
    return {"use_cache": False} if hasattr(module.config, "use_cache") else {}
