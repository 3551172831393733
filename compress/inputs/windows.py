"""Token windows: cut from documents, drawn, dealt out in batches, and compared with each other."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.errors import UsageError
from compress.inputs.leaks import Text, shared_runs

# Tokens that pass through a block at once: keeps the working set of attention and MLP small.
BATCH_TOKENS = 2048


@dataclass(frozen=True, eq=False)
class Windows:
    """Token windows: ids (N, length) int64 whose row i comes from document documents[i]; protocol names how.

    starts: where in its document each row begins, empty where that is not known; lengths: tokens of each row, which is
    filled up with 0 behind them, empty where all are of full length.
    """

    ids: Tensor
    documents: tuple[int, ...]
    protocol: str
    digest: str
    starts: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()

    def batches(self, tokens: int = BATCH_TOKENS) -> list[Tensor]:
        """Rows in order, as many at once as hold about `tokens` tokens; only rows of one length together, the shorter
        ones first, so that nothing is padded."""
        batches: list[Tensor] = []
        for length in sorted(set(self.lengths)) or [self.ids.shape[1]]:
            rows = [place for place, own in enumerate(self.lengths) if own == length]
            ids = self.ids[rows, :length] if self.lengths else self.ids
            batches += torch.split(ids, max(1, tokens // length))
        return batches

    def rows(self) -> list[Tensor]:
        """Each window's own tokens, (length,) int64."""
        return [row[: self.lengths[place]] if self.lengths else row for place, row in enumerate(self.ids)]

    def size(self) -> dict[str, str | int]:
        """For the report."""
        return {"windows": self.ids.shape[0], "length": self.ids.shape[1]}


def cut_windows(documents: Sequence[list[int]], length: int, source: str, *, short: bool = False) -> Windows:
    """Disjoint windows of `length` tokens, document by document, each tail dropped.

    short: a document of fewer tokens is a window of its own, once if there are several alike.
    Raises: UsageError where no document is long enough.
    """
    found: list[tuple[int, int]] = []
    whole: dict[tuple[int, ...], int] = {}
    for place, ids in enumerate(documents):
        if short and 0 < len(ids) <= length:
            if whole.setdefault(tuple(ids), place) == place:
                found.append((place, 0))
        else:
            found += [(place, start) for start in range(0, len(ids) - length + 1, length)]
    if not found:
        longest = max((len(ids) for ids in documents), default=0)
        raise UsageError(
            f"{source}: no document reaches the window length of {length} tokens (the longest has {longest}). "
            "Give more text, or a smaller --length."
        )
    rows = [documents[place][start : start + length] for place, start in found]
    lengths = tuple(len(row) for row in rows)
    windows = torch.tensor([row + [0] * (max(lengths) - len(row)) for row in rows], dtype=torch.int64)
    origin, starts = zip(*found, strict=True)
    kind = f"ppl/disjoint-{length}" if not short else f"documents-{length}"
    uneven = lengths if min(lengths) < max(lengths) else ()
    return Windows(windows, origin, kind, _digest(windows, uneven), starts, uneven)


def _digest(ids: Tensor, lengths: tuple[int, ...]) -> str:
    return hashlib.sha256(ids.numpy().tobytes() + (str(lengths).encode() if lengths else b"")).hexdigest()


def join(documents: Sequence[list[int]]) -> list[list[int]]:
    """All documents as one, for calibration, where a window may span several."""
    return [[token for ids in documents for token in ids]]


def choose(windows: Windows, count: int, seed: int) -> Windows:
    """At most `count` windows, drawn without replacement, in their order."""
    total = windows.ids.shape[0]
    return windows if total <= count else _at(windows, chosen(total, count, seed))


def rest(windows: Windows, count: int, seed: int) -> Windows | None:
    """What `choose` leaves of them, None where that is nothing."""
    taken = set(chosen(windows.ids.shape[0], count, seed))
    left = [place for place in range(windows.ids.shape[0]) if place not in taken]
    return _at(windows, left) if left else None


def chosen(total: int, count: int, seed: int) -> list[int]:
    """Places of at most `count` of so many, drawn without replacement, in order."""
    return sorted(random.Random(seed).sample(range(total), min(count, total)))


def _at(windows: Windows, places: list[int]) -> Windows:
    ids = windows.ids[places]
    documents = tuple(windows.documents[place] for place in places)
    starts, lengths = (tuple(of[place] for place in places) if of else () for of in (windows.starts, windows.lengths))
    return Windows(ids, documents, windows.protocol, _digest(ids, lengths), starts, lengths)


def check_disjoint(calibration: Windows, quality: Windows) -> None:
    """Raises: UsageError when as many tokens in a row as the shorter window holds are in both, at whatever offset; of
    windows of unlike length, when one is in both."""
    if calibration.lengths or quality.lengths:
        _check_rows(calibration, quality)
        return
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


def _check_rows(calibration: Windows, quality: Windows) -> None:
    """Raises: UsageError when a window is in both."""
    known = {tuple(row.tolist()) for row in calibration.rows()}
    leaks = [place for place, row in enumerate(quality.rows()) if tuple(row.tolist()) in known]
    if leaks:
        raise UsageError(
            f"{len(leaks)} of {len(quality.ids)} quality windows are calibration windows too, which would flatter the "
            f"result. First: tokens {', '.join(map(str, quality.rows()[leaks[0]][:8].tolist()))} … Give different "
            "files, or remove repeated texts."
        )


def _as_text(windows: Windows) -> Text:
    """The windows on end; a piece goes on where the next window continues its document."""
    count, length = windows.ids.shape
    continues = np.zeros(count, dtype=bool)
    if windows.starts:
        continues[1:] = (np.diff(windows.documents) == 0) & (np.diff(windows.starts) == length)
    return Text(windows.ids.numpy().reshape(-1), np.repeat(np.cumsum(~continues), length))
