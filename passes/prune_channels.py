"""prune_channels: whole channels of an image classifier taken out, so that its layers become narrower."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.engine.layer_stats import Stat
from compress.engine.modelpass import Stage
from compress.engine.reshape import ReshapePass
from compress.errors import UnsupportedError
from compress.layer import Layer
from compress.maths.coupled_channels import Reading, removal_order, solve
from compress.models.edits import Edit, Shape
from compress.models.model import Model
from compress.records import LayerResult
from compress.wiring import channel_data
from compress.wiring import channel_narrowing as narrowing
from compress.wiring.channel_narrowing import Gone
from compress.wiring.channel_plan import Wish, filled, planned
from compress.wiring.channels import Group

Share = Annotated[float, Field(gt=0, lt=1)]
WEIGHTS_ALONE = ("l1", "l2")


class PruneChannels(ReshapePass):
    """Take output channels out of the layers of an image classifier (given as `file.py:callable`), and out of all that
    reads them, so that it is smaller and faster anywhere. Which layers share channels is seen on a run (dependency
    groups: Fang et al. 2023, arXiv 2301.12900); the removal is held against the model in which nothing reads these
    channels, and what does not agree is left alone and reported.

    Settings: `share` of the channels of each layer that goes, `shares` {pattern: share} for some; `multiple` what the
    widths that are left are rounded to, up from nothing; `by` what decides which: `l1`, `l2` norm of the weights that
    make a channel, `activation` (root mean square of what is read of it), `output` (the least error of what its readers
    put out, the other channels making up for it); `refit` what makes up for the loss, layer by layer, on calibration
    images: `weights` (least squares) of those that lost inputs, `all` of those that come after the first such layer
    too, `bias`, `none`; `keep` patterns of layers to leave as wide as they are, `only` those of all that may become
    narrower; `residual` whether channels go that several layers add to; `damp` of the least squares, as a share of the
    mean square of an input.
    """

    name: ClassVar[str] = "prune_channels"

    share: Share = 0.5
    shares: dict[str, Share] = Field({})
    multiple: int = Field(default=8, ge=1)
    by: Literal["l1", "l2", "activation", "output"] = "output"
    refit: Literal["all", "weights", "bias", "none"] = "all"
    keep: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    residual: bool = False
    damp: float = Field(default=0.01, gt=0)

    @property
    def wants(self) -> frozenset[Stat]:
        needs_data = self.by not in WEIGHTS_ALONE or self.refit != "none"
        return frozenset({Stat.HESSIAN}) if needs_data else frozenset()

    @property
    def held_models(self) -> float:
        return 2.0  # as it was, and narrowed

    @property
    def wish(self) -> Wish:
        """What is asked for, beside which channels."""
        return Wish(str(self), self.name, self.share, self.shares, self.multiple, self.keep, self.only, self.residual)

    def check(self, model: Model) -> None:
        if model.image is None:
            raise UnsupportedError(
                f"{self.name} takes channels out of image classifiers; {model.name} is a language model. For "
                "those take prune_width, which keeps heads and their groups whole."
            )

    def shape(self, model: Model) -> Shape:
        self.check(model)
        plan = planned(self.wish, model, filled(model))
        return Shape({}, _edits(model, plan.module, plan.first()), model.origin)

    def apply(self, stage: Stage) -> None:
        with torch.no_grad():
            _Pruning(self, stage).run()


def _edits(model: Model, module: nn.Module, gone: Gone) -> tuple[Edit, ...]:
    """All edits of the module tree, those of earlier passes included."""
    found = {edit.path: edit for edit in (*model.edits, *narrowing.edits_of(module, gone))}
    return tuple(found.values())


class _Pruning:
    """One run of the pass."""

    def __init__(self, item: PruneChannels, stage: Stage) -> None:
        self.item, self.stage, self.device = item, stage, stage.device
        self.module = stage.whole()
        self.plan = planned(item.wish, stage.model, self.module)
        self.batches = [] if stage.calibration is None else stage.calibration.batches()
        self.notes: dict[str, list[str]] = {}

    def run(self) -> None:
        """Decide, narrow, make up for it, write."""
        started = time.perf_counter()
        chosen = self._chosen()
        gone = narrowing.gone_of(chosen)
        made = narrowing.narrowed(self.module, gone)
        if self.item.refit != "none":
            self._refit(made, gone)
        self._write(made, gone)
        seconds = time.perf_counter() - started
        self._report(gone, seconds)

    def _chosen(self) -> list[tuple[Group, list[int]]]:
        readers = list(dict.fromkeys(path for group, _ in self.plan.groups for path in group.columns))
        moments: dict[str, Tensor] = {}
        if self.item.by not in WEIGHTS_ALONE:
            self.module.to(self.device)
            tick = partial(self.stage.progress.tick, "Calibration images")
            moments = channel_data.moments(self.module, readers, self.batches, self.device, tick)
            self.module.cpu()
        return [(group, self._units(group, count, moments)) for group, count in self.plan.groups]

    def _units(self, group: Group, count: int, moments: Mapping[str, Tensor]) -> list[int]:
        """The units of a group that go."""
        if self.item.by == "output" and group.columns:
            return removal_order([self._reading(path, group, moments) for path in group.columns], count, self.item.damp)
        if self.item.by == "activation" and group.columns:
            scores = sum(_relative(self._power(path, group, moments)) for path in group.columns)
        else:
            power = 1 if self.item.by == "l1" else 2
            scores = sum(_relative(self._norm(path, places, power)) for path, places in group.rows.items())
        assert isinstance(scores, Tensor)
        return [int(unit) for unit in torch.argsort(scores, stable=True)[:count]]

    def _columns(self, path: str, group: Group) -> Tensor:
        child = self.module.get_submodule(path)
        return torch.tensor([channel_data.columns_of(child, unit) for unit in group.columns[path]])

    def _reading(self, path: str, group: Group, moments: Mapping[str, Tensor]) -> Reading:
        child = self.module.get_submodule(path)
        return Reading(channel_data.matrix(child), moments[path], self._columns(path, group))

    def _power(self, path: str, group: Group, moments: Mapping[str, Tensor]) -> Tensor:
        return moments[path].diagonal()[self._columns(path, group)].mean(1).sqrt()

    def _norm(self, path: str, places: Sequence[Sequence[int]], power: int) -> Tensor:
        rows = _weight(self.module, path).flatten(1).double()
        return torch.stack([torch.linalg.vector_norm(rows[list(unit)], power) for unit in places])

    def _refit(self, made: nn.Module, gone: Gone) -> None:
        """Each layer that lost inputs, or may, in the order in which they run, on what those before now give it."""
        order = [path for path in self.plan.order if getattr(made.get_submodule(path), "groups", 1) == 1]
        first = min((order.index(path) for path in gone.columns), default=len(order))
        paths = [path for path in order[first:] if path in gone.columns or self.item.refit == "all"]
        self.module.to(self.device)
        made.to(self.device)
        for number, path in enumerate(paths):
            self.stage.progress.tick("Making up for channels", number, len(paths))
            child = made.get_submodule(path)
            if self.item.refit == "bias" and getattr(child, "bias", None) is None:
                self.notes.setdefault(path, []).append("not refitted: it has no bias")
                continue
            rows = narrowing.left_of(_weight(self.module, path).shape[0], gone.rows, path)
            moment, cross = channel_data.against(made, self.module, path, rows, self.batches, self.device)
            weight = channel_data.matrix(child)
            if self.item.refit == "bias":
                weight[:, -1] += cross[:, -1] - weight @ moment[:, -1]
            else:
                weight = solve(weight, moment, cross, self.item.damp)
            channel_data.put_matrix(child, weight)
        self.module.cpu()
        made.cpu()

    def _write(self, module: nn.Module, gone: Gone) -> None:
        model = self.stage.model
        made = self.stage.reshape(Shape({}, _edits(model, self.module, gone), model.origin))
        for segment in made.structure.segments:
            layers, plain = self.stage.taken(segment)
            done = {name: _taken(layer, module, gone) for name, layer in layers.items()}
            kept = {name: narrowing.cut(own, gone, name.rpartition(".")[0]) if own.ndim else own
                    for name, own in plain.items()}  # fmt: skip
            self.stage.put(segment, done, kept)

    def _report(self, gone: Gone, seconds: float) -> None:
        layers = self.stage.model.structure.layers
        changed = [path for path in gone.paths if path in layers]
        for path in changed:
            self._tell(path, changed=True, notes=self._notes(path, gone), seconds=seconds / len(changed))
        for path, reason in self.plan.left.items():
            if path not in changed:
                self._tell(path, changed=False, reason=reason)

    def _tell(self, path: str, **facts: Any) -> None:
        users = self.stage.model.structure.layers[path].users
        self.stage.results.append(LayerResult(layer=path, users=users, pass_text=str(self.item), **facts))

    def _notes(self, path: str, gone: Gone) -> tuple[str, ...]:
        """What became of a layer."""
        weight = _weight(self.module, path)
        sides = (("output", gone.rows, weight.shape[0]), ("input", gone.columns, weight.shape[1]))
        said = [f"{side} channels {size} → {size - len(away[path])}" for side, away, size in sides if path in away]
        others = [name for group, _ in self.plan.groups if path in group.rows for name in group.rows if name != path]
        together = [f"the same channels as {others[0]}" + (" and others" if len(others) > 1 else "")] if others else []
        return (", ".join(said) + f", by {self.item.by}", *together, *self.notes.get(path, ()))


def _relative(values: Tensor) -> Tensor:
    """As shares of their mean, so that those of several layers add up."""
    return values / values.mean().clamp(min=1e-30)


def _taken(layer: Layer, module: nn.Module, gone: Gone) -> Layer:
    """A layer with what the narrowed module has in its place, in the type it was stored in."""
    if layer.name not in gone.paths:
        return layer
    child, weight = module.get_submodule(layer.name), _weight(module, layer.name)
    assert isinstance(layer.weight, Tensor)
    given = child._parameters["bias"]
    bias = None if given is None or layer.bias is None else given.detach().to(layer.bias.dtype)
    groups = child.groups if isinstance(child, nn.Conv2d) else 1
    return replace(layer, weight=weight.flatten(1).to(layer.weight.dtype), bias=bias, groups=groups)


def _weight(module: nn.Module, path: str) -> Tensor:
    weight = module.get_submodule(path)._parameters["weight"]
    assert weight is not None
    return weight.detach()
