"""Settings of passes that prune weights, and what they report."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.engine.blockpass import BlockPass
from compress.engine.layer_stats import LayerStats
from compress.engine.layerpass import LayerPass, Pass
from compress.engine.part import Part
from compress.errors import InputError, UsageError
from compress.formats.base import QuantTensor
from compress.layer import Layer, LayerKind, LayerSpec, Zeros
from compress.maths import allocation, products
from compress.maths.masks import Pattern

UNREACHED = "no calibration token reached it: pruned as if its inputs were alike"


class Pruning(Pass, ABC):
    """Settings of passes that set weights to zero: `sparsity` the share that becomes zero, `pattern` which (see
    `Pattern`). Weights stay plain tensors; passes that give them a format later keep the zeros (`Layer.mask`).

    `allocate`: `uniform` the same share of every layer; `owl` less where there are more outliers (OWL, Yin et al. 2024,
    arXiv 2310.05175), which are weights whose |w| · ‖x‖ exceeds `owl_m` times the mean, counted over each block or, by
    `owl_per`, each layer, in one more run through the model. No layer's share is farther than `owl_lambda` from
    `sparsity`, which their mean hits exactly; layers with a sparsity of their own are shared out among themselves."""

    part: ClassVar[Part] = Part.VALUES
    before: ClassVar[frozenset[Part]] = frozenset({Part.WEIGHT})
    prunes: ClassVar[bool] = True
    any_dtype: ClassVar[bool] = True
    opaque: ClassVar[bool] = True

    sparsity: float = Field(default=0.5, gt=0, lt=1)
    pattern: str = "layer"
    allocate: Literal["uniform", "owl"] = "uniform"
    owl_m: float = Field(default=5.0, gt=0)
    owl_lambda: float = Field(default=0.08, gt=0, lt=1)
    owl_per: Literal["block", "layer"] = "block"

    @model_validator(mode="after")
    def _check_pattern(self) -> Self:
        pattern = self.parsed()
        if pattern.fixed is not None and "sparsity" in self.model_fields_set and self.sparsity != pattern.fixed:
            raise UsageError(
                f"{self.name}: sparsity={self.sparsity:g} and pattern={pattern}, which is a sparsity of "
                f"{pattern.fixed:g}, contradict each other. Leave sparsity out."
            )
        return self

    @model_validator(mode="after")
    def _check_allocation(self) -> Self:
        if self.allocate == "uniform":
            given = sorted({"owl_m", "owl_lambda", "owl_per"} & self.model_fields_set)
            if given and "allocate" not in self.model_fields_set:
                raise UsageError(f"{self.name}: {given[0]} does nothing without allocate=owl. Give both, or neither.")
            return self
        if not isinstance(self, LayerPass | BlockPass):
            raise UsageError(
                f"{self.name}: allocate=owl shares sparsity out before the first layer is pruned, and {self.name} has "
                "the whole model at once. Leave allocate out, and give layers a sparsity of their own in overrides."
            )
        if self.parsed().fixed is not None:
            raise UsageError(
                f"{self.name}: pattern={self.pattern} prunes as much of every layer, which allocate=owl would change. "
                "Choose another pattern, or allocate=uniform."
            )
        if not 0 < self.sparsity - self.owl_lambda < self.sparsity + self.owl_lambda < 1:
            raise UsageError(
                f"{self.name}: sparsity={self.sparsity:g} with owl_lambda={self.owl_lambda:g} could prune "
                f"{100 * (self.sparsity - self.owl_lambda):g} to {100 * (self.sparsity + self.owl_lambda):g} % of a "
                f"layer. Set owl_lambda below {min(self.sparsity, 1 - self.sparsity):g}."
            )
        return self

    @property
    def allots(self) -> bool:
        return "owl" in (self.allocate, *(each.get("allocate") for each in self.overrides.values()))

    @property
    def needs_data(self) -> bool:
        return super().needs_data or self.allots

    def trials(self, blocks: int) -> tuple[float, float]:
        """A walk before the walk goes through each block twice, as one for statistics does."""
        return (2.0, 0.0) if self.allots and self.wants else (0.0, 0.0)

    def gauge(
        self, layers: Mapping[str, Layer], chosen: Mapping[str, Pass], stats: Mapping[str, LayerStats]
    ) -> dict[str, float]:
        """Shares of outliers. Layers that no token reached have none, unless nothing in the segment has inputs."""
        together: dict[tuple[float, str], list[str]] = {}
        for name, one in chosen.items():
            assert isinstance(one, Pruning)
            known = name in stats or not stats
            if one.allocate == "owl" and known:
                alone = name if one.owl_per == "layer" else ""
                together.setdefault((one.owl_m, alone), []).append(name)

        def shares(names: Sequence[str], times: float) -> dict[str, float]:
            def scores() -> Iterator[Tensor]:
                for name in names:
                    norms, _ = input_norms(layers[name], stats.get(name, LayerStats()))
                    yield layers[name].float_weight().abs() * norms

            return dict.fromkeys(names, allocation.outlier_share(scores, times))

        found: dict[str, float] = {}
        for (times, _), names in together.items():
            found |= shares(names, times)
        return found

    def allot(self, chosen: Mapping[str, tuple[Pass, LayerSpec]], gauged: Mapping[str, float]) -> dict[str, Pass]:
        together: dict[object, list[tuple[str, Pruning, LayerSpec]]] = {}
        for name, (one, spec) in chosen.items():
            assert isinstance(one, Pruning)
            if one.allocate == "owl":
                key = one.sparsity, one.owl_m, one.owl_lambda, one.owl_per
                together.setdefault(key, []).append((name, one, spec))
        settled: dict[str, Pass] = {}
        for group in together.values():
            first, sizes = group[0][1], [spec.shape[0] * spec.shape[1] for _, _, spec in group]
            outliers = [gauged.get(name) for name, _, _ in group]
            wanted = allocation.spread(first.sparsity, outliers, sizes, first.owl_lambda)
            units = [one.parsed().rivals(spec.shape) for _, one, spec in group]
            counts = allocation.whole_counts(wanted, units, sizes)
            for (name, one, _), count, number in zip(group, counts, units, strict=True):
                settled[name] = one.model_copy(update={"sparsity": count / number})
        return settled

    def parsed(self) -> Pattern:
        try:
            return Pattern.parse(self.pattern)
        except UsageError as error:
            raise UsageError(f"{self.name}: {error}") from error

    def plan(self, spec: LayerSpec) -> LayerSpec:
        pattern = self.parsed()
        try:
            pattern.check(spec.shape)
        except UsageError as error:
            raise UsageError(
                f"{self.name}: layer {spec.name}: {error} Choose another pattern, or leave it out "
                f"(ignore=[{spec.name}])."
            ) from error
        rivals, away = pattern.rivals(spec.shape), self.owl_lambda if self.allocate == "owl" else 0.0
        for sparsity in {self.sparsity - away, self.sparsity + away}:
            kept = pattern.kept(spec.shape, sparsity)
            if kept in (0, rivals):
                raise UsageError(
                    f"{self.name}: sparsity={sparsity:g} (pattern={pattern}) of {spec.name}, which is "
                    f"{spec.shape[0]} x {spec.shape[1]}, rounds to {'nothing' if kept else 'all of it'}. Choose "
                    f"another sparsity, or leave it out (ignore=[{spec.name}])."
                )
        if pattern.kind == "n:m" and spec.kernel is not None and spec.kernel[1:] != (1, 1):
            raise UsageError(
                f"{self.name}: pattern={pattern} runs along input channels, and the columns of {spec.name} are taps of "
                f"a {spec.kernel[1]}x{spec.kernel[2]} kernel too. Choose layer or row, or leave it out "
                f"(ignore=[{spec.name}])."
            )
        return replace(spec, zeros=Zeros(pattern, pattern.left(spec.shape, self.sparsity)))

    def keep(self, layer: Layer, scores: Tensor) -> Tensor:
        """scores (out, in) ≥ 0 → (out, in) bool, true where a weight stays. Raises: InputError for NaN."""
        if not products.all_finite(scores):
            raise InputError(
                f"{self.name}: scores of {layer.name} are NaN or infinite: its weight or the statistics of its inputs "
                "are. Check the model and the calibration data."
            )
        pattern = self.parsed()
        return pattern.keep(scores, pattern.kept(layer.shape, self.sparsity))

    def pruned(self, layer: Layer, weight: Tensor | QuantTensor, notes: tuple[str, ...] = ()) -> Layer:
        """The layer with a weight (out, in) that has its zeros, with a note of them: float32, which is stored as the
        layer's was, or in a format."""
        assert isinstance(layer.weight, Tensor)
        stored = weight.to(layer.weight.dtype) if isinstance(weight, Tensor) else weight
        decoded = stored if isinstance(stored, Tensor) else stored.dequantize()
        zeros = 1 - int(torch.count_nonzero(decoded)) / decoded.numel()
        note = (
            f"{100 * zeros:.4g} % of the weights are zero ({self.pattern}), stored and computed like others; "
            "pack_sparse leaves them out of what is stored, which makes nothing faster"
        )
        shared = (f"allocate=owl: {100 * self.sparsity:.4g} % of it to be pruned",) if self.allocate == "owl" else ()
        return replace(layer, weight=stored, notes=(note, *shared, *notes))


def input_norms(layer: Layer, stats: LayerStats) -> tuple[Tensor, tuple[str, ...]]:
    """Root mean square of each input, (1, in), of a grouped convolution (out, in); a note where there is none: then
    they are 1."""
    power = stats.mean_square if stats.hessian is None else stats.hessian.diagonal()
    if power is None:
        return torch.ones(1, layer.shape[1]), (UNREACHED,)
    norms = power.clamp(min=0).sqrt().reshape(layer.groups, layer.shape[1])
    return norms.repeat_interleave(layer.shape[0] // layer.groups, 0) if layer.groups > 1 else norms, ()


REACHED: frozenset[LayerKind] = frozenset({LayerKind.LINEAR, LayerKind.EXPERT, LayerKind.CONV})
"""Kinds of layers whose inputs have second moments."""
