"""The loop that continues prompts: a batch at once, streaming, until an end, a stop text, or no room."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from compress.inputs.prompts import Reader
from compress.runtime.sampling import Sampling, choose
from compress.runtime.text_stream import Detokenizer, StopText
from compress.target import Runner

Finish = Literal["stop", "length"]
Listener = Callable[[int, str], object]
"""Told each piece of text as it comes, with the place of its prompt."""


@dataclass(frozen=True)
class Continuation:
    """What followed a prompt. tokens: the new ones but for the one that ends a text; text: theirs, up to a stop text.

    finish: "stop" after an end token or a stop text, "length" after so many tokens as wanted, or as there is room for.
    """

    prompt_tokens: tuple[int, ...] = field(repr=False)
    tokens: tuple[int, ...] = field(repr=False)
    text: str
    finish: Finish


@dataclass(frozen=True)
class Pace:
    """Seconds to read the prompts and choose the first token of each; of all further steps; tokens of those steps."""

    prompt_s: float
    decode_s: float
    decoded: int

    @property
    def tokens_per_s(self) -> float | None:
        """All rows together, the prompt not counted; None where one token was all."""
        return self.decoded / self.decode_s if self.decoded else None


class _Row:
    """One prompt on its way."""

    def __init__(self, reader: Reader, prompt: Sequence[int], count: int, stops: Sequence[str]) -> None:
        self.prompt, self.tokens, self.text = tuple(prompt), list[int](), ""
        self.finish: Finish | None = None
        self._ends, self._room = reader.ends, min(count, reader.longest - len(prompt))
        self._words, self._stop = Detokenizer(reader.decode, prompt), StopText(stops)

    def take(self, token: int) -> str:
        """The text that a token makes certain."""
        if token in self._ends:
            return self._close("stop")
        self.tokens.append(token)
        piece = self._stop.add(self._words.add(token))
        self.text += piece
        if self._stop.found:
            self.finish = "stop"
            return piece
        return piece + self._close("length") if len(self.tokens) >= self._room else piece

    def _close(self, finish: Finish) -> str:
        piece = self._stop.add(self._words.flush())
        piece += self._stop.flush()
        self.text += piece
        self.finish = "stop" if self._stop.found else finish
        return piece


def continue_prompts(
    runner: Runner,
    reader: Reader,
    prompts: Sequence[Sequence[int]],
    *,
    count: int,
    sampling: Sampling,
    stops: Sequence[str] = (),
    listener: Listener | None = None,
) -> tuple[list[Continuation], Pace]:
    """Continue all prompts at once by at most `count` tokens each; those that are done wait for the last.

    Raises: InputError for logits that are not finite.
    """
    rows = [_Row(reader, prompt, count, stops) for prompt in prompts]
    generators, decoded = sampling.generators(len(rows)), 0
    started = time.perf_counter()
    logits, read = runner.start(*padded(prompts, reader.pad, left=True)), 0.0
    while True:
        tokens = choose(logits, sampling, generators)
        for place, row in enumerate(rows):
            if row.finish is None:
                piece = row.take(int(tokens[place]))
                if piece and listener is not None:
                    listener(place, piece)
        read = read or time.perf_counter() - started
        alive = np.array([row.finish is None for row in rows])
        if not alive.any():
            break
        logits = runner.step(np.where(alive, tokens, reader.pad), alive)
        decoded += int(alive.sum())
    pace = Pace(read, time.perf_counter() - started - read, decoded)
    return [Continuation(row.prompt, tuple(row.tokens), row.text, row.finish or "length") for row in rows], pace


def padded(rows: Sequence[Sequence[int]], pad: int, left: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and mask (rows, longest) of rows of ids; padding before them (left) or after, 0 in the mask."""
    width = max(len(row) for row in rows)
    ids, mask = np.full((len(rows), width), pad, np.int64), np.zeros((len(rows), width), np.int64)
    for place, row in enumerate(rows):
        part = slice(width - len(row), width) if left else slice(0, len(row))
        ids[place, part], mask[place, part] = row, 1
    return ids, mask
