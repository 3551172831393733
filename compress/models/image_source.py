"""`ImageSource`: what the engine knows of a model that takes images, or any samples of a row each, whatever it is made
of. A sample that is no image is one row of all its inputs (compress/models/onnx_interface.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from compress.hwprofiles import Profile
from compress.models.onnx_interface import Interface
from compress.models.reader import Reader
from compress.models.skeleton import Structure
from compress.models.user_module import Preprocess

BLOCK = ""
"""The one block is the module itself."""

Row = tuple[int, ...]
"""The shape of a sample: (channels, h, w) of an image, else (width,)."""


def fitting(profile: Profile, image: ImageSource | None) -> Profile:
    """The profile, its grid cut to the one batch, or the one length of a text, that a model takes where it takes no
    other."""
    if image is None or not (image.batch or image.fixed_length):
        return profile
    cells = (*profile.grid.prefill, *profile.grid.decode)
    batches = [image.batch] if image.batch else sorted({batch for batch, _ in cells})
    lengths = [image.fixed_length] if image.fixed_length or not image.longest else sorted({each for _, each in cells})
    prefill = tuple((batch, length or 1) for batch in batches for length in lengths)
    grid = profile.grid.model_copy(update={"prefill": prefill, "decode": ()})
    return profile.model_copy(update={"grid": grid})


def timed_shape(image: ImageSource | None) -> Row | None:
    """Of the rows that a model is timed with; None for one of tokens, which texts of the grid's lengths are."""
    return None if image is None or image.longest else image.shape


class OfImages:
    """What is the same of all that takes images and puts out the logits of classes."""

    classes: int

    @property
    def is_image(self) -> bool:
        """Always."""
        return True

    @property
    def vocabulary(self) -> int:
        """It takes no texts."""
        return 0

    longest = fixed_length = vocabulary
    interface: ClassVar[None] = None

    def sizes(self, row: Row) -> tuple[int, ...]:
        """The logits."""
        return (self.classes,)

    def noise(self, count: int, row: Row) -> Tensor:
        """Normal, which is what normalised images look like in scale."""
        return torch.randn(count, *row, generator=torch.Generator().manual_seed(0))

    def side_files(self) -> Sequence[Path]:
        """None."""
        return ()


class ImageSource(Protocol):
    """A module of the user's own code (compress/models/image_model.py), or an ONNX graph
    (compress/models/onnx_model.py)."""

    @property
    def shape(self) -> Row:
        """Of a sample, at its usual length where it may have any."""
        ...

    @property
    def interface(self) -> Interface | None:
        """What the graph takes and gives, where it was given as ONNX."""
        ...

    @property
    def is_image(self) -> bool:
        """Whether a sample is an image (channels, h, w)."""
        ...

    @property
    def vocabulary(self) -> int:
        """Token ids are below it; 0 where it takes no texts."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest text that it takes; 0 where it takes none."""
        ...

    @property
    def fixed_length(self) -> int:
        """Tokens of all texts, where there is no other length; else 0."""
        ...

    def sizes(self, row: Row) -> tuple[int, ...]:
        """How many numbers each output has for a sample of a shape."""
        ...

    def noise(self, count: int, row: Row) -> Tensor:
        """Made-up samples of a shape, the same each time."""
        ...

    def side_files(self) -> Sequence[Path]:
        """What turns texts into samples."""
        ...

    @property
    def classes(self) -> int:
        """Numbers per image that it puts out."""
        ...

    @property
    def outputs(self) -> tuple[tuple[str, int], ...]:
        """Name and size for an image of each output, in whose order they stand in a row."""
        ...

    @property
    def labelled(self) -> bool:
        """Whether these are the logits of classes, so that images need labels."""
        ...

    @property
    def input(self) -> str:
        """The name of its images in an .npz, beside `images`."""
        ...

    @property
    def preprocess(self) -> Preprocess:
        """What pixels go through."""
        ...

    @property
    def multiplications(self) -> int:
        """Per image, in all layers."""
        ...

    @property
    def graph(self) -> bytes:
        """With placeholders for its layers, where it was given as ONNX; empty where a module is traced for it."""
        ...

    @property
    def kept_bytes(self) -> int:
        """Of what `keep` writes, and an exported graph holds, beside the weights."""
        ...

    @property
    def batch(self) -> int:
        """How many images it takes at once; 0 for any number."""
        ...

    def skeleton(self) -> nn.Module:
        """The module tree with parameters on `meta`."""
        ...

    def keep(self, folder: Path) -> dict[str, Any]:
        """Write what a store needs besides the weights, and give what finds it again, JSON-able."""
        ...

    def described(self) -> dict[str, Any]:
        """The preprocessing.json of an exported folder."""
        ...


Source = TypeVar("Source", bound=ImageSource, covariant=True)


@dataclass(frozen=True)
class Opened(Generic[Source]):
    """A source, ready to be a Model. digest: of its files, its preprocessing and, of a module, its tensors."""

    image: Source
    structure: Structure
    reader: Reader
    digest: str
    notes: tuple[str, ...]
