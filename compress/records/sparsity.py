"""What became zero: the record of a pruned model."""

from __future__ import annotations

from pydantic import Field

from compress.records.base import Record


class LayerSparsity(Record):
    """One pruned layer, measured on its final weight."""

    layer: str
    weights: int
    zeros: int
    pattern: str = Field(default="", description="that its pass was asked for: layer, row, N:M, RxC")
    asked: float | None = Field(default=None, description="the share that its pass was asked for")
    met: bool | None = Field(
        default=None,
        description="whether the final weight has the pattern: N:M in every run, as many zeros as asked in every row, "
        "in whole blocks or altogether; null where the pass names no pattern",
    )


class Sparsity(Record):
    """The pruned layers, and the weights of all layers that passes could have treated."""

    layers: tuple[LayerSparsity, ...]
    weights: int = Field(description="of all layers, pruned or not")

    @property
    def zeros(self) -> int:
        """Of the pruned layers."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def pruned_weights(self) -> int:
        """Weights of the pruned layers, zero or not."""
        return sum(layer.weights for layer in self.layers)
