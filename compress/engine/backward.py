"""One backward pass through a model, block by block with recomputation: how much the loss feels each layer's output.

Memory is one block with its graph for one window, and that window's logits. The hidden states at the door of every
block (blocks × activations) and what is found go to mapped files above a limit (compress/maths/activations.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.engine.stream import BlockStream
from compress.errors import InputError, UnsupportedError
from compress.layer import LayerKind
from compress.maths import products
from compress.maths.activations import allocate, rest
from compress.models.model import Model, Task
from compress.models.skeleton import OUTER
from compress.progress import Progress

Saliency = dict[str, list[Tensor]]
"""Layer → per batch (tokens, groups) float32: mean squared gradient of the loss over each group of output rows."""


def check(model: Model) -> None:
    """Raises: UnsupportedError for a model that has no language-model loss to go back from."""
    if model.task is not Task.CAUSAL_LM:
        raise UnsupportedError(
            f"{model.name} is an {'encoder' if model.task is Task.ENCODER else 'image classifier'}: it has no loss on "
            "the next token, whose gradient guides Hessians. Leave guided out, or set guided=0."
        )


def saliency(
    model: Model,
    batches: Sequence[Tensor],
    names: Sequence[str],
    groups: int,
    *,
    device: str = "cpu",
    spill: Path | None = None,
    progress: Progress | None = None,
) -> Saliency:
    """Squared gradients of the language-model loss by the outputs z of layers, averaged over groups of output rows
    (GuidedQuant, Kim et al. 2025, arXiv 2505.07004, eq. 7), for the model as it is, in float32.

    Args: batches (B, T) int64; names: of layers; groups: of consecutive rows, each of which gets a column (a layer
    with fewer rows has one for each). Columns are divided by their mean, which changes no minimum.
    Returns: linear layers inside the blocks alone, of those that see every token once, and where the loss feels every
    group: others, experts among them, are missing.
    Raises: UnsupportedError as `check`; InputError where a gradient is not finite.
    """
    check(model)
    specs = {name: model.structure.layers[name] for name in names}
    columns = {
        name: min(groups, spec.shape[0])
        for name, spec in specs.items()
        if spec.kind is LayerKind.LINEAR and spec.segment != OUTER
    }
    windows = [window for batch in batches for window in torch.split(batch, 1)]
    stream = BlockStream(model, windows, device=device, spill=spill)
    stream.start(model.layers(OUTER))
    progress = progress or Progress(quiet=True)
    progress.begin("Running all blocks, to go back through them")
    doors = _forward(stream)
    gradients = _tail(stream)
    found = _Found(windows, columns, spill)
    count = len(model.structure.blocks)
    for index in reversed(range(count)):
        progress.tick("Going back through blocks", count - 1 - index, count)
        here = [name for name in columns if specs[name].segment == index]
        stream.load(index, model.layers(index), model.plain(index))
        for place, gradient in enumerate(gradients):
            gradient.copy_(_back(stream, index, here, doors[index][place], gradient, found.adding(place)))
            rest(gradient, doors[index][place])
        stream.release(index)
        progress.tick("Going back through blocks", count - index, count)
    sizes = [batch.numel() for batch in batches]
    whole = {name: found.normalised(name) for name in columns}
    return {name: list(torch.split(values, sizes)) for name, values in whole.items() if values is not None}


def _forward(stream: BlockStream) -> list[list[Tensor]]:
    """Hidden states of every window at the door of every block; the stream ends behind the last."""
    model, count = stream.model, len(stream.hidden)
    blocks = range(len(model.structure.blocks))
    room = allocate([tuple(hidden.shape) for _ in blocks for hidden in stream.hidden], stream.spill)
    doors = [room[index * count :][:count] for index in blocks]
    for index in blocks:
        for copy, hidden in zip(doors[index], stream.hidden, strict=True):
            copy.copy_(hidden)
            rest(copy, hidden)
        stream.load(index, model.layers(index), model.plain(index))
        stream.advance(index)
        stream.release(index)
    return doors


def _tail(stream: BlockStream) -> list[Tensor]:
    """Gradient of the summed loss of each window by the hidden states behind the last block, in the latter's place."""
    with torch.enable_grad():
        for place, (hidden, logits) in enumerate(stream.tail()):
            wanted = stream.batches[place][:, 1:].reshape(-1).to(logits.device)
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, hidden)
            stream.hidden[place].copy_(gradient)
            rest(stream.hidden[place])
    return stream.hidden


Add = Callable[[str, Tensor], None]


def _back(stream: BlockStream, index: int, names: Sequence[str], door: Tensor, gradient: Tensor, add: Add) -> Tensor:
    """Gradient by the hidden states at the door of the loaded block, from that by its output; the gradients by the
    layers' outputs are handed to `add` on the way."""
    outputs: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: outputs.append((name, output))

    hidden = door.to(stream.device).clone().requires_grad_(True)
    with ExitStack() as hooks, torch.enable_grad():
        for name in names:
            hooks.callback(stream.module.get_submodule(name).register_forward_hook(keep(name)).remove)
        output = stream.call(index, hidden)
    wanted = [hidden, *(output for _, output in outputs)]
    first, *parts = torch.autograd.grad(output, wanted, gradient.to(output.device), allow_unused=True)
    for (name, _), part in zip(outputs, parts, strict=True):
        if part is not None:
            add(name, part.detach())
    return first


class _Found:
    """Mean squared gradients of all tokens by layer, as windows bring them."""

    def __init__(self, windows: Sequence[Tensor], columns: Mapping[str, int], spill: Path | None) -> None:
        ends = list(accumulate(window.numel() for window in windows))
        self._rows = [slice(end - window.numel(), end) for end, window in zip(ends, windows, strict=True)]
        room = allocate([(ends[-1], count) for count in columns.values()], spill)
        self._room = dict(zip(columns, room, strict=True))
        self._calls: dict[str, list[int]] = {name: [] for name in columns}

    def adding(self, place: int) -> Add:
        """For one window: takes a layer's gradient (…, out)."""
        rows = self._rows[place]

        def add(name: str, gradient: Tensor) -> None:
            squares = gradient.float().square().reshape(-1, gradient.shape[-1])
            if len(squares) != rows.stop - rows.start:
                return
            room = self._room[name]
            parts = squares.tensor_split(room.shape[1], dim=1)
            room[rows] = torch.stack([part.mean(1) for part in parts], dim=1).cpu()
            rest(room)
            self._calls[name].append(place)

        return add

    def normalised(self, name: str) -> Tensor | None:
        """(tokens, groups) with a mean of 1 in each column; None for a layer that did not see each token once, or a
        group of whose rows the loss feels nothing. Raises: InputError where it is not finite."""
        if sorted(self._calls[name]) != list(range(len(self._rows))):
            return None
        values = self._room[name]
        mean = values.mean(0, dtype=torch.float64)
        if not products.all_finite(mean):
            raise InputError(f"The loss has no finite gradient at {name}. Check the model and the data.")
        if not bool((mean > 0).all()):
            return None
        values.div_(mean.float())
        rest(values)
        return values
