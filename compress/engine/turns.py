"""Layers of a block in turn: each group is seen with the inputs that the groups before it, already changed, put out.

Nothing heavy is computed twice. The block runs up to the group and no further; what a child module of the block puts
out is kept once all layers it depends on are final, and stands in for the child from then on. Where that output is a
layer's own (attention and MLP mostly end in one), not even the child runs again, but the layer alone, on its inputs,
which were kept when they were seen. So all groups and the step to the next block together cost one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress.engine.collect import Collector
from compress.engine.layer_stats import LayerStats, Stat
from compress.layer import LayerKind, LayerSpec
from compress.maths.activations import allocate, rest

if TYPE_CHECKING:
    from compress.engine.stream import BlockStream

Group = tuple[str, ...]
"""Layers that are fed the same tensor."""


class _ReachedError(Exception):
    """The group's inputs are known: the rest of the block need not run."""


@dataclass(frozen=True)
class _Child:
    """A direct child of the block whose output can be kept.

    features: of its output (batch, length, features); elements: 0 where it returns that alone, else the length of its
    tuple, the rest of which is None; final: the last group that it depends on; tail: the layer whose output it is.
    """

    module: nn.Module
    features: int
    elements: int
    final: int
    tail: str | None


@dataclass(frozen=True)
class _Lane:
    """One stream: hidden states at the block's door; what is kept inside the block by name and batch."""

    hidden: Sequence[Tensor]
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    done: set[tuple[str, int]] = field(default_factory=set)


class Turns:
    """The loaded block of a stream while a pass changes its layers, group after group.

    Args: specs: the chosen layers; cross: also carry the reference stream, through the block as it is now. Each of
    `groups` is to be collected, changed and settled, in order. Layers that no call on the first batch reaches, and
    experts, whose inputs hang on each other within one call, are the last group, which has no reference.
    """

    def __init__(self, stream: BlockStream, index: int, specs: Sequence[LayerSpec], cross: bool) -> None:
        self._stream, self._index = stream, index
        self._path = stream.model.structure.blocks[index]
        self._block = stream.module.get_submodule(self._path)
        self._specs = {spec.name: spec for spec in specs}
        self._received = self._parameters()
        self._lane = _Lane(stream.hidden)
        self._other = _Lane(stream.reference) if cross else None
        calls = self._survey()
        self._sharing = calls.groups
        rest = tuple(name for name in self._specs if not any(name in group for group in calls.groups))
        self.groups: list[Group] = [*calls.groups, *([rest] if rest else [])]
        self._children = _children(self._path, self._block, self.groups, calls, tuple(stream.hidden[0].shape[:-1]))

    def collect(
        self, group: Group, wants: Collection[Stat], guides: Mapping[str, Sequence[Tensor]] | None = None
    ) -> dict[str, LayerStats]:
        """Statistics of a group's inputs, one object for all that share them, where guides (see `Collector`) do not
        tell them apart."""
        shared = group in self._sharing
        wanted = frozenset(wants) if shared and self._other is not None else frozenset(wants) - {Stat.CROSS}
        chosen = [self._specs[name] for name in (group[:1] if shared else group)]
        collector = Collector(self._stream.module, chosen, wanted, guides, {group[0]: group[1:]} if shared else None)
        for lane in self._lanes():
            for child in self._ending(group):
                lane.inputs[str(child.tail)] = self._room(lane, self._specs[str(child.tail)].shape[1])
        with collector.attached(), torch.no_grad():
            for place in range(len(self._lane.hidden)):
                if self._other is not None and shared:
                    with collector.recording(), self._as_received():
                        self._run(self._other, place, self.groups.index(group))
                self._run(self._lane, place, self.groups.index(group))
                collector.next_batch()
        found = collector.finish()
        if not shared or collector.guided:
            return found
        stats = replace(found[group[0]], sharing=group if Stat.SHARING in wants else ())
        return dict.fromkeys(group, stats)

    def settle(self, group: Group) -> None:
        """The group's layers are final, and so is what ends in one of them."""
        for name, child in self._children.items():
            if child.tail not in group or child.tail is None:
                continue
            module = self._stream.module.get_submodule(child.tail)
            for lane in self._lanes():
                room = self._room(lane, child.features)
                with torch.no_grad(), self._as_received() if lane is self._other else ExitStack():
                    for place, inputs in enumerate(lane.inputs.pop(child.tail)):
                        room[place].copy_(module(inputs.to(self._stream.device)))
                        rest(inputs, room[place])
                        lane.done.add((name, place))
                lane.outputs[name] = room

    def outputs(self) -> Iterator[Tensor]:
        """What the block, with all groups settled, puts out for each batch."""
        return self._ends(self._lane)

    def look_ahead(self) -> None:
        """Note what the block as received puts out in the reference stream, in place of the stream's `look_ahead`."""
        assert self._other is not None
        with self._as_received():
            for room, output in zip(self._stream.targets, self._ends(self._other), strict=True):
                room.copy_(output)
                rest(room)

    def _ends(self, lane: _Lane) -> Iterator[Tensor]:
        for place in range(len(lane.hidden)):
            with torch.no_grad():
                output = self._run(lane, place, len(self.groups))
            assert output is not None
            yield output

    def _lanes(self) -> list[_Lane]:
        return [self._lane] if self._other is None else [self._lane, self._other]

    def _ending(self, group: Group) -> list[_Child]:
        """Children that put out what a layer of the group does."""
        return [child for child in self._children.values() if child.tail in group]

    def _room(self, lane: _Lane, features: int) -> list[Tensor]:
        return allocate(
            [(*hidden.shape[:-1], features) for hidden in lane.hidden], self._stream.spill, self._stream.dtype
        )

    def _survey(self) -> _Calls:
        """What is called in which order, from running the first batch."""
        linear = [spec for spec in self._specs.values() if spec.kind is not LayerKind.EXPERT]
        collector = Collector(self._stream.module, linear, ())
        calls = _Calls()
        watched = {spec.name: self._stream.module.get_submodule(spec.name) for spec in linear}
        watched |= {f"{self._path}.{name}": child for name, child in self._block.named_children()}
        with ExitStack() as undo, torch.no_grad():
            undo.enter_context(collector.attached())
            for name, module in watched.items():
                undo.callback(module.register_forward_hook(calls.noting(name)).remove)
            self._stream.call(self._index, self._stream.hidden[0])
        calls.groups = collector.groups()
        return calls

    def _run(self, lane: _Lane, place: int, at: int) -> Tensor | None:
        """The block on one batch, up to group `at` (then None) or to its end."""
        group = self.groups[at] if at < len(self.groups) else ()
        with ExitStack() as undo:
            for name, child in self._children.items():
                if (name, place) in lane.done:
                    undo.enter_context(_standing_in(child, lane.outputs[name][place].to(self._stream.device)))
                elif child.final < at < len(self.groups):
                    undo.callback(child.module.register_forward_hook(self._keeping(lane, name, place)).remove)
            for child in self._ending(group):
                module, room = self._stream.module.get_submodule(str(child.tail)), lane.inputs[str(child.tail)][place]
                undo.callback(module.register_forward_pre_hook(_storing(room), prepend=True).remove)
            if group in self._sharing:
                module = self._stream.module.get_submodule(group[0])
                undo.callback(module.register_forward_pre_hook(_stop).remove)
            kept = (rooms[place] for rooms in (*lane.outputs.values(), *lane.inputs.values(), lane.hidden))
            undo.callback(lambda: rest(*kept))
            try:
                return self._stream.call(self._index, lane.hidden[place])
            except _ReachedError:
                return None

    def _keeping(self, lane: _Lane, name: str, place: int) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if name not in lane.outputs:
                lane.outputs[name] = self._room(lane, self._children[name].features)
            lane.outputs[name][place].copy_(_first(output))
            lane.done.add((name, place))

        return keep

    def _parameters(self) -> dict[tuple[nn.Module, str], nn.Parameter | None]:
        return {(child, key): value for child in self._block.modules() for key, value in child._parameters.items()}

    @contextmanager
    def _as_received(self) -> Iterator[None]:
        """Meanwhile the block has the parameters that it had when the first turn began."""
        now = self._parameters()
        for (child, key), value in self._received.items():
            child._parameters[key] = value
        try:
            yield
        finally:
            for (child, key), value in now.items():
                child._parameters[key] = value


