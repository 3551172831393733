"""Which channels of an image classifier go together: those that one removal takes from all layers at once.

Every output channel of a convolution or linear layer gets a label, and one run of the model shows where it goes:
through which normalisations and depthwise convolutions, into which layers, and with which labels it is added or
multiplied, so that both stand or fall together (dependency groups: Fang et al. 2023, DepGraph, arXiv 2301.12900). What
passes through an operation that is not known to keep channels apart has to stay, and so do the model's own outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compress.models.skeleton import Structure
from compress.wiring.channel_ops import (
    ENTRYWISE,
    FIXED,
    PAIRWISE,
    Channels,
    aligned,
    first_tensor,
    moved,
    names_of,
)

Places = tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Channels that the same modules make, pass on and read: units, each of which is removed as a whole.

    rows: by path of the layers that make them, the rows of each unit; along: by path of normalisations and depthwise
    convolutions, theirs; columns: by path of the layers that read them, the input channels of each unit; summed:
    whether outputs of several layers are added up in them, as in a residual stream.
    """

    rows: dict[str, tuple[Places, ...]]
    along: dict[str, tuple[Places, ...]]
    columns: dict[str, tuple[Places, ...]]
    summed: bool

    @property
    def count(self) -> int:
        """Units."""
        return len(next(iter(self.rows.values())))

    @property
    def name(self) -> str:
        """Of the first layer that makes them."""
        return next(iter(self.rows))


@dataclass
class _Labels:
    """Labels that were found to belong together, and why some have to stay."""

    parent: list[int] = field(default_factory=lambda: [FIXED])
    fixed: dict[int, str] = field(default_factory=lambda: {FIXED: "it meets what is no layer's output"})
    sums: list[int] = field(default_factory=list)

    def new(self, count: int) -> Places:
        first = len(self.parent)
        self.parent += range(first, first + count)
        return tuple(range(first, first + count))

    def root(self, label: int) -> int:
        while self.parent[label] != label:
            self.parent[label] = self.parent[self.parent[label]]
            label = self.parent[label]
        return label

    def join(self, first: Iterable[int], second: Iterable[int], *, summed: bool = False) -> None:
        for pair in zip(first, second, strict=True):
            low, high = sorted(map(self.root, pair))
            if low == high:
                continue
            self.parent[high] = low
            self.sums += [low] if summed else []
            if high in self.fixed:
                self.fixed.setdefault(low, self.fixed[high])

    def fix(self, labels: Iterable[int], reason: str) -> None:
        for label in labels:
            self.fixed.setdefault(self.root(label), reason)

    def why(self, label: int) -> str:
        """Why a channel has to stay, empty where it need not."""
        return self.fixed.get(self.root(label), "")


