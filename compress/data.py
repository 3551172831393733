"""Calibration and quality data: files → token windows, split by document, with digests (design §7)."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import lzma
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.errors import InputError, UsageError
from compress.leaks import Text, shared_runs
from compress.model import Model, Task
from compress.quality import FEWEST_NEIGHBOURS

# Tokens that pass through a block at once: keeps the working set of attention and MLP small.
BATCH_TOKENS = 2048
SUFFIXES = (".txt", ".jsonl", ".json")
KINDS = ".txt, .jsonl (text or ids), .json (lists of ids), each also .gz or .xz, or module:callable"


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows: ids (N, length) int64 whose row i comes from document documents[i]; protocol names how.

    starts: where in its document each row begins, empty where that is not known.
    """

    ids: Tensor
    documents: tuple[int, ...]
    protocol: str
    digest: str
    starts: tuple[int, ...] = ()

    def batches(self, tokens: int = BATCH_TOKENS) -> list[Tensor]:
        """Rows in order, as many at once as hold about `tokens` tokens."""
        rows = max(1, tokens // self.ids.shape[1])
        return list(torch.split(self.ids, rows))


@dataclass(frozen=True, eq=False)
class Calibration:
    """The windows that statistics are taken over, and the seed that chose them."""

    windows: Windows
    seed: int
    source: str

    def batches(self) -> list[Tensor]:
        """As `Windows.batches`."""
        return self.windows.batches()

    def summary(self) -> dict[str, str | int]:
        """For the report and the manifest."""
        count, length = self.windows.ids.shape
        return {
            "source": self.source,
            "windows": count,
            "length": length,
            "seed": self.seed,
            "digest": self.windows.digest,
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
            documents = [_from_row(json.loads(line), path) for line in _lines(text)]
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


def _lines(text: str) -> list[str]:
    """Lines that are not blank. JSON strings may hold U+2028 and the like, at which `splitlines` would cut too."""
    return [line for line in text.split("\n") if line.strip()]


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
    """Documents as ids; no special tokens are added.

    Raises: UsageError for text without a tokenizer, InputError for ids outside the vocabulary.
    """
    if isinstance(documents[0], str):
        tokenizer = model.tokenizer()
        if tokenizer is None:
            raise UsageError(
                f"{source} holds text, but {model.source} has no tokenizer. Put tokenizer.json beside the weights, or "
                "give token ids (.json lists, or .jsonl with 'ids')."
            )
        documents = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in documents]
    vocabulary = model.vocabulary
    for place, ids in enumerate(documents):
        worst = max((token for token in ids if isinstance(token, int)), default=0)
        if worst >= vocabulary:
            raise InputError(
                f"{source}: document {place} holds token {worst}, but the vocabulary has {vocabulary}. "
                "Was it tokenized for another model?"
            )
    return documents  # type: ignore[return-value]


def cut_windows(documents: Sequence[list[int]], length: int, source: str) -> Windows:
    """Disjoint windows of `length` tokens, document by document, each tail dropped.

    Raises: UsageError where no document is long enough.
    """
    found = [(place, start) for place, ids in enumerate(documents) for start in range(0, len(ids) - length + 1, length)]
    if not found:
        longest = max((len(ids) for ids in documents), default=0)
        raise UsageError(
            f"{source}: no document reaches the window length of {length} tokens (the longest has {longest}). "
            "Give more text, or a smaller --length."
        )
    windows = torch.tensor([documents[place][start : start + length] for place, start in found], dtype=torch.int64)
    digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    origin, starts = zip(*found, strict=True)
    return Windows(windows, origin, f"ppl/disjoint-{length}", digest, starts)


def join(documents: Sequence[list[int]]) -> list[list[int]]:
    """All documents as one, for calibration, where a window may span several."""
    return [[token for ids in documents for token in ids]]


def choose(windows: Windows, count: int, seed: int) -> Windows:
    """At most `count` windows, drawn without replacement, in their order."""
    total = windows.ids.shape[0]
    if total <= count:
        return windows
    places = sorted(random.Random(seed).sample(range(total), count))
    ids = windows.ids[places]
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    documents = tuple(windows.documents[place] for place in places)
    starts = tuple(windows.starts[place] for place in places) if windows.starts else ()
    return Windows(ids, documents, windows.protocol, digest, starts)


def calibrate(model: Model, source: str | Path, *, samples: int = 128, length: int = 512, seed: int = 0) -> Calibration:
    """Calibration windows from a whole file."""
    documents = tokenize(read_documents(source), model, str(source))
    windows = cut_windows(join(documents), _fitting(model, length), str(source))
    return Calibration(choose(windows, samples, seed), seed, Path(source).name)


def quality_windows(
    model: Model, source: str | Path, *, samples: int | None = None, length: int = 512, seed: int = 0
) -> Windows:
    """Evaluation windows from a whole file.

    Raises: UsageError where they are too few to judge the model by.
    """
    documents = tokenize(read_documents(source), model, str(source))
    return _judging(model, documents, str(source), samples, length, seed)


def _judging(
    model: Model, documents: Sequence[list[int]], source: str, samples: int | None, length: int, seed: int
) -> Windows:
    windows = cut_windows(documents, _fitting(model, length), source)
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
    samples: int,
    quality_samples: int | None,
    length: int,
    seed: int,
    quality_length: int | None = None,
) -> tuple[Calibration, Windows]:
    """One file for both: documents are dealt 80/20 by seed; a single text is cut once, at 80 % of its tokens.

    Args: quality_length: tokens per quality window, `length` where it is not given.
    Raises: UsageError when a run of tokens would be in both parts (`check_disjoint`).
    """
    documents = tokenize(read_documents(source), model, str(source))
    length = _fitting(model, length)
    if len(documents) == 1:
        cut = len(documents[0]) * 4 // 5 // length * length
        first, second = [documents[0][:cut]], [documents[0][cut:]]
    else:
        order = list(range(len(documents)))
        random.Random(seed).shuffle(order)
        held = set(order[: max(1, len(order) // 5)])
        first = [ids for place, ids in enumerate(documents) if place not in held]
        second = [ids for place, ids in enumerate(documents) if place in held]
    calibration = choose(cut_windows(join(first), length, str(source)), samples, seed)
    quality = _judging(model, second, str(source), quality_samples, quality_length or length, seed)
    check_disjoint(calibration, quality)
    return Calibration(calibration, seed, Path(source).name), quality


def check_disjoint(calibration: Windows, quality: Windows) -> None:
    """Raises: UsageError when as many tokens in a row as the shorter window holds are in both, at whatever offset."""
    size = min(calibration.ids.shape[1], quality.ids.shape[1])
    count, length = quality.ids.shape
    text = _as_text(quality)
    leaks = {place // length: place for place in shared_runs(_as_text(calibration), text, size)}
    if leaks:
        window, place = min(leaks.items())
        raise UsageError(
            f"{size} tokens in a row are in both the calibration and the quality data, beginning in {len(leaks)} of "
            f"{count} quality windows, which would flatter the result. First in window {window}, tokens "
            f"{', '.join(map(str, text.tokens[place : place + 8].tolist()))} … Give different files, or remove "
            "repeated text."
        )


def _as_text(windows: Windows) -> Text:
    """The windows on end; a piece goes on where the next window continues its document."""
    count, length = windows.ids.shape
    continues = np.zeros(count, dtype=bool)
    if windows.starts:
        continues[1:] = (np.diff(windows.documents) == 0) & (np.diff(windows.starts) == length)
    return Text(windows.ids.numpy().reshape(-1), np.repeat(np.cumsum(~continues), length))


def _fitting(model: Model, length: int) -> int:
    return min(length, model.longest)
