"""Unlabelled images for an exported classifier: what preprocessing.json says, and files → inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import InputError, UsageError, unread
from compress.files import read_json
from compress.inputs.images import SUFFIXES, laid_out, read_files
from compress.inputs.npz import load_npz

NAME = "preprocessing.json"
KINDS = f"an image ({', '.join(SUFFIXES)}), a folder of them, or an .npz with an array 'images'"


@dataclass(frozen=True)
class ImageInput:
    """What an exported classifier takes. shape: (channels, h, w); classes: logits per image; text: how pixels become
    inputs; mean, std: per channel, empty where there are none, or where a function of the user's does it; outputs: name
    and shape for an image of each, of a model that was given as ONNX."""

    shape: tuple[int, int, int]
    classes: int
    text: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    outputs: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @classmethod
    def read(cls, folder: Path) -> ImageInput:
        """From the preprocessing.json of an exported folder. Raises: InputError."""
        path = folder / NAME
        try:
            content: dict[str, Any] = read_json(path)
            size, mean, std = content["input"], content["mean"], content["std"]
            made = cls(
                (int(size["channels"]), int(size["height"]), int(size["width"])),
                int(content["output"]["classes"]),
                str(content["preprocessing"]),
                tuple(float(value) for value in mean),
                tuple(float(value) for value in std),
                tuple((str(each["name"]), tuple(map(int, each["shape"]))) for each in content.get("outputs", [])),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} does not say how inputs are made ({unread(error)}). Export the artifact again."
            ) from error
        if {len(made.mean), len(made.std)} - {0, made.shape[0]} or len(made.mean) != len(made.std) or 0.0 in made.std:
            raise InputError(f"{path}: mean and std do not fit {made.shape[0]} channels. Export the artifact again.")
        return made

    def prepare(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        """Inputs (n, channels, h, w) float32 from uint8 pixels of that shape; floats are inputs already.

        Raises: UsageError for whole numbers of another type, or where the preprocessing is a function that the artifact
        does not hold; InputError for NaN.
        """
        if pixels.dtype != np.uint8 and not np.issubdtype(pixels.dtype, np.floating):
            raise UsageError(
                f"Images of {pixels.dtype}: allowed are pixels of uint8 (0 to 255), and floats as the model takes them."
            )
        if pixels.dtype != np.uint8:
            if not bool(np.isfinite(pixels).all()):
                raise InputError("The images hold NaN or infinite values.")
            return pixels.astype(np.float32)
        if not self.mean and self.text != "x / 255":
            raise UsageError(
                f"Pixels go through {self.text}, a function that the artifact does not hold. Give an .npz with float "
                "images that it has made."
            )
        values = pixels.astype(np.float32) / np.float32(255)
        if self.mean:
            mean, std = (np.array(figures, np.float32)[:, None, None] for figures in (self.mean, self.std))
            values = (values - mean) / std
        return values


def read_pictures(source: str | Path, shape: tuple[int, int, int]) -> tuple[list[str], NDArray[Any]]:
    """Names and pixels (n, channels, h, w), uint8 or float32, of an image, a folder of images or an .npz.

    Pictures are resized by their shorter side and cut in the middle, as for calibration. A folder is read with the
    folders in it, in order of name.
    Raises: UsageError for what is not there or of another kind, InputError for a malformed file, UnsupportedError where
    Pillow is missing.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise InputError(f"{path} holds no images ({', '.join(SUFFIXES)}).")
        return [file.relative_to(path).as_posix() for file in files], read_files(files, shape)
    if not path.is_file():
        raise UsageError(f"No such input: {path}. Allowed: {KINDS}.")
    if path.suffix.lower() in SUFFIXES:
        return [path.name], read_files([path], shape)
    if path.suffix != ".npz":
        raise UsageError(f"{path}: input of this kind is not read for an image classifier. Allowed: {KINDS}.")
    pixels = laid_out(path, _array(path), shape)
    if not len(pixels):
        raise InputError(f"{path} holds no images.")
    return [str(place) for place in range(len(pixels))], pixels


def _array(path: Path) -> NDArray[Any]:
    def choose(there: Sequence[str]) -> list[str]:
        if "images" not in there:
            raise InputError(f"{path} has no array 'images'; it holds {', '.join(there) or 'nothing'}.")
        return ["images"]

    return load_npz(path, choose)["images"]
