"""Passes that may share sparsity out among layers, by how many outliers each has."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from compress.engine.layer_stats import LayerStats
from compress.engine.layerpass import Pass
from compress.engine.prune_pass import Pruning, input_norms
from compress.errors import UsageError
from compress.formats.base import QuantTensor
from compress.layer import Layer, LayerSpec
from compress.maths import allocation


class Allocating(Pruning, ABC):
    """Settings of passes that prune block by block.

    `allocate`: `uniform` the same share of every layer; `owl` less where there are more outliers (OWL, Yin et al. 2024,
    arXiv 2310.05175), which are weights whose |w| · ‖x‖ exceeds `owl_m` times the mean, counted over each block or, by
    `owl_per`, each layer, in one more run through the model. No layer's share is farther than `owl_lambda` from
    `sparsity`, which their mean hits exactly; layers with a sparsity of their own are shared out among themselves."""

    allocate: Literal["uniform", "owl"] = "uniform"
    owl_m: float = Field(default=5.0, gt=0)
    owl_lambda: float = Field(default=0.08, gt=0, lt=1)
    owl_per: Literal["block", "layer"] = "block"

    @model_validator(mode="after")
    def _check_allocation(self) -> Self:
        if self.allocate == "uniform":
            given = sorted({"owl_m", "owl_lambda", "owl_per"} & self.model_fields_set)
            if given and "allocate" not in self.model_fields_set:
                raise UsageError(f"{self.name}: {given[0]} does nothing without allocate=owl. Give both, or neither.")
            return self
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
            assert isinstance(one, Allocating)
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
        together: dict[object, list[tuple[str, Allocating, LayerSpec]]] = {}
        for name, (one, spec) in chosen.items():
            assert isinstance(one, Allocating)
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

    @property
    def bounds(self) -> tuple[float, float]:
        away = self.owl_lambda if self.allocate == "owl" else 0.0
        return self.sparsity - away, self.sparsity + away

    def pruned(self, layer: Layer, weight: Tensor | QuantTensor, notes: tuple[str, ...] = ()) -> Layer:
        share = (f"allocate=owl: {100 * self.sparsity:.4g} % of it to be pruned",) if self.allocate == "owl" else ()
        return super().pruned(layer, weight, (*share, *notes))
