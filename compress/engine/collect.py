"""Statistics of layer inputs, added up while blocks run: what a pass declares in `needs`, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.engine.layer_stats import LayerStats, Stat
from compress.layer import LayerKind, LayerSpec
from compress.maths import hessian
from compress.maths.histogram import Histogram
from compress.models import experts, placing
from compress.transforms import transformed

DRIFT_STEP = 8
"""The report's errors alone need the drift, which one token in so many shows well enough at a small cost."""


class _Guided:
    """Running sums of x xᵀ, weighed by the saliency of each group of rows; saliency: per batch (tokens, groups)."""

    def __init__(self, saliency: Sequence[Tensor]) -> None:
        self.saliency = saliency
        self.total: Tensor | None = None
        self.tokens = 0

    def add(self, rows: Tensor, place: int) -> None:
        """rows (n, in) float32 of batch `place`."""
        weights = self.saliency[place].to(rows.device).sqrt()
        if self.total is None:
            self.total = rows.new_zeros(weights.shape[1], rows.shape[1], rows.shape[1])
        for total, column in zip(self.total, weights.unbind(1), strict=True):
            hessian.accumulate_upper(total, rows * column[:, None])
        self.tokens += rows.shape[0]

    def mean(self) -> Tensor | None:
        """(groups, in, in) on the CPU."""
        for total in () if self.total is None else self.total:
            hessian.mirror(total)
        return _mean(self.total, self.tokens)


class _Sums:
    """Running sums of one input tensor's statistics."""

    def __init__(self, wants: Collection[Stat]) -> None:
        self.wants = wants
        self.tokens = 0
        self.second: Tensor | None = None
        self.cross: Tensor | None = None
        self.drift: Tensor | None = None
        self.drifted = 0
        self.total_square: Tensor | None = None
        self.total_abs: Tensor | None = None
        self.largest: Tensor | None = None
        self.histogram = Histogram() if Stat.HISTOGRAM in wants else None

    def add(self, rows: Tensor, entries: Tensor, reference: Tensor | None) -> None:
        """rows (n, in) float32; entries: the tensor before a convolution unfolds it; reference: rows of the other
        stream."""
        self.tokens += rows.shape[0]
        if Stat.HESSIAN in self.wants:
            self.second = hessian.accumulate_upper(self.second, rows)
        if reference is not None:
            difference = reference - rows
            self.cross = rows.new_zeros(rows.shape[1], rows.shape[1]) if self.cross is None else self.cross
            self.cross.addmm_(difference.T, rows)
            few = difference[::DRIFT_STEP]
            self.drift = hessian.accumulate_upper(self.drift, few)
            self.drifted += len(few)
        if Stat.MEAN_SQUARE in self.wants:
            square = rows.square().sum(0)
            self.total_square = square if self.total_square is None else self.total_square.add_(square)
        if Stat.ABS_MEAN in self.wants:
            total = rows.abs().sum(0)
            self.total_abs = total if self.total_abs is None else self.total_abs.add_(total)
        if Stat.ABS_MAX in self.wants:
            now = rows.abs().amax(0)
            self.largest = now if self.largest is None else torch.maximum(self.largest, now)
        if self.histogram is not None:
            self.histogram.add(entries)

    def stats(self) -> LayerStats:
        """Means on the CPU: passes compute there, wherever the blocks ran."""
        return LayerStats(
            hessian=None if self.second is None else _mean(hessian.mirror(self.second), self.tokens),
            mean_square=_mean(self.total_square, self.tokens),
            abs_mean=_mean(self.total_abs, self.tokens),
            abs_max=None if self.largest is None else self.largest.cpu(),
            histogram=self.histogram,
            cross=_mean(self.cross, self.tokens),
            drift=None if self.drift is None else _mean(hessian.mirror(self.drift), self.drifted),
            tokens=self.tokens,
        )


def _mean(total: Tensor | None, tokens: int) -> Tensor | None:
    return None if total is None else total.div_(tokens).cpu()


