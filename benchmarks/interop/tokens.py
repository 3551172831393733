"""Prompts, our own greedy tokens after them, and where two lists of tokens part."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compress.errors import InputError
from compress.export.onnx.runtime import Session

COUNT = 64
LONG, SHORT, EVERY = 100, 16, 128  # tokens of the longest prompt, of the usual ones, and from one of these to the next
# Share of the largest logit. Where activations are rounded to 8 bits, another order of float32 sums moves logits by up
# to 0.012 of it (quickstart model, int4 weights, 11 tokens padded to 16); in a float graph by 1e-6.
TIE = 0.02
Prompts = list[list[int]]


@dataclass(frozen=True)
class Settings:
    """What genai_config.json says of a deployable folder."""

    context: int
    pad: int
    eos: frozenset[int]


def settings(folder: Path) -> Settings:
    """Raises: InputError for a folder without genai_config.json: an encoder, or not an export of ours."""
    path = folder / "genai_config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no {path.name}: only exported decoders can be compared.")
    model = json.loads(path.read_text(encoding="utf8"))["model"]
    eos = model["eos_token_id"]
    return Settings(model["context_length"], model["pad_token_id"], frozenset(eos if isinstance(eos, list) else [eos]))


def choose_prompts(rows: Sequence[Sequence[int]], context: int, count: int) -> Prompts:
    """Up to three prompts of 16 tokens, one of 1 and one of 100, from the rows that verification used.

    Shorter where the context ends. Raises: InputError where nothing is left before the tokens to generate.
    """
    if context <= count:
        raise InputError(f"The model's context of {context} tokens has no room for a prompt and {count} tokens.")
    flat = [token for row in rows for token in row]
    starts = ((row, start) for row in rows for start in range(0, max(len(row) - SHORT, 1), EVERY))
    usual = [list(row[start : start + SHORT]) for row, start in islice(starts, 3)]
    return [prompt[: context - count] for prompt in (*usual, flat[:1], flat[:LONG])]


def steps(session: Session, prompts: Prompts, pad: int = 0, side: str = "left") -> Iterator[NDArray[np.float32]]:
    """Logits (batch, vocabulary) of each greedy step after prompts in one batch, padded on one side.

    The graph with GroupQueryAttention takes the right side only.
    """
    longest = max(map(len, prompts))
    gaps = [longest - len(prompt) for prompt in prompts]
    left = [gap if side == "left" else 0 for gap in gaps]
    rows = [[pad] * skip + prompt + [pad] * (gap - skip) for prompt, gap, skip in zip(prompts, gaps, left, strict=True)]
    mask = np.zeros((len(prompts), longest), np.int64)
    for index, (prompt, skip) in enumerate(zip(prompts, left, strict=True)):
        mask[index, skip : skip + len(prompt)] = 1
    last = np.asarray([skip + len(prompt) - 1 for prompt, skip in zip(prompts, left, strict=True)])
    ids, cache = np.asarray(rows, np.int64), session.cache(len(prompts), longest + COUNT)
    while True:
        logits = cache.run(ids, mask)
        newest = logits[np.arange(len(prompts)), last]
        yield newest
        last, mask = np.zeros_like(last), np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        ids = newest.argmax(-1)[:, None]


def greedy_batch(session: Session, prompts: Prompts, pad: int, side: str, count: int = COUNT) -> Prompts:
    """`count` tokens after each prompt of one padded batch."""
    chosen = [logits.argmax(-1) for logits in islice(steps(session, prompts, pad, side), count)]
    tokens: Prompts = np.stack(chosen, axis=1).tolist()
    return tokens


def until_end(tokens: Sequence[int], eos: frozenset[int]) -> list[int]:
    """Tokens up to the first end-of-text and with it."""
    end = next((place for place, token in enumerate(tokens) if token in eos), len(tokens))
    return list(tokens[: end + 1])


@dataclass(frozen=True)
class Difference:
    """The first token that differs after a prompt.

    margin: our logit of our token minus that of theirs, both alone; largest_logit: in size, at that position.
    """

    prompt: int
    position: int
    ours: int | None
    theirs: int | None
    margin: float | None
    largest_logit: float | None

    @property
    def is_tie(self) -> bool:
        """Whether it is within what rounding of activations to 8 bits moves."""
        return self.margin is not None and self.largest_logit is not None and self.margin <= TIE * self.largest_logit

    def text(self) -> str:
        """For the table."""
        margin = "margin unknown"
        if self.margin is not None and self.largest_logit is not None:
            margin = f"margin {self.margin:.3g}, largest logit {self.largest_logit:.3g}"
        return f"prompt {self.prompt} differs at {self.position}: {self.ours}, not {self.theirs} ({margin})"


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Where two lists part, or None where they are equal."""
    pairs = enumerate(zip_longest(ours, theirs))
    return next((place for place, (left, right) in pairs if left != right), None)


def compare(session: Session, prompts: Prompts, ours: Prompts, theirs: Prompts) -> tuple[Difference, ...]:
    """The first difference after each prompt that has one. prompts may be more than the lists."""
    found = []
    for index, (expected, got) in enumerate(zip(ours, theirs, strict=True)):
        place = first_difference(expected, got)
        if place is None:
            continue
        left, right = (tokens[place] if place < len(tokens) else None for tokens in (expected, got))
        margin = largest = None
        if left is not None and right is not None:
            logits = next(islice(steps(session, [prompts[index]]), place, None))[0]
            margin, largest = float(logits[left] - logits[right]), float(np.abs(logits).max())
        found.append(Difference(index, place, left, right, margin, largest))
    return tuple(found)
