"""Samples of models that take other than images: an .npz with an array per input, or texts through the tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import InputError, UsageError
from compress.inputs.documents import read_labels, read_lines
from compress.inputs.images import Images
from compress.inputs.npz import load_npz
from compress.models.folder import load_tokenizer
from compress.models.image_source import ImageSource
from compress.models.onnx_interface import EXACT, FREE, IDS, MASK, Feed, Floats, Interface
from compress.models.user_module import Preprocess

Named = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Arrays(Images):
    """Rows (N, width) float32 of a model's inputs (compress/models/onnx_interface.py), and labels (N,) int64. told: of
    the texts that they were made of."""

    told: tuple[tuple[str, int], ...] = ()
    unit: ClassVar[str] = "sample"

    @property
    def preprocessing(self) -> str:
        """For the report."""
        return self.preprocess.text

    def size(self) -> dict[str, str | int]:
        """For the report: how many, and of texts what became of them."""
        return {"samples": len(self), **dict(self.told), "preprocessing": self.preprocessing}

    def at(self, places: Sequence[int]) -> Arrays:
        """Some of them."""
        index = torch.tensor(list(places), dtype=torch.int64)
        return _made(self.pixels[index], self.labels[index], self.preprocess, self.told)


def _made(rows: Tensor, labels: Tensor, preprocess: Preprocess, told: tuple[tuple[str, int], ...] = ()) -> Arrays:
    digest = hashlib.sha256(rows.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    return Arrays(rows, labels, preprocess, digest, told)


def read_arrays(source: str | Path, image: ImageSource, folder: Path, length: int) -> Arrays:
    """All samples of a file.

    Args: folder: where the model's tokenizer is; length: tokens that texts are cut to.
    Raises: UsageError for what is not there or of another kind, or texts without a tokenizer; InputError for a
    malformed file, or arrays that do not fit the model.
    """
    path, interface = Path(source), image.interface
    assert interface is not None
    if path.suffix == ".npz" or not interface.is_text:
        found = read_npz(path, interface, ("labels",) if image.labelled else ())
        rows, told = interface.joined(found), tuple[tuple[str, int], ...]()
        labels = found.get("labels", np.zeros(len(rows), np.int64))
        text = "none: arrays by name"
    else:
        rows, told = read_texts(source, interface, folder, min(length, image.longest))
        labels = np.array(read_labels(source) if image.labelled else [0] * len(rows), np.int64)
        text = f"texts of {interface.length_of(rows.shape[1:]) or image.fixed_length} tokens, shorter ones filled up"
    _check_labels(path, len(rows), labels, image.classes if image.labelled else 1)
    return _made(torch.from_numpy(rows), torch.from_numpy(labels.astype(np.int64)), Preprocess(text), told)


def _check_labels(path: Path, count: int, labels: NDArray[Any], classes: int) -> None:
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{path}: {count} samples, but labels are {labels.dtype} {labels.shape}; one integer each.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputError(f"{path}: labels lie in {low} to {high}, but the model has {classes} classes (from 0).")


def read_npz(path: Path, interface: Interface, more: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
    """The arrays of a file by the names of a model's inputs, checked; a text's other inputs follow from its tokens.

    Args: more: further arrays that are wanted.
    Raises: UsageError for no .npz, InputError.
    """
    names = [feed.name for feed in interface.inputs]
    if path.suffix != ".npz" or not path.is_file():
        kinds = "an .npz with an array for each input" + (", or texts" if interface.is_text else "")
        raise UsageError(f"{path} is no file that this model takes. Give {kinds} ({', '.join(names)}).")
    held = list[str]()

    def choose(there: Sequence[str]) -> list[str]:
        held.extend(there)
        return [name for name in (*names, *more) if name in there]

    found = load_npz(path, choose)
    return check_arrays(path, found, interface, more, ", ".join(held) or "nothing")


def check_arrays(
    path: Path, found: Named, interface: Interface, more: Sequence[str] = (), held: str = ""
) -> dict[str, NDArray[Any]]:
    """Arrays by name that fit a model. Args: path, held: told in errors. Raises: InputError."""
    found = {name: np.asarray(array) for name, array in found.items()}
    if interface.is_text and found.get(IDS, np.zeros(0)).ndim == 2:
        found = {**_implied(found[IDS]), **found}
    names = [*(feed.name for feed in interface.inputs), *more]
    missing = [name for name in names if name not in found]
    if missing:
        held = held or ", ".join(found) or "nothing"
        raise InputError(f"{path} has no array '{missing[0]}'; it holds {held}. Wanted: {', '.join(names)}.")
    _check(path, found, interface)
    return {name: found[name] for name in names}


def _implied(ids: NDArray[Any]) -> dict[str, NDArray[Any]]:
    return {MASK: np.ones(ids.shape, np.int64), "token_type_ids": np.zeros(ids.shape, np.int64)}


def _check(path: Path, found: Named, interface: Interface) -> None:
    """Raises: InputError where the arrays do not fit the inputs, or each other."""
    count, lengths = len(np.atleast_1d(found[interface.input])), set[int]()
    for feed in interface.inputs:
        array = found[feed.name]
        wanted = ", ".join(["N", *(str(size or "length") for size in feed.shape)])
        fits = array.ndim == len(feed.shape) + 1 and all(
            size in (FREE, given) for size, given in zip(feed.shape, array.shape[1:], strict=True)
        )
        if not fits or array.size == 0 or len(array) != count:
            raise InputError(
                f"{path}: {feed.name} is {array.dtype} {array.shape}; the model takes {feed.kind} ({wanted}), and the "
                f"first input has N = {count}."
            )
        lengths |= {given for size, given in zip(feed.shape, array.shape[1:], strict=True) if size == FREE}
        _check_values(path, array, feed)
    if len(lengths) > 1:
        raise InputError(f"{path}: the inputs' lengths differ: {', '.join(map(str, sorted(lengths)))}.")


def _check_values(path: Path, array: NDArray[Any], feed: Feed) -> None:
    is_whole = np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_
    if not is_whole and (feed.kind != "float32" or not np.issubdtype(array.dtype, np.floating)):
        raise InputError(f"{path}: {feed.name} is {array.dtype}; the model takes {feed.kind}.")
    if not np.isfinite(array).all():
        raise InputError(f"{path}: {feed.name} holds NaN or infinite values.")
    low, high = int(array.min()), int(array.max())
    if is_whole and max(-low, high) > EXACT:
        raise InputError(
            f"{path}: {feed.name} holds {max(-low, high):,}; whole numbers up to {EXACT:,} are supported, beyond which "
            "float32 is not exact."
        )
    if feed.name == IDS and (low < 0 or high >= feed.high):
        raise InputError(
            f"{path}: {feed.name} holds token {high if high >= feed.high else low}, but the vocabulary has "
            f"{feed.high} (ids from 0). Was it tokenized for another model?"
        )


def read_texts(
    source: str | Path, interface: Interface, folder: Path, longest: int
) -> tuple[Floats, tuple[tuple[str, int], ...]]:
    """Rows of all texts of a file, as long as the longest of them or as the graph takes, and how many were cut.

    Plain text is one text per line. Raises: UsageError, InputError.
    """
    documents = read_lines(source)
    if not documents:
        raise InputError(f"{source} is empty. Give one text per line.")
    ids, cut, pad = tokens_of(documents, interface, load_tokenizer(folder), longest, str(source))
    rows, mask = filled(ids, interface, pad)
    return interface.of_tokens(rows, mask), (("texts in the file that were cut", cut),)


def tokens_of(
    documents: Sequence[Any], interface: Interface, tokenizer: Any, longest: int, where: str
) -> tuple[list[list[int]], int, int]:
    """Texts, or lists of ids → ids of at most `longest` tokens with the tokenizer's marks; how many texts were cut; the
    token that fills up. Raises: UsageError for text without a tokenizer, InputError for ids outside the vocabulary."""
    if tokenizer is None and any(isinstance(each, str) for each in documents):
        raise UsageError(
            f"{where} holds text, but there is no tokenizer beside the model. Put tokenizer.json into its folder, or "
            f"give token ids (.jsonl with 'ids'), or an .npz of the inputs."
        )
    ids, cut = list[list[int]](), 0
    for text in documents:
        if not isinstance(text, str):
            found, whole = list(text[:longest]), len(text)
        else:
            whole = len(tokenizer(text, verbose=False)["input_ids"])
            found = tokenizer(text, truncation=True, max_length=longest, verbose=False)["input_ids"]
        cut += whole > longest
        ids.append(found)
    high = next(feed.high for feed in interface.inputs if feed.name == IDS)
    worst = max((token for found in ids for token in found), default=-1)
    if worst >= high or not all(ids):
        raise InputError(
            f"{where} holds "
            + (f"token {worst}, but the vocabulary has {high}." if worst >= high else "an empty text.")
        )
    pad = getattr(tokenizer, "pad_token_id", None)
    return ids, cut, pad if isinstance(pad, int) and 0 <= pad < high else 0


def filled(ids: Sequence[Sequence[int]], interface: Interface, pad: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Ids and mask (n, length), filled up to the longest, or to what the graph takes. Raises: UsageError where a graph
    without a mask would see what is filled up."""
    width = interface.inputs[0].shape[0] or max(len(row) for row in ids)
    mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in ids], np.int64)
    if not mask.all() and all(feed.name != MASK for feed in interface.inputs):
        raise UsageError(
            f"The model has no {MASK}, so texts of fewer than {width} tokens would be read with what fills them up. "
            f"Give texts of one length, or an .npz with {IDS}."
        )
    return np.array([[*row, *[pad] * (width - len(row))] for row in ids], np.int64), mask