@dataclass
class _Calls:
    """Modules in the order in which their calls end, with the input's shape and what they put out each time."""

    groups: Sequence[Group] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    returned: dict[str, list[Any]] = field(default_factory=dict)

    def noting(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def note(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self.returned.setdefault(name, []).append(output)
            if inputs and isinstance(inputs[0], Tensor):
                self.shapes[name] = tuple(inputs[0].shape)

        return note


def _children(
    path: str, block: nn.Module, groups: Sequence[Group], calls: _Calls, door: tuple[int, ...]
) -> dict[str, _Child]:
    """The block's children whose output can be kept: called once, with chosen layers inside, and one tensor comes out
    of them, (*door, features)."""
    turn = {name: at for at, group in enumerate(groups) for name in group}
    found: dict[str, _Child] = {}
    final = -1
    direct = [name for name in calls.returned if name.rpartition(".")[0] == path]
    for name in direct:
        inside = [layer for layer in turn if layer == name or layer.startswith(f"{name}.")]
        final = max([final, *(turn[layer] for layer in inside)])
        output, *again = calls.returned[name]
        first = _first(output)
        bare = not isinstance(output, tuple) or all(other is None for other in output[1:])
        if not inside or again or not bare or not isinstance(first, Tensor) or tuple(first.shape[:-1]) != door:
            continue
        tails = [layer for layer in inside if turn[layer] == final and _ends_in(calls, layer, first, door)]
        elements = len(output) if isinstance(output, tuple) else 0
        module = block.get_submodule(name.removeprefix(f"{path}."))
        found[name] = _Child(module, first.shape[-1], elements, final, tails[0] if tails else None)
    return found


def _ends_in(calls: _Calls, layer: str, output: Tensor, door: tuple[int, ...]) -> bool:
    """Whether a layer's one call put out this very tensor, from an input laid out as (*door, features)."""
    returned = calls.returned.get(layer, ())
    return len(returned) == 1 and returned[0] is output and calls.shapes[layer][:-1] == door


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _standing_in(child: _Child, kept: Tensor) -> Iterator[None]:
    """Meanwhile the child puts out what was kept, without being run."""
    output = (kept, *[None] * (child.elements - 1)) if child.elements else kept
    child.module.__dict__["forward"] = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        del child.module.__dict__["forward"]


def _storing(room: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def store(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        room.copy_(inputs[0])

    return store


def _stop(_module: nn.Module, _inputs: Any) -> None:
    raise _ReachedError
