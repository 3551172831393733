"""What layers read while a classifier runs on calibration images: its moments, alone and against another's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.engine.collect import unfold

Tick = Callable[[int, int], None]


def columns_of(module: nn.Module, channels: Iterable[int]) -> list[int]:
    """The columns of a weight seen as (out, in) that read some input channels."""
    each = 1
    if isinstance(module, nn.Conv2d):
        each = module.kernel_size[0] * module.kernel_size[1]
    return [channel * each + place for channel in channels for place in range(each)]


def matrix(module: nn.Module) -> Tensor:
    """(out, in) float64 of a convolution's or linear layer's weight, with its bias, if any, as the last column."""
    assert isinstance(module, nn.Conv2d | nn.Linear)
    weight = module.weight.detach().flatten(1).double().cpu()
    return weight if module.bias is None else torch.cat([weight, module.bias.detach().double().cpu()[:, None]], 1)


def put_matrix(module: nn.Module, values: Tensor) -> None:
    """Write what `matrix` gave."""
    assert isinstance(module, nn.Conv2d | nn.Linear)
    if module.bias is not None:
        values, bias = values[:, :-1], values[:, -1]
        module.bias.data.copy_(bias)
    module.weight.data.copy_(values.reshape(module.weight.shape))


def rows_of(module: nn.Module, values: Tensor) -> Tensor:
    """(n, in) float32: what the weight multiplies, and 1 for the bias."""
    rows = unfold(module, values)
    rows = rows.reshape(-1, rows.shape[-1]).float()
    return rows if getattr(module, "bias", None) is None else torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def moments(
    module: nn.Module, paths: Iterable[str], batches: Sequence[Tensor], device: str, tick: Tick
) -> dict[str, Tensor]:
    """(in, in) float64 by layer: mean of x xᵀ over all rows that it reads, with its bias's 1 as the last of x."""
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(path: str, child: nn.Module, inputs: tuple[Any, ...], _output: Tensor) -> None:
        rows = rows_of(child, inputs[0])
        found = (rows.T @ rows).double().cpu()
        totals[path] = totals[path] + found if path in totals else found
        counts[path] = counts.get(path, 0) + len(rows)

    with _hooked(module, {path: partial(add, path) for path in paths}):
        for index, images in enumerate(batches):
            tick(index, len(batches))
            _run(module, images, device)
    return {path: total / counts[path] for path, total in totals.items()}


def against(
    narrow: nn.Module, whole: nn.Module, path: str, rows: Tensor, batches: Sequence[Tensor], device: str
) -> tuple[Tensor, Tensor]:
    """What a layer of a narrowed model reads, against what it put out before.

    Args: rows: (out,) int64, those of the whole model's outputs that are left.
    Returns: mean of x xᵀ (in, in) and of z xᵀ (out, in), float64: x the rows of the narrow model, z the whole one's
    outputs at the same places.
    """
    seen: dict[str, Tensor] = {}
    keep_output = partial(_keep_output, seen, rows.to(device))
    with _hooked(whole, {path: keep_output}), _hooked(narrow, {path: partial(_keep_rows, seen)}):
        sums: list[Tensor] = []
        count = 0
        for images in batches:
            _run(whole, images, device)
            _run(narrow, images, device)
            read, outputs = seen["read"], seen["outputs"]
            found = [(read.T @ read).double().cpu(), (outputs.T @ read).double().cpu()]
            sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
            count += len(read)
    return sums[0] / count, sums[1] / count


class _Enough(Exception):  # noqa: N818 (no error: it ends a run)
    """What comes after is not needed."""


def _keep_rows(seen: dict[str, Tensor], child: nn.Module, inputs: tuple[Any, ...], _output: Tensor) -> None:
    seen["read"] = rows_of(child, inputs[0])
    raise _Enough


def _keep_output(
    seen: dict[str, Tensor], rows: Tensor, child: nn.Module, _inputs: tuple[Any, ...], output: Tensor
) -> None:
    moved = output.movedim(1, -1) if isinstance(child, nn.Conv2d) else output
    seen["outputs"] = moved.reshape(-1, moved.shape[-1])[:, rows].float()
    raise _Enough


def _run(module: nn.Module, images: Tensor, device: str) -> None:
    with torch.no_grad(), suppress(_Enough):
        module(images.to(device))


@contextmanager
def _hooked(module: nn.Module, hooks: Mapping[str, Callable[..., None]]) -> Iterator[None]:
    with ExitStack() as stack:
        for path, hook in hooks.items():
            stack.callback(module.get_submodule(path).register_forward_hook(hook).remove)
        yield
