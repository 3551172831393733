"""Images for calibration and quality: files → pixels with labels, split by image, with digests (design §7)."""

from __future__ import annotations

import hashlib
import random
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import InputError, UnsupportedError, UsageError
from compress.inputs.npz import load_npz
from compress.inputs.windows import chosen
from compress.models.image_source import ImageSource, Row
from compress.models.user_module import Preprocess

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[Any]
KINDS = ".npz (images, labels), or a folder with one folder of images per class"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
MOST_PIXELS = 1 << 27
"""Of an image that was resized by its shorter side: a strip of one pixel's height would grow without end."""
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error)
# Images that go through a model at once: fixed, since an activation grid that is fitted per call sees all of them.
BATCH = 32


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images: pixels (N, channels, h, w), uint8 as stored or float32 as the model takes them; labels (N,)
    int64; preprocess: what uint8 goes through."""

    pixels: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    preprocess: Preprocess
    digest: str
    unit: ClassVar[str] = "image"

    @classmethod
    def of(cls, pixels: Tensor, labels: Tensor, preprocess: Preprocess) -> Images:
        """With the digest of both."""
        digest = hashlib.sha256(str(pixels.dtype).encode() + pixels.numpy().tobytes() + labels.numpy().tobytes())
        return cls(pixels, labels, preprocess, digest.hexdigest())

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def preprocessing(self) -> str:
        """What turns the pixels into inputs, for the report."""
        return self.preprocess.text if self.pixels.dtype == torch.uint8 else "none: stored as floats"

    @property
    def protocol(self) -> str:
        """How they are judged."""
        return f"top1/batch-{BATCH}, preprocessing {self.preprocessing}"

    def batches(self) -> list[Tensor]:
        """Inputs (n, channels, h, w) float32 in order."""
        return [self.inputs(start) for start in range(0, len(self), BATCH)]

    def inputs(self, start: int) -> Tensor:
        """The batch that begins at an image, as the model takes it, float32."""
        pixels = self.pixels[start : start + BATCH]
        return self.preprocess(pixels) if pixels.dtype == torch.uint8 else pixels.float()

    def size(self) -> dict[str, str | int]:
        """For the report: how many, and their preprocessing."""
        return {"images": len(self), "preprocessing": self.preprocessing}

    def at(self, places: Sequence[int]) -> Images:
        """Some of them."""
        index = torch.tensor(list(places), dtype=torch.int64)
        return Images.of(self.pixels[index], self.labels[index], self.preprocess)


def read_images(source: str | Path, image: ImageSource) -> Images:
    """All labelled images of a file or folder.

    Raises: UsageError for what is not there or of another kind, InputError for a malformed file or images that do not
    fit the model, UnsupportedError where a library is missing.
    """
    path = Path(source)
    if path.is_dir():
        pixels, labels = _read_folder(path, image.shape, image.labelled)
        return _checked(path, pixels, labels, image)
    if not path.is_file():
        raise UsageError(f"No such data: {path}. Allowed for an image classifier: {KINDS}.")
    if path.suffix != ".npz":
        raise UsageError(
            f"{path}: data of this kind is not read for an image classifier. Allowed: {KINDS}. Arrays become such a "
            'file by numpy.savez("images.npz", images=images, labels=labels).'
        )

    def choose(there: Sequence[str]) -> list[str]:
        wanted = ["images" if "images" in there else image.input, *(["labels"] if image.labelled else [])]
        missing = [name for name in wanted if name not in there]
        if missing:
            names = ", ".join(there) or "nothing"
            raise InputError(f"{path} has no array '{missing[0]}'; it holds {names}. Wanted: {', '.join(wanted)}.")
        return wanted

    found = load_npz(path, choose)
    images = found["images"] if "images" in found else found[image.input]
    labels = found["labels"] if image.labelled else np.zeros(len(images), np.int64)
    return _checked(path, laid_out(path, images, image.shape), labels, image)


def laid_out(path: Path, images: Pixels, shape: Row) -> Pixels:
    """(N, channels, h, w), uint8 or float32, whichever way they are stored."""
    channels, height, width = shape
    if images.ndim == 3 and channels == 1:
        images = images[:, None]
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise InputError(f"{path}: images are {images.dtype}. Give uint8 pixels, or floats as the model takes them.")
    if images.ndim == 4 and images.shape[1:] != shape and images.shape[1:] == (height, width, channels):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1:] != shape:
        raise InputError(
            f"{path}: images are {images.shape}, but the model takes (channels, h, w) = {shape}. Resize them, and "
            "store them as (N, h, w, channels) or (N, channels, h, w)."
        )
    return np.ascontiguousarray(images if images.dtype == np.uint8 else images.astype(np.float32))


def _checked(path: Path, pixels: Pixels, labels: Pixels, image: ImageSource) -> Images:
    if labels.shape != (len(pixels),) or not np.issubdtype(labels.dtype, np.integer) or not len(labels):
        found = f"{labels.dtype} {labels.shape}"
        raise InputError(f"{path}: {len(pixels)} images, but labels are {found}; one integer each is wanted.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= image.classes:
        raise InputError(f"{path}: labels lie in {low} to {high}, but the model has {image.classes} classes (from 0).")
    if pixels.dtype != np.uint8 and not np.isfinite(pixels).all():
        raise InputError(f"{path}: images hold NaN or infinite values.")
    return Images.of(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)), image.preprocess)


def _read_folder(folder: Path, shape: Row, labelled: bool) -> tuple[Pixels, Pixels]:
    """Classes are the folders in order of name; without labels all images below the folder are taken."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir()) if labelled else [folder]
    files = [(path, place) for place, each in enumerate(classes) for path in sorted(each.rglob("*"))]
    files = [(path, place) for path, place in files if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not files:
        where = " in a folder per class" if labelled else ""
        raise InputError(f"{folder} holds no images{where} ({', '.join(SUFFIXES)}).")
    return read_files([path for path, _ in files], shape), np.array([place for _, place in files], np.int64)


def read_files(files: Sequence[Path], shape: Row) -> Pixels:
    """Pixels (n, channels, h, w) uint8 of image files, each resized and cut. Of what Pillow reads only kinds of pixels
    are tried: it hands PostScript to a program. Raises: InputError, UnsupportedError where Pillow is missing."""
    try:
        import PIL.Image
    except ImportError as error:
        raise UnsupportedError(
            f"{files[0]}: image files are read with Pillow, which is not installed. Install it: pip install pillow."
        ) from error
    pixels = np.empty((len(files), *shape), np.uint8)
    for row, path in enumerate(files):
        try:
            with PIL.Image.open(path, formats=FORMATS) as picture:
                pixels[row] = cropped(picture, shape)
        except (*_BROKEN, PIL.Image.DecompressionBombError) as error:
            raise InputError(f"{path} cannot be read as an image ({error}).") from error
    return pixels


def cropped(picture: Image, shape: Row) -> Pixels:
    """(channels, h, w): the shorter side resized to fit (bilinear), the middle cut out."""
    channels, height, width = shape
    if channels not in (1, 3):
        raise UnsupportedError(f"Image files give 1 or 3 channels; the model takes {channels}. Give an .npz.")
    scale = max(height / picture.height, width / picture.width)
    size = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    if size[0] * size[1] > MOST_PIXELS:
        raise ValueError(f"{picture.width} x {picture.height} pixels, which would be resized to {size[0]} x {size[1]}")
    picture = picture.convert("L" if channels == 1 else "RGB")
    picture = picture.resize(size, resample=2) if size != picture.size else picture  # 2: bilinear
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    pixels = np.asarray(picture.crop((left, top, left + width, top + height)))
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def choose(images: Images, count: int | None, seed: int) -> Images:
    """At most `count` images (None: all), drawn without replacement, in their order."""
    if count is None or len(images) <= count:
        return images
    return images.at(chosen(len(images), count, seed))


def rest(images: Images, count: int, seed: int) -> Images | None:
    """What `choose` leaves of them, None where that is nothing."""
    taken = set(chosen(len(images), count, seed))
    left = [place for place in range(len(images)) if place not in taken]
    return images.at(left) if left else None


def split(images: Images, source: str, *, quality_samples: int | None, seed: int) -> tuple[Images, Images]:
    """One source for both: distinct images are dealt 80/20 by seed, copies of an image to the same side. All of the
    first side are given, for calibration to choose from.

    Raises: UsageError where there are too few.
    """
    marks = fingerprints(images)
    distinct = sorted(set(marks))
    if len(distinct) < 5:
        raise UsageError(
            f"{source}: {len(distinct)} distinct {images.unit}(s) are too few to split 80/20. Give 5 or more."
        )
    random.Random(seed).shuffle(distinct)
    held = set(distinct[: max(1, len(distinct) // 5)])
    first = images.at([place for place, mark in enumerate(marks) if mark not in held])
    second = images.at([place for place, mark in enumerate(marks) if mark in held])
    return first, choose(second, quality_samples, seed)


def fingerprints(images: Images) -> list[bytes]:
    """A hash of each image's pixels."""
    return [hashlib.sha256(image.numpy().tobytes()).digest() for image in images.pixels]


def check_disjoint(calibration: Images, quality: Images) -> None:
    """Raises: UsageError where an image is in both, pixel by pixel."""
    known = set(fingerprints(calibration))
    leaks = [place for place, mark in enumerate(fingerprints(quality)) if mark in known]
    if leaks:
        raise UsageError(
            f"{len(leaks)} of {len(quality)} quality {quality.unit}s are in the calibration data too, which would "
            f"flatter the result. First: quality {quality.unit} {leaks[0]}. Give different {quality.unit}s, or one "
            "file, which is split."
        )
