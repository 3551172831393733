"""The forward stream of an image classifier: one block, which is the whole module, from images to logits."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from compress.engine.layer_stats import LayerStats, Stat
from compress.engine.stream import BlockRunner, BlockStream, collected
from compress.errors import InputError
from compress.layer import Layer
from compress.maths import products
from compress.models import placing
from compress.models.model import Model
from compress.models.placing import whole_module


class ImageStream:
    """As `BlockStream`, with batches of images (n, channels, h, w) float32 in place of hidden states.

    `hidden` holds the images, and after `advance` the logits. The reference stream enters the one block with the same
    images, so only its targets differ, and there is no mismatch (`Stat.CROSS`) to collect.
    """

    def __init__(
        self,
        model: Model,
        batches: Sequence[Tensor],
        *,
        device: str = "cpu",
        reference: bool = False,
    ) -> None:
        self.model = model
        self.device = torch.device(device)
        self.module = model.skeleton()
        self.hidden: list[Tensor] = list(batches)
        self.targets: list[Tensor] = []
        self.outer: Mapping[str, Layer] = {}
        self._with_reference = reference

    def start(self, outer: Mapping[str, Layer]) -> None:
        """Nothing is outside the block."""

    def load(self, index: int, layers: Mapping[str, Layer], plain: Mapping[str, Tensor]) -> None:
        """Put the weights in place."""
        for layer in layers.values():
            placing.put_layer(self.module, layer)
        placing.put_plain(self.module, plain, self.model.structure.aliases)
        self.module.to(self.device)

    def put(self, layer: Layer) -> None:
        """Replace one layer."""
        placing.put_layer(self.module, layer)
        for user in layer.users:
            self.module.get_submodule(user).to(self.device)

    def release(self, index: int) -> None:
        """Give the memory back."""
        placing.release(self.module, self.model.structure.blocks[index])

    @property
    def reference(self) -> list[Tensor]:
        """What enters the one block in the reference stream: the same images."""
        return self.hidden

    def call(self, index: int, images: Tensor) -> Tensor:
        """Logits (n, classes) of a batch. Keeps gradients."""
        result: Tensor = self.module(images.to(self.device))
        return result

    def look_ahead(self, index: int) -> None:
        """Note what the module, still as the stage received it, puts out."""
        if self._with_reference:
            self.targets = [self._logits(images) for images in self.hidden]

    def _logits(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.call(0, images).float().cpu()

    def runner(self, index: int) -> BlockRunner:
        """The module for a block pass."""
        return BlockRunner(self, index)

    def advance(self, index: int) -> None:
        """Run the module on every batch. Raises: InputError where it puts out NaN or infinite values."""
        outputs = [self._logits(images) for images in self.hidden]
        if not all(map(products.all_finite, outputs)):
            raise InputError("The model puts out NaN or infinite values. The run stops here; check model and recipe.")
        self.hidden = outputs

    def collect(
        self,
        index: int,
        names: Iterable[str],
        wants: Collection[Stat],
        guides: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> dict[str, LayerStats]:
        """Statistics of the inputs of some layers. Args: guides: see `Collector`; there are none of images."""
        return collected(self, index, names, wants, guides)

    def collect_head(self, names: Iterable[str], wants: Collection[Stat]) -> dict[str, LayerStats]:
        """No layer is outside the block."""
        return {}

    def logits(self) -> Iterator[Tensor]:
        """The logits of each batch, after `advance`."""
        yield from self.hidden


Stream = BlockStream | ImageStream


def open_stream(
    model: Model,
    batches: Sequence[Tensor],
    *,
    device: str = "cpu",
    spill: Path | None = None,
    reference: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Stream:
    """The stream for a model's kind. Args: see `BlockStream`; for an image classifier batches of images."""
    if model.image is not None:
        return ImageStream(model, batches, device=device, reference=reference)
    return BlockStream(model, batches, device=device, spill=spill, reference=reference, dtype=dtype)


def wiring_batch(model: Model) -> Tensor:
    """The least input that shows how layers are wired."""
    if model.image is not None:
        return torch.zeros(1, *model.image.shape)
    return torch.zeros(1, 2, dtype=torch.int64)


def image_logits(model: Model, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Logits (n, classes) float32 of each batch of images."""
    module = whole_module(model)
    for images in batches:
        with torch.no_grad():
            logits = module(images).float()
        yield logits  # outside: whoever takes it keeps its own mode
