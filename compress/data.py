"""Calibration and quality data: files → token windows, split by document, with digests (design §7).

An image classifier takes labelled images instead, which compress/images.py reads.
"""

from __future__ import annotations

import gzip
import importlib
import json
import lzma
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import images
from compress.errors import InputError, UsageError
from compress.images import CALIBRATION_SAMPLES, Images
from compress.model import Model, Task
from compress.quality import FEWEST_NEIGHBOURS
from compress.windows import Windows, choose, cut_windows, join
from compress.windows import check_disjoint as check_windows

__all__ = ["Calibration", "Samples", "Windows", "calibrate", "check_disjoint", "choose", "cut_windows", "join"]
__all__ += ["quality_windows", "read_documents", "split", "tokenize"]

CALIBRATION_WINDOWS = 128
SUFFIXES = (".txt", ".jsonl", ".json")
KINDS = ".txt, .jsonl (text or ids), .json (lists of ids), each also .gz or .xz, or module:callable"


Samples = Windows | Images
"""What a model is calibrated or judged on."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """The windows or images that statistics are taken over, the seed that chose them, and the type that the model's
    blocks compute in meanwhile (statistics are added up in float32 all the same)."""

    windows: Samples
    seed: int
    source: str
    dtype: torch.dtype = torch.float32

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
        }


def read_documents(source: str | Path) -> list[str] | list[list[int]]:
    """Texts, or lists of token ids, in file order.

    Raises: UsageError for a missing file or unknown kind, InputError for a malformed one.
    """
    if ":" in str(source) and not Path(source).exists():
        return _from_callable(str(source))
    path = Path(source)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; data are one file. Allowed: {KINDS}.")
    if not path.is_file():
        raise UsageError(f"No such data file: {path}. Allowed: {KINDS}.")
    name = path.name.removesuffix(".gz").removesuffix(".xz")
    if not name.endswith(SUFFIXES):
        raise UsageError(f"{path}: data of this kind is not read. Allowed: {KINDS}.")
    try:
        text = _read_text(path)
        if name.endswith(".txt"):
            documents: list[Any] = [text]
        elif name.endswith(".jsonl"):
            documents = [_from_row(_parsed(line, place, path), path) for place, line in _lines(text)]
        else:
            documents = json.loads(text)
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}). Allowed: {KINDS}, UTF-8.") from error
    checked: list[str] | list[list[int]] = _checked(documents, path)
    return checked


def _read_text(path: Path) -> str:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "rb") as stream:
        content: bytes = stream.read()
    return content.decode("utf8")


def _lines(text: str) -> list[tuple[int, str]]:
    """Lines that are not blank, by number. JSON strings may hold U+2028 and the like, where `splitlines` cuts."""
    return [(place, line) for place, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parsed(line: str, place: int, path: Path) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}, line {place}, is not JSON ({error}). Each line is an object or is blank.") from error


def _from_row(row: Any, path: Path) -> Any:
    if isinstance(row, dict) and ("text" in row or "ids" in row):
        return row.get("text", row.get("ids"))
    raise InputError(f"{path}: each line must be an object with 'text' or 'ids', found {str(row)[:60]!r}.")


def _from_callable(source: str) -> list[Any]:
    """What a function of the user's returns."""
    module, _, name = source.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"No such data: {source} is neither a file nor module:callable ({error}).") from error
    documents: list[Any] = _checked(list(function()), Path(source))
    return documents


def _checked(documents: Any, path: Path) -> Any:
    is_text = isinstance(documents, list) and all(isinstance(item, str) for item in documents)
    is_ids = isinstance(documents, list) and all(
        isinstance(item, list) and all(type(token) is int and token >= 0 for token in item) for item in documents
    )
    if not (is_text or is_ids) or not documents:
        raise InputError(f"{path}: expected texts, or lists of token ids (whole numbers from 0), and at least one.")
    return documents


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


def calibrate(
    model: Model, source: str | Path, *, samples: int | None = None, length: int = 512, seed: int = 0
) -> Calibration:
    """Calibration windows, or images, from a whole file. samples: None for 128 windows or 512 images."""
    if model.image is not None:
        chosen = images.choose(images.read_images(source, model.image), samples or CALIBRATION_SAMPLES, seed)
        return Calibration(chosen, seed, Path(source).name)
    documents = tokenize(read_documents(source), model, str(source))
    windows = _pieces(model, documents, _fitting(model, length), str(source))
    return Calibration(choose(windows, samples or CALIBRATION_WINDOWS, seed), seed, Path(source).name)


def quality_windows(
    model: Model, source: str | Path, *, samples: int | None = None, length: int = 512, seed: int = 0
) -> Samples:
    """Evaluation windows, or images, from a whole file.

    Raises: UsageError where they are too few to judge the model by.
    """
    if model.image is not None:
        return images.choose(images.read_images(source, model.image), samples, seed)
    documents = tokenize(read_documents(source), model, str(source))
    return _judging(model, documents, str(source), samples, length, seed)


def _judging(
    model: Model, documents: Sequence[list[int]], source: str, samples: int | None, length: int, seed: int
) -> Windows:
    windows = cut_windows(documents, _fitting(model, length), source, short=model.task is Task.ENCODER)
    windows = windows if samples is None else choose(windows, samples, seed)
    count, length = windows.ids.shape
    if model.task is Task.ENCODER and count < FEWEST_NEIGHBOURS:
        raise UsageError(
            f"{source}: {count} quality window(s) of {length} tokens. An encoder is judged by nearest neighbours, "
            f"which takes at least {FEWEST_NEIGHBOURS}. Give more text, more --quality-samples, or a smaller --length."
        )
    return windows


def split(
    model: Model,
    source: str | Path,
    *,
    samples: int | None,
    quality_samples: int | None,
    length: int,
    seed: int,
    quality_length: int | None = None,
) -> tuple[Calibration, Samples]:
    """One file for both: documents, or images, are dealt 80/20 by seed; a single text is cut once, at 80 % of its
    tokens.

    Args: samples: as `calibrate`; quality_length: tokens per quality window, `length` where it is not given.
    Raises: UsageError when a run of tokens, or an image, would be in both parts (`check_disjoint`).
    """
    if model.image is not None:
        found, count = images.read_images(source, model.image), samples or CALIBRATION_SAMPLES
        first, second = images.split(found, str(source), samples=count, quality_samples=quality_samples, seed=seed)
        check_disjoint(first, second)
        return Calibration(first, seed, Path(source).name), second
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
    calibration = choose(_pieces(model, known, length, str(source)), samples or CALIBRATION_WINDOWS, seed)
    quality = _judging(model, unseen, str(source), quality_samples, quality_length or length, seed)
    check_disjoint(calibration, quality)
    return Calibration(calibration, seed, Path(source).name), quality


def _require_both(source: str | Path, found: int, cut: int, length: int) -> None:
    """Raises: UsageError where one text is too short for a window in each part."""
    if cut == 0 or found - cut < length:
        raise UsageError(
            f"{source}: its {found} tokens are one document, too short to be split 80/20 into windows of {length} "
            "tokens with one in each part. Give more text, or a smaller --length."
        )


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