class Collector:
    """Sums statistics per input tensor: layers that are fed the same tensor (q, k, v; gate, up) share one sum.

    An expert has its own, of the tokens routed to it; one that sees none has no statistics.

    Args: guides: by layer the saliency for `Stat.GUIDED`, per batch (tokens, groups); fed: by layer others known to be
    fed what it is, which need not be among `specs`; read where there are guides.
    """

    def __init__(
        self,
        module: nn.Module,
        specs: Sequence[LayerSpec],
        wants: Collection[Stat],
        guides: Mapping[str, Sequence[Tensor]] | None = None,
        fed: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.wants = wants
        self.fed = fed or {}
        chosen = {spec.name for spec in specs}.union(*self.fed.values()) if Stat.GUIDED in wants else ()
        self.guided = {name: _Guided(saliency) for name, saliency in (guides or {}).items() if name in chosen}
        self._place = 0
        self.experts = {spec.name for spec in specs if spec.kind is LayerKind.EXPERT}
        self.mixtures = {path: module.get_submodule(path) for path in {experts.owner(name)[0] for name in self.experts}}
        self.modules = {s.name: module.get_submodule(s.name) for s in specs if s.name not in self.experts}
        self.leader: dict[str, str] = {}
        self.sums: dict[str, _Sums] = {}
        convolutions = [spec.name for spec in specs if spec.kind is LayerKind.CONV and Stat.OUTPUTS in wants]
        self.outputs = {name: Histogram() for name in convolutions}
        self._seen: list[tuple[Tensor, tuple[Any, ...], str]] = []
        self._rows: dict[str, Tensor] = {}
        self._reference: dict[str, Tensor] | None = None
        self._recording = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Meanwhile the layers' inputs are added up."""
        handles = [
            child.register_forward_pre_hook(self._hook(name), prepend=True) for name, child in self.modules.items()
        ]
        handles += [
            self.modules[name].register_forward_hook(self._output_hook(histogram))
            for name, histogram in self.outputs.items()
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

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Meanwhile inputs are kept as those of the other stream, for the batch that is added next."""
        self._recording, self._reference = True, {}
        try:
            yield
        finally:
            self._recording = False
            self._seen.clear()

    def _observer(self, path: str) -> experts.Observer:
        def add(key: str, expert: int, values: Tensor) -> None:
            name = f"{path}.{key}.{expert}"
            if name in self.experts:
                self._add(name, values, values)

        return add

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            values = inputs[0]
            way = (*_unfolding(module), *placing.transforms(module))
            for tensor, other, owner in self._seen:
                if tensor is values and other == way:
                    self.leader[name] = owner
                    self._guide(name, self._rows.get(owner))
                    return
            self._seen.append((values, way, name))
            values = transformed(placing.transforms(module), values)
            self._add(name, unfold(module, values), values)

        return add

    def _output_hook(self, histogram: Histogram) -> Callable[[nn.Module, Any, Tensor], None]:
        def add(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if not self._recording:
                histogram.add(output)

        return add

    def _add(self, name: str, rows: Tensor, entries: Tensor) -> None:
        rows = rows.reshape(-1, rows.shape[-1]).float()
        self.leader[name] = name
        if self._recording:
            assert self._reference is not None
            self._reference[name] = rows
            return
        sums = self.sums.setdefault(name, _Sums(self.wants))
        other = None if self._reference is None else self._reference.get(name)
        # an expert may be routed other tokens in the other stream: then there is no row to compare with
        sums.add(rows, entries, other if other is not None and other.shape == rows.shape else None)
        if self.guided:
            self._rows[name] = rows
            for each in (name, *self.fed.get(name, ())):
                self.leader[each] = name
                self._guide(each, rows)

    def _guide(self, name: str, rows: Tensor | None) -> None:
        if name in self.guided and rows is not None:
            self.guided[name].add(rows, self._place)

    def next_batch(self) -> None:
        """Forget which tensors were seen: the next batch has others."""
        self._seen.clear()
        self._rows.clear()
        self._reference = None
        self._place += 1

    def finish(self) -> dict[str, LayerStats]:
        """Statistics by layer; layers that share inputs share them."""
        found = {name: sums.stats() for name, sums in self.sums.items()}
        if Stat.SHARING in self.wants:
            for group in self.groups():
                found[self.leader[group[0]]].sharing = group
        guided, outputs = {name: sums.mean() for name, sums in self.guided.items()}, self.outputs
        stats = {name: found[owner] for name, owner in self.leader.items()}
        stats |= {name: replace(stats[name], guided=own) for name, own in guided.items() if name in stats}
        return {name: replace(own, outputs=outputs[name]) if name in outputs else own for name, own in stats.items()}

    def groups(self) -> list[tuple[str, ...]]:
        """Layers that were fed the same tensor, in the order of the first of them."""
        by_owner: dict[str, list[str]] = {}
        for name, owner in self.leader.items():
            by_owner.setdefault(owner, []).append(name)
        return [tuple(names) for names in by_owner.values()]


def _unfolding(module: nn.Module) -> tuple[Any, ...]:
    """What must be equal for two convolutions to see the same patches of one tensor; () for a linear layer."""
    if not isinstance(module, nn.Conv2d):
        return ()
    return (module.kernel_size, module.stride, module.padding, module.dilation, module.groups)


def unfold(module: nn.Module, values: Tensor) -> Tensor:
    """The rows that a layer's weight multiplies: (…, in) as it is for a linear layer; for a convolution
    (batch, channels, h, w) → (batch · places, in · kh · kw). Grouped convolutions see all channels of a patch."""
    if not isinstance(module, nn.Conv2d):
        return values
    padding: Any = 0 if module.padding == "valid" else module.padding
    if padding == "same":  # uneven where the kernel is even
        values, padding = nn.functional.pad(values, module._reversed_padding_repeated_twice), 0
    patches = nn.functional.unfold(values, module.kernel_size, module.dilation, padding, module.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])
