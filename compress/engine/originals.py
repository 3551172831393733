"""The last unquantized weights of a model that several stages treat: what the report's errors are taken against."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from compress.engine import store
from compress.layer import Layer
from compress.models.model import Model


@dataclass
class Sources:
    """What each layer was before it was quantized, as one stage asks for it.

    A layer that is not quantized when the stage begins is its own source. That of any other is the original's, unless a
    pass rescaled or turned the weight before it was rounded: such a weight is nowhere else, so the stage that rounds it
    keeps it in `source-N/`, in files like the store's, for the stages after.

    original: the source model, laid out as the recipe treats it; model: as the stage received it; folder: where
    `source-N/` are; number: of the stage; later: layers that stages after this one treat.
    """

    original: Model
    model: Model
    folder: Path
    number: int
    later: Collection[str]
    _read: tuple[int, dict[str, Layer]] | None = field(default=None, repr=False)

    def of(self, layer: Layer) -> Layer:
        """A layer as the stage received it → the same before it was quantized."""
        if layer.format is None:
            return layer
        spec = self.original.structure.layers[layer.name]
        kept = self._earlier(spec.segment)
        return kept[layer.name] if layer.name in kept else self.original.layer(spec)

    def keep(self, segment: int, done: Mapping[str, Layer], sources: Mapping[str, Layer]) -> None:
        """Keep what later stages cannot read elsewhere. Comes before the segment is noted as finished.

        Args: done: layers as the stage leaves them; sources: the same before they were quantized.
        """
        kept = {name: sources[name] for name, layer in done.items() if self._is_lost(layer, sources[name])}
        if kept:
            target = folder_of(self.folder, self.number)
            target.mkdir(exist_ok=True)
            # the layers outside the blocks come in two parts
            store.write_segment(target, segment, self._kept(self.number, segment) | kept, {})

    def _is_lost(self, layer: Layer, source: Layer) -> bool:
        """Whether a layer that this stage quantized was not the original's before."""
        is_new = layer.format is not None and self.model.structure.layers[layer.name].format is None
        if not is_new or layer.name not in self.later:
            return False
        first = self.original.layer(self.original.structure.layers[layer.name])
        return not torch.equal(first.float_weight(), source.float_weight())

    def _earlier(self, segment: int) -> dict[str, Layer]:
        """All that earlier stages kept of a segment."""
        if self._read is None or self._read[0] != segment:
            found: dict[str, Layer] = {}
            for number in range(self.number):
                found |= self._kept(number, segment)
            self._read = segment, found
        return self._read[1]

    def _kept(self, number: int, segment: int) -> dict[str, Layer]:
        folder = folder_of(self.folder, number)
        if not (folder / store.segment_file(segment)).is_file():
            return {}
        layers_only = replace(self.original.structure, plain={segment: ()})
        return store.read_segment(folder, segment, layers_only)[0]


def folder_of(folder: Path, number: int) -> Path:
    """Where a stage keeps the weights that it rounded."""
    return folder / f"source-{number}"