class Wiring(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows labels through one run; `groups` and `obstacles` tell what it saw."""

    def __init__(self, module: nn.Module, structure: Structure) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.module = module
        self.labels = _Labels()
        self.made: dict[str, Places] = {}
        self.along: dict[str, Places] = {}
        self.read: dict[str, Places] = {}
        self._known: dict[int, tuple[Tensor, Channels]] = {}  # the tensor stays alive, so none takes its place
        self._inside = 0
        own = [spec.name for spec in structure.layers.values() if len(spec.users) == 1]
        self._layers = {name: structure.layers[name] for name in own}
        shared = {alias.rpartition(".")[0] for pair in structure.aliases.items() for alias in pair}
        self._norms = [name for name, child in module.named_modules() if _is_norm(child) and name not in shared]

    def run(self, images: Tensor) -> None:
        """Watch the module on a batch (n, channels, h, w) float32."""
        images = images.clone()
        self._set(images, Channels(1, (FIXED,) * images.shape[1]))
        with torch.no_grad(), self._watched(), self:
            output = self.module(images)
        self._fix(output, "the model puts it out")

    @contextmanager
    def _watched(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name in (*self._layers, *self._norms):
                child = self.module.get_submodule(name)
                for handle in (
                    child.register_forward_pre_hook(lambda *_: self._step(1)),
                    child.register_forward_hook(partial(self._passed, name), with_kwargs=True),
                ):
                    stack.callback(handle.remove)
            yield

    def _step(self, change: int) -> None:
        self._inside += change

    def _get(self, tensor: Any) -> Channels | None:
        known = self._known.get(id(tensor))
        return None if known is None else known[1]

    def _set(self, tensor: Tensor, channels: Channels) -> None:
        self._known[id(tensor)] = (tensor, channels)

    def _fix(self, tensor: Any, reason: str) -> None:
        channels = self._get(tensor)
        if channels is not None:
            self.labels.fix(channels.labels, reason)

    # what layers do

    def _passed(
        self, name: str, child: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> None:
        self._step(-1)
        given = next(iter((*inputs, *named.values())))
        channels, dim = self._get(given), output.ndim - (1 if isinstance(child, nn.Linear) else 3)
        if channels is not None and channels.dim != dim:
            self.labels.fix(channels.labels, f"{name} takes it along another dimension")
            channels = None
        if name in self._norms or _is_depthwise(child):
            self._pass_on(name, channels, output, dim)
            return
        size = output.shape[dim]
        if name not in self.made:
            self.made[name] = self.labels.new(size)
        entering = (FIXED,) * given.shape[dim] if channels is None else channels.labels
        if isinstance(child, nn.Conv2d) and child.groups > 1:
            self.labels.fix((*entering, *self.made[name]), f"{name} is a convolution of {child.groups} groups")
        self._note(self.read, name, entering)
        self._set(output, Channels(dim, self.made[name]))

    def _pass_on(self, name: str, channels: Channels | None, output: Tensor, dim: int) -> None:
        labels = (FIXED,) * output.shape[dim] if channels is None else channels.labels
        self._note(self.along, name, labels)
        self._set(output, Channels(dim, labels))

    def _note(self, table: dict[str, Places], name: str, labels: Places) -> None:
        """A module that runs twice takes like channels both times."""
        if name in table:
            self.labels.join(table[name], labels)
        table.setdefault(name, labels)

    # what is between them

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside:
            self._follow(func, args, kwargs or {}, result)
        return result

    def _follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        if not any(self._get(tensor) is not None for tensor in tensors):
            return
        (name, is_writing), made = names_of(func), first_tensor(result)
        if made is not None and name == "cat":
            self._concatenated(tensors, made, args)
        elif made is not None and name in PAIRWISE:
            self._paired(name, is_writing, tensors, made)
        elif made is None or len(tensors) > 1 or (is_writing and name not in ENTRYWISE):
            self._mixed(name, tensors)
        else:
            self._moved(name, tensors[0], made, [*args[1:], *kwargs.values()])

    def _moved(self, name: str, given: Tensor, made: Tensor, args: Sequence[Any]) -> None:
        before = self._get(given)
        assert before is not None
        channels = moved(name, before, given, made, args)
        if channels is None or made.shape[channels.dim] != len(channels.labels):
            self._mixed(name, [given])
        else:
            self._set(made, channels)

    def _mixed(self, name: str, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self._fix(tensor, f"it goes through '{name}', which may mix channels")

    def _paired(self, name: str, is_writing: bool, tensors: Sequence[Tensor], made: Tensor) -> None:
        shifted = [self._shifted(tensor, made) for tensor in tensors]
        known = [channels for channels in shifted if channels is not None]
        first = known[0]
        others = [tensor for tensor in tensors if self._get(tensor) is None]
        fixed = any(channels.dim != first.dim or len(channels.labels) != len(first.labels) for channels in known)
        if fixed or (is_writing and self._get(tensors[0]) is None):
            self._mixed(name, tensors)
            return
        for channels in known[1:]:
            self.labels.join(first.labels, channels.labels, summed=name in ("add", "sub"))
        if any(aligned(first, tensor, made) >= 0 for tensor in others):
            self.labels.fix(first.labels, f"'{name}' meets it with numbers for each channel")
        self._set(made, first)

    def _shifted(self, tensor: Tensor, made: Tensor) -> Channels | None:
        """A tensor's channels by the dimensions of what was made of it."""
        channels = self._get(tensor)
        return None if channels is None else Channels(channels.dim + made.ndim - tensor.ndim, channels.labels)

    def _concatenated(self, tensors: Sequence[Tensor], made: Tensor, args: Sequence[Any]) -> None:
        along = (args[1] if len(args) > 1 else 0) % made.ndim
        known = [channels for channels in map(self._get, tensors) if channels is not None]
        dim = known[0].dim
        if any(channels.dim != dim for channels in known):
            self._mixed("cat", tensors)
            return
        found = [self._get(tensor) or Channels(dim, (FIXED,) * tensor.shape[dim]) for tensor in tensors]
        if along == dim:
            self._set(made, Channels(dim, tuple(label for channels in found for label in channels.labels)))
            return
        for channels in found[1:]:
            self.labels.join(found[0].labels, channels.labels)
        self._set(made, found[0])

    # what was found

    def groups(self) -> list[Group]:
        """All channels that may be removed, in the order in which their layers first ran."""
        units: dict[int, dict[tuple[str, str], list[int]]] = {}
        for side, table in (("rows", self.made), ("along", self.along), ("columns", self.read)):
            for name, labels in table.items():
                for place, label in enumerate(labels):
                    units.setdefault(self.labels.root(label), {}).setdefault((side, name), []).append(place)
        units = {root: parts for root, parts in units.items() if root not in self.labels.fixed}
        alike: dict[tuple[tuple[str, str], ...], list[int]] = {}
        for root, parts in units.items():
            alike.setdefault(tuple(parts), []).append(root)
        summed = {self.labels.root(label) for label in self.labels.sums}
        return [self._group(parts, [units[root] for root in roots], not summed.isdisjoint(roots))
                for parts, roots in alike.items()]  # fmt: skip

    def _group(
        self, parts: Sequence[tuple[str, str]], units: Sequence[Mapping[tuple[str, str], list[int]]], summed: bool
    ) -> Group:
        sides: dict[str, dict[str, tuple[Places, ...]]] = {"rows": {}, "along": {}, "columns": {}}
        for side, name in parts:
            sides[side][name] = tuple(tuple(unit[side, name]) for unit in units)
        return Group(sides["rows"], sides["along"], sides["columns"], summed)

    def obstacles(self) -> dict[str, str]:
        """Layers whose output channels all have to stay, with why."""
        found = {}
        for name, labels in {**self.along, **self.made}.items():
            reasons = [self.labels.why(label) for label in labels]
            if name in self._layers and all(reasons):
                found[name] = reasons[0]
        return found


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    nested = [value if isinstance(value, list | tuple) else [value] for value in values]
    return [value for group in nested for value in group if isinstance(value, torch.Tensor)]


def _is_norm(module: nn.Module) -> bool:
    return type(module) is nn.BatchNorm2d and module.weight is not None and module.running_mean is not None


def _is_depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == module.in_channels == module.out_channels
        and module.groups > 1
    )


def watch(module: nn.Module, structure: Structure, images: Tensor) -> Wiring:
    """Run a classifier on a batch of images and see how its channels hang together."""
    wiring = Wiring(module, structure)
    wiring.run(images)
    return wiring
