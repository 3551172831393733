"""`ImageSource`: what the engine knows of a model that takes images, whatever it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import nn

from compress.hwprofiles import Profile
from compress.user_module import Preprocess


def fitting(profile: Profile, image: ImageSource | None) -> Profile:
    """The profile, its grid cut to the one batch that a model takes where it takes no other."""
    if image is None or not image.batch:
        return profile
    grid = profile.grid.model_copy(update={"prefill": ((image.batch, 1),), "decode": ()})
    return profile.model_copy(update={"grid": grid})


class ImageSource(Protocol):
    """A module of the user's own code (compress/image_model.py), or an ONNX graph (compress/onnx_model.py)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, h, w) of an image."""
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
