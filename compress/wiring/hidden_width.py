"""The hidden size made smaller: which channels of the residual stream stay, and every tensor that has them cut.

Who reads and who writes the stream is found by running each block (compress/wiring/residual.py). A norm of n channels
divides by their mean square, which is another once only m of them are left: its gain is multiplied by √(n r / m), r
being the share of the mean square that they hold on the calibration tokens, so its outputs are as large as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from compress.engine.layer_stats import LayerStats, Stat
from compress.engine.stream import BlockStream
from compress.errors import UnsupportedError, UsageError
from compress.layer import Layer
from compress.maths.channels import most_important
from compress.maths.rotation import rotation
from compress.models.model import Model, Task
from compress.models.skeleton import OUTER
from compress.wiring.residual import REFUSED, Residual, block_part, few_tokens, find_residual
from compress.wiring.twins import Part
from compress.wiring.widths import Axes, Family, cut_layer, head_size, shapes_of, some_axes

KEY = "hidden_size"


def hidden_family(model: Model, kept: int) -> Family:
    """The channels of the stream, of which `kept` stay. Raises: UnsupportedError, UsageError."""
    size = int(model.config.get_text_config().hidden_size)
    if model.task is Task.ENCODER:
        raise UnsupportedError("this model's output is the hidden states themselves, so their size stays (no hidden).")
    if not 1 <= kept <= size:
        raise UsageError(f"{KEY}={size} can become 1 to {size}, not {kept}.")
    changes: dict[str, Any] = {KEY: kept, "head_dim": head_size(model)}
    if kept == size:
        return Family(KEY, size, kept, {}, {})
    sizes = (kept, *range(size // 2, size))  # whatever the size, it is the same axes; not every one can be built
    axes = some_axes(model, ({**changes, KEY: each} for each in sizes))
    if not axes:
        raise UnsupportedError(f"no module of '{model.config.model_type}' can be built with a smaller {KEY}.")
    shapes = shapes_of(model)
    for name, found in axes.items():
        if any(shapes[name][axis] != size for axis in found):
            raise UnsupportedError(f"{name} is {shapes[name]}, and changes with {KEY}={size}: it is not narrowed.")
    return Family(KEY, size, kept, changes, axes)


@dataclass(eq=False)
class HiddenWidth:
    """What is known of a model's stream.

    axes: see `Family`; kept (m,) int64 of n channels; residuals: of each block; tail: the norm after the blocks;
    powers: per norm (n,) float64, mean squares of what it makes of each channel without its gain, 1 in the mean.
    """

    axes: Axes
    units: int
    tail: str
    kept: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    residuals: dict[int, Residual] = field(default_factory=dict)
    powers: dict[str, Tensor] = field(default_factory=dict)

    def norms(self, segment: int) -> dict[str, float]:
        """Path → what is added to the weight to get the gain."""
        if segment != OUTER:
            return dict(self.residuals[segment].norms)
        offsets = {offset for one in self.residuals.values() for offset in one.norms.values()}
        return {self.tail: offsets.pop() if len(offsets) == 1 else 0.0}

    def readers(self, segment: int) -> dict[str, str]:
        """Layers that read the stream → their norm; what reads it without one is only cut."""
        return {name: path for name, path in self.residuals[segment].readers.items() if path}

    def masked(self, segment: int, part: Part) -> Part:
        """The part as wide as before, writing zeros to the channels that go."""
        gone = torch.ones(self.units, dtype=torch.bool)
        gone[self.kept] = False
        layers, plain = dict(part.layers), dict(part.plain)
        names = self.residuals[segment].writers if segment != OUTER else ()
        for name in names:
            if name in plain:
                plain[name] = plain[name].masked_fill(gone, 0)
                continue
            layer = layers[name]
            assert isinstance(layer.weight, Tensor)
            bias = None if layer.bias is None else layer.bias.masked_fill(gone, 0)
            layers[name] = replace(layer, weight=layer.weight.masked_fill(gone[:, None], 0), bias=bias)
        if segment == OUTER:
            for name, layer in layers.items():
                assert isinstance(layer.weight, Tensor)
                if self.axes.get(name) == (1,):
                    layers[name] = layer.with_weight(layer.weight.masked_fill(gone, 0))
        return Part(layers, plain)

    def narrow(self, segment: int, part: Part, *, exact: bool) -> Part:
        """What is left of a part. exact: norms as they must be where the channels that go are zero, to compare; else
        as large as what they put out before."""
        layers, plain = dict(part.layers), dict(part.plain)
        for name, axes in self.axes.items():
            if name in layers:
                layers[name] = cut_layer(layers[name], *(self.kept if axis in axes else None for axis in (0, 1)))
            elif name in plain:
                for axis in axes:
                    plain[name] = plain[name].index_select(axis, self.kept)
        for path, offset in self.norms(segment).items():
            share = 1.0 if exact else float(self.powers[path][self.kept].sum()) / self.units
            gain = (plain[f"{path}.weight"].double() + offset) * (self.units * share / len(self.kept)) ** 0.5
            plain[f"{path}.weight"] = (gain - offset).to(plain[f"{path}.weight"].dtype)
        return Part(layers, plain)


def survey(
    model: Model, batches: list[Tensor], family: Family, by: str, *, device: str, dtype: Any, spill: Any
) -> HiddenWidth:
    """Walk through the model once, unchanged: who reads and writes the stream, and which channels matter most.

    by: `activation` by the mean |input| that the layers which read it see (Muralidharan et al. 2024, arXiv 2407.14679
    §2.2), added up over all norms; else by the mean square of what each channel alone adds to their outputs, as a share
    of these. Raises: UnsupportedError where a block is no sum on the stream, or its norms no RMSNorms.
    """
    found = HiddenWidth(family.axes, family.units, _tail_norm(model, family))
    stream = BlockStream(model, batches, device=device, spill=spill, dtype=dtype)
    tokens = BlockStream(model, [few_tokens(model)], device=device)
    outer = model.layers(OUTER)
    stream.start(outer)
    tokens.start(outer)
    turn = rotation(family.units, "random", torch.Generator().manual_seed(0))
    scores = torch.zeros(family.units, dtype=torch.float64)
    for index in range(len(model.structure.blocks)):
        layers, plain = model.layers(index), model.plain(index)
        tokens.load(index, layers, plain)
        try:
            found.residuals[index] = find_residual(block_part(tokens, index, layers, plain), turn)
        except UnsupportedError as error:
            raise UnsupportedError(str(error).replace(REFUSED, "Its hidden size cannot be narrowed.")) from error
        tokens.advance(index)
        tokens.release(index)
        stream.load(index, layers, plain)
        readers = {name: path for name, path in found.readers(index).items() if name in layers}
        stats = stream.collect(index, readers, {Stat.HESSIAN, Stat.ABS_MEAN})
        for path, offset in found.norms(index).items():
            own = {name: stats[name] for name, norm in readers.items() if norm == path and name in stats}
            if not own:  # what it feeds has been removed, or no calibration token got there
                found.powers[path] = torch.ones(family.units, dtype=torch.float64)
                continue
            gain = plain[f"{path}.weight"].double() + offset
            found.powers[path] = _power(next(iter(own.values())), gain)
            scores += _scores(own, layers, by)
        stream.advance(index)
        stream.release(index)
    found.powers[found.tail] = _power_of(stream.hidden)
    gain = model.plain(OUTER)[f"{found.tail}.weight"].double() + found.norms(OUTER)[found.tail]
    head = next(layer for layer in outer.values() if model.structure.head in layer.users)
    moments = found.powers[found.tail] * gain.square()
    scores += moments.sqrt() if by == "activation" else _share(moments, head.float_weight())
    found.kept = most_important(scores, family.kept)
    return found


def _tail_norm(model: Model, family: Family) -> str:
    """The one vector of the stream's width outside the blocks: the last norm's gain."""
    plain = [name for name in model.structure.plain[OUTER] if name in family.axes]
    if len(plain) != 1 or not plain[0].endswith(".weight") or family.axes[plain[0]] != (0,):
        listed = ", ".join(plain) or "nothing"
        raise UnsupportedError(f"one norm is wanted outside the blocks, and of the stream's width there is {listed}.")
    return plain[0].removesuffix(".weight")


def _power(stats: LayerStats, gain: Tensor) -> Tensor:
    """Mean squares without the gain, 1 in the mean."""
    assert stats.hessian is not None
    power = stats.hessian.diagonal().double() / gain.square().clamp(min=1e-12)
    power = power.where(gain.abs() > 1e-6, 0.0)
    return power / power.mean()


def _power_of(hidden: list[Tensor]) -> Tensor:
    total = sum((_normed(each).square().sum(0) for each in hidden), torch.zeros(1, dtype=torch.float64))
    return total / total.mean()


def _normed(hidden: Tensor) -> Tensor:
    rows = hidden.reshape(-1, hidden.shape[-1]).double()
    normed: Tensor = rows / rows.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
    return normed


def _scores(stats: Mapping[str, LayerStats], layers: Mapping[str, Layer], by: str) -> Tensor:
    first = next(iter(stats.values()))
    assert first.abs_mean is not None and first.hessian is not None
    if by == "activation":
        return first.abs_mean.double()
    return sum(
        (_share(one.hessian.diagonal().double(), layers[name].float_weight())
         for name, one in stats.items() if one.hessian is not None),
        torch.zeros(1, dtype=torch.float64),
    )  # fmt: skip


def _share(moments: Tensor, weight: Tensor) -> Tensor:
    """moments (in,), mean squares of the inputs; weight (out, in) → the mean square of what each adds, as a share."""
    added = moments * weight.double().square().sum(0)
    return added / added.sum().clamp(min=1e-30)
