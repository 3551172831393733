"""Calibration and quality data: files → token windows, split by document, with digests (design §7).

An image classifier takes labelled images instead, which compress/inputs/images.py reads, and an ONNX graph of other
inputs arrays or texts, which compress/inputs/arrays.py does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress import defaults
from compress.errors import InputError, UsageError
from compress.inputs import images, windows
from compress.inputs.arrays import read_arrays
from compress.inputs.documents import read_documents
from compress.inputs.images import Images
from compress.inputs.windows import Windows, choose, cut_windows, join
from compress.inputs.windows import check_disjoint as check_windows
from compress.models.embedding import FEWEST_NEIGHBOURS
from compress.models.model import Model, Task

Samples = Windows | Images
"""What a model is calibrated or judged on."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """The windows or images that statistics are taken over, the seed that chose them, and the type that the model's
    blocks compute in meanwhile (statistics are added up in float32 all the same).

    rest: what the choice left of the same data, for passes that train the whole model on much of it; None where they
    were not asked for, or nothing was left.
    """

    windows: Samples
    seed: int
    source: str
    dtype: torch.dtype = torch.float32
    rest: Samples | None = None

    def batches(self) -> list[Tensor]:
        """As `Windows.batches`."""
        return self.windows.batches()

    def summary(self) -> dict[str, str | int]:
        """For the report and the manifest."""
        return {
            "source": self.source,
            **self.windows.size(),
            "seed": self.seed,
            "digest": self.windows.digest,
            "dtype": str(self.dtype).removeprefix("torch."),
            **({} if self.rest is None else {"rest_digest": self.rest.digest, **self._rest_size()}),
        }

    def _rest_size(self) -> dict[str, str | int]:
        """How many windows or images are left for training."""
        assert self.rest is not None
        return {f"rest_{unit}": count for unit, count in self.rest.size().items() if unit in ("windows", "images")}


def tokenize(documents: list[str] | list[list[int]], model: Model, source: str) -> list[list[int]]:
    """Documents as ids; special tokens are added for an encoder, whose documents are sentences, and for no other.

    Raises: UsageError for text without a tokenizer, InputError for ids outside the vocabulary.
    """
    if isinstance(documents[0], str):
        tokenizer = model.tokenizer()
        if tokenizer is None:
            raise UsageError(
                f"{source} holds text, but {model.source} has no tokenizer. Put tokenizer.json beside the weights, or "
                "give token ids (.json lists, or .jsonl with 'ids')."
            )
        special = model.task is Task.ENCODER
        documents = [tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"] for text in documents]
    vocabulary = model.vocabulary
    for place, ids in enumerate(documents):
        worst = max((token for token in ids if isinstance(token, int)), default=0)
        if worst >= vocabulary:
            raise InputError(
                f"{source}: document {place} holds token {worst}, but the vocabulary has {vocabulary}. "
                "Was it tokenized for another model?"
            )
    return documents  # type: ignore[return-value]


def _pieces(model: Model, documents: list[list[int]], length: int, source: str) -> Windows:
    """Calibration windows: an encoder takes documents one by one, for all others they are joined first."""
    if model.task is Task.ENCODER:
        return cut_windows(documents, length, source, short=True)
    return cut_windows(join(documents), length, source)


def _read_rows(model: Model, source: str | Path, length: int) -> Images:
    """All samples of a model that takes a row each."""
    assert model.image is not None
    if model.image.is_image:
        return images.read_images(source, model.image)
    return read_arrays(source, model.image, model.path, length)


def calibrate(
    model: Model,
    source: str | Path,
    *,
    samples: int | None = None,
    length: int = defaults.LENGTH,
    seed: int = 0,
    rest: bool = False,
) -> Calibration:
    """Calibration windows, or images, from a whole file.

    Args: samples: None for 128 windows or 512 images; rest: whether the others are kept, to train on.
    """
    if model.image is not None:
        return _calibration(_read_rows(model, source, length), source, samples, seed, rest)
    documents = tokenize(read_documents(source), model, str(source))
    return _calibration(_pieces(model, documents, _fitting(model, length), str(source)), source, samples, seed, rest)


def _calibration(found: Samples, source: str | Path, samples: int | None, seed: int, rest: bool) -> Calibration:
    """Some of the windows or images, and the others beside them."""
    left: Samples | None
    if isinstance(found, Images):
        count = samples or defaults.IMAGES
        chosen: Samples = images.choose(found, count, seed)
        left = images.rest(found, count, seed) if rest else None
    else:
        count = samples or defaults.SAMPLES
        chosen = choose(found, count, seed)
        left = windows.rest(found, count, seed) if rest else None
    return Calibration(chosen, seed, Path(source).name, rest=left)


def quality_windows(
    model: Model, source: str | Path, *, samples: int | None = None, length: int = defaults.LENGTH, seed: int = 0
) -> Samples:
    """Evaluation windows, or images, from a whole file.

    Raises: UsageError where they are too few to judge the model by.
    """
    if model.image is not None:
        return images.choose(_read_rows(model, source, length), samples, seed)
    documents = tokenize(read_documents(source), model, str(source))
    return _judging(model, documents, str(source), samples, length, seed)


def _judging(
    model: Model, documents: Sequence[list[int]], source: str, samples: int | None, length: int, seed: int
) -> Windows:
    found = cut_windows(documents, _fitting(model, length), source, short=model.task is Task.ENCODER)
    found = found if samples is None else choose(found, samples, seed)
    count, length = found.ids.shape
    if model.task is Task.ENCODER and count < FEWEST_NEIGHBOURS:
        raise UsageError(
            f"{source}: {count} quality window(s) of {length} tokens. An encoder is judged by nearest neighbours, "
            f"which takes at least {FEWEST_NEIGHBOURS}. Give more text, more --quality-samples, or a smaller --length."
        )
    return found


def split(
    model: Model,
    source: str | Path,
    *,
    samples: int | None,
    quality_samples: int | None,
    length: int,
    seed: int,
    quality_length: int | None = None,
    rest: bool = False,
) -> tuple[Calibration, Samples]:
    """One file for both: documents, or images, are dealt 80/20 by seed; a single text is cut once, at 80 % of its
    tokens.

    Args: samples, rest: as `calibrate`; quality_length: tokens per quality window, `length` where it is not given.
    Raises: UsageError when a run of tokens, or an image, would be in both parts (`check_disjoint`).
    """
    if model.image is not None:
        found = _read_rows(model, source, length)
        first, second = images.split(found, str(source), quality_samples=quality_samples, seed=seed)
        made = _calibration(first, source, samples, seed, rest)
        check_calibration(made, second)
        return made, second
    documents = tokenize(read_documents(source), model, str(source))
    length = _fitting(model, length)
    if len(documents) == 1:
        cut = len(documents[0]) * 4 // 5 // length * length
        _require_both(source, len(documents[0]), cut, length)
        known, unseen = [documents[0][:cut]], [documents[0][cut:]]
    else:
        if model.task is Task.ENCODER:  # short documents repeat: each goes to one part
            documents = list({tuple(ids): ids for ids in documents}.values())
        order = list(range(len(documents)))
        random.Random(seed).shuffle(order)
        held = set(order[: max(1, len(order) // 5)])
        known = [ids for place, ids in enumerate(documents) if place not in held]
        unseen = [ids for place, ids in enumerate(documents) if place in held]
    calibration = _calibration(_pieces(model, known, length, str(source)), source, samples, seed, rest)
    quality = _judging(model, unseen, str(source), quality_samples, quality_length or length, seed)
    check_calibration(calibration, quality)
    return calibration, quality


def _require_both(source: str | Path, found: int, cut: int, length: int) -> None:
    """Raises: UsageError where one text is too short for a window in each part."""
    if cut == 0 or found - cut < length:
        raise UsageError(
            f"{source}: its {found} tokens are one document, too short to be split 80/20 into windows of {length} "
            "tokens with one in each part. Give more text, or a smaller --length."
        )


def check_calibration(calibration: Calibration, quality: Samples) -> None:
    """`check_disjoint` for all that statistics are taken over or that is trained on."""
    for part in (calibration.windows, calibration.rest):
        if part is not None:
            check_disjoint(part, quality)


def check_disjoint(calibration: Samples, quality: Samples) -> None:
    """Raises: UsageError when as many tokens in a row as the shorter window holds are in both, at whatever offset; or
    an image is."""
    if isinstance(calibration, Images) or isinstance(quality, Images):
        assert isinstance(calibration, Images) and isinstance(quality, Images)
        images.check_disjoint(calibration, quality)
        return
    check_windows(calibration, quality)


def _fitting(model: Model, length: int) -> int:
    return min(length, model.longest)
