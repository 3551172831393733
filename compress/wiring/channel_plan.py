"""How many channels of a classifier are to go, group by group; what is left alone, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.engine.matching import matches
from compress.errors import UsageError, nearest
from compress.models.model import Model
from compress.models.placing import whole_module
from compress.wiring import channel_narrowing as narrowing
from compress.wiring.channel_narrowing import Gone
from compress.wiring.channels import Group, watch


@dataclass(frozen=True)
class Wish:
    """What a pass was asked for: see `prune_channels`. text: the pass as given; name: its name."""

    text: str
    name: str
    share: float
    shares: Mapping[str, float]
    multiple: int
    keep: tuple[str, ...]
    only: tuple[str, ...]
    residual: bool


@dataclass(frozen=True)
class Plan:
    """Groups to make narrower, each with how many units go; layers that are left alone, with why; those that read
    channels in the order in which they run."""

    module: nn.Module
    groups: tuple[tuple[Group, int], ...]
    left: dict[str, str]
    order: tuple[str, ...]

    def first(self) -> Gone:
        """As many units as will go, the first ones."""
        return narrowing.gone_of((group, range(count)) for group, count in self.groups)


def filled(model: Model) -> nn.Module:
    """A module to plan with: its own weights, or noise where there are none yet."""
    if model.weights is not None:
        return whole_module(model)
    module, maker = model.skeleton(), torch.Generator().manual_seed(0)
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                size = max(1, parameter.shape[1:].numel())
                noise = torch.randn(parameter.shape, generator=maker) / size**0.5
                child._parameters[name] = nn.Parameter(noise, requires_grad=False)
        for name, buffer in child._buffers.items():
            if name == "running_var" and buffer is not None:
                child._buffers[name] = torch.ones_like(buffer)
    return module


def planned(wish: Wish, model: Model, module: nn.Module) -> Plan:
    """What is to go, checked on a run. Raises: UsageError, UnsupportedError where nothing can."""
    assert model.image is not None
    images = model.image.noise(2, model.image.shape)
    wiring = watch(module, model.structure, images)
    groups, obstacles = wiring.groups(), wiring.obstacles()
    _check_patterns(wish, model, groups, obstacles)
    left: dict[str, str] = {}
    chosen: list[tuple[Group, int]] = []
    for group in groups:
        reason = _reason(wish, model, group)
        count = 0 if reason else _count(wish, model, group)
        if count:
            chosen.append((group, count))
            continue
        width = model.structure.layers[group.name].shape[0]
        reason = reason or f"{width} channels are as many as share and multiple={wish.multiple} leave"
        left |= dict.fromkeys(group.rows, reason)
    chosen, failed = _agreeing(module, chosen, images)
    left |= {name: "the module's code counts on its number of channels" for group in failed for name in group.rows}
    left |= {name: reason for name, reason in obstacles.items() if name not in left}
    if not chosen:
        first = next(iter(left.items()), ("", "the model has no layers that read others' channels"))
        raise UsageError(f"{wish.text}: no layer can become narrower. {first[0]}: {first[1]}.")
    narrower = {name for group, _ in chosen for name in group.rows}
    return Plan(
        module,
        tuple(chosen),
        {name: reason for name, reason in left.items() if name not in narrower},
        tuple(wiring.read),
    )


def _agreeing(
    module: nn.Module, chosen: Sequence[tuple[Group, int]], images: Tensor
) -> tuple[list[tuple[Group, int]], list[Group]]:
    """Those that leave a model which computes the same without the channels: all at once, else each by itself."""

    def holds(some: Sequence[tuple[Group, int]]) -> bool:
        return narrowing.agree(module, narrowing.gone_of((group, range(count)) for group, count in some), images)

    if holds(chosen):
        return list(chosen), []
    kept: list[tuple[Group, int]] = []
    for each in chosen:
        if holds([*kept, each]):
            kept.append(each)
    return kept, [group for group, count in chosen if (group, count) not in kept]


def _named(patterns: Sequence[str], model: Model, names: Sequence[str]) -> list[str]:
    layers = model.structure.layers
    return [
        name
        for name in names
        if name in layers
        and any(matches(pattern, name, model.structure.user_kind(layers[name], name)) for pattern in patterns)
    ]


def _check_patterns(wish: Wish, model: Model, groups: Sequence[Group], obstacles: Mapping[str, str]) -> None:
    """Raises: UsageError for a pattern that names no layer, or none that can become narrower as it asks."""
    names = list(model.structure.layers)
    for where, patterns in (("keep", wish.keep), ("only", wish.only), ("shares", tuple(wish.shares))):
        for pattern in patterns:
            found = _named([pattern], model, names)
            if not found:
                raise UsageError(
                    f"{wish.name}: the pattern '{pattern}' in {where} matches no layer of the model."
                    f"{nearest(pattern.replace('*', ''), names)}"
                )
            if where != "keep":
                _check_free(wish, f"'{pattern}' in {where}", found, groups, obstacles)
    for group in groups if wish.only and wish.residual else ():
        asked = _named(wish.only, model, list(group.rows))
        if asked and len(asked) < len(group.rows):
            other = next(name for name in group.rows if name not in asked)
            raise UsageError(
                f"{wish.name}: only names {asked[0]}, but not {other}, whose outputs are joined to the same channels. "
                "Name all of them, or none."
            )


def _check_free(
    wish: Wish, said: str, found: Sequence[str], groups: Sequence[Group], obstacles: Mapping[str, str]
) -> None:
    """Raises: UsageError where none of the layers found may become narrower."""
    for name in found:
        if any(name in group.rows and (wish.residual or not group.summed) for group in groups):
            return
    for group in groups:
        asked = next((name for name in found if name in group.rows), "")
        if asked:
            raise UsageError(
                f"{wish.name}: {said}: what {asked} puts out is added to a residual stream of {len(group.rows)} "
                "layers, which would be cut. Set residual=true to take channels out of the whole stream, or leave it "
                "out."
            )
    first = found[0]
    reason = obstacles.get(first, "its channels are those of the layers that it follows, which can be named")
    raise UsageError(f"{wish.name}: {said}: {first} stays as wide: {reason}.")


def _reason(wish: Wish, model: Model, group: Group) -> str:
    """Why a group is left alone, empty where it is not."""
    names = list(group.rows)
    if _named(wish.keep, model, names):
        return f"keep names {_named(wish.keep, model, names)[0]}" + (", with which it goes" if len(names) > 1 else "")
    if wish.only and not _named(wish.only, model, names):
        return "only does not name it"
    if group.summed and not wish.residual:
        return f"its channels are a residual stream that {len(names)} layers add to (residual=true includes them)"
    return ""


def _count(wish: Wish, model: Model, group: Group) -> int:
    """How many units go: the share, so that the width left is the nearest multiple, at least one."""
    width = model.structure.layers[group.name].shape[0]
    share = wish.share
    for pattern, value in wish.shares.items():
        if _named([pattern], model, list(group.rows)):
            share = value
    target = max(1, int((width - share * group.count) / wish.multiple + 0.5))
    lowest = max(1, width - group.count)  # what has to stay, and never nothing
    return max(0, width - wish.multiple * max(target, -(-lowest // wish.multiple)))
