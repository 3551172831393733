"""The last weights of a model of which no pass had lost anything: what the report's errors are taken against."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from compress.engine import segment_files, store
from compress.layer import Layer
from compress.models.model import Model


@dataclass
class Sources:
    """What each layer was before any pass lost something of it, as one stage asks for it.

    A layer that no lossy pass (`LOSSY`) has treated when the stage begins is its own source. That of any other is the
    original's, unless a pass rescaled or turned the weight before: such a weight is nowhere else, so the stage that
    first loses something of it keeps it in `source-N/`, in files like the store's, for the stages after.

    original: the source model, laid out as the recipe treats it; folder: where `source-N/` are; number: of the stage;
    before, now, later: layers that lossy passes of earlier stages, those of this one, any passes of later ones treat.
    """

    original: Model
    folder: Path
    number: int
    before: Collection[str]
    now: Collection[str]
    later: Collection[str]
    _read: tuple[int, dict[str, Layer]] | None = field(default=None, repr=False)

    def of(self, layer: Layer) -> Layer:
        """A layer as the stage received it → the same before any pass lost something of it."""
        if layer.name not in self.before:
            return layer
        spec = self.original.structure.layers[layer.name]
        kept = self._earlier(spec.segment)
        return kept[layer.name] if layer.name in kept else self.original.layer(spec)

    def keep(self, segment: int, sources: Mapping[str, Layer]) -> None:
        """Keep what later stages cannot read elsewhere. Comes before the segment is noted as finished.

        Args: sources: layers of the segment, each before any pass lost something of it.
        """
        kept = {name: source for name, source in sources.items() if self._is_lost(name, source)}
        if kept:
            target = folder_of(self.folder, self.number)
            target.mkdir(exist_ok=True)
            # the layers outside the blocks come in two parts
            segment_files.write_segment(target, segment, self._kept(self.number, segment) | kept, {})

    def _is_lost(self, name: str, source: Layer) -> bool:
        """Whether a layer that this stage is the first to lose something of was not the original's before."""
        if name not in self.now or name in self.before or name not in self.later:
            return False
        first = self.original.layer(self.original.structure.layers[name])
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
        if not (folder / segment_files.segment_file(segment)).is_file():
            return {}
        layers_only = replace(self.original.structure, plain={segment: ()})
        return store.read_segment(folder, segment, layers_only)[0]


def folder_of(folder: Path, number: int) -> Path:
    """Where a stage keeps the weights that it rounded."""
    return folder / f"source-{number}"
