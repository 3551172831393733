"""Tasks for caches of keys and values whose needed tokens are known: a context, questions about it, their answers.

All are sequences of numbers from a vocabulary of four classes (marks, filler, keys, values), so that a model of a few
hundred thousand parameters learns them in minutes and an oracle can say which tokens of the context an answer takes.
After passkey retrieval (Mohtashami and Jaggi 2023, arXiv 2305.16300), associative recall (Arora et al. 2023, arXiv
2312.04927), the needles with distractors and the most frequent words of RULER (Hsieh et al. 2024, arXiv 2404.06654)
and induction (Olsson et al. 2022, arXiv 2209.11895). Needs NumPy alone: other tools' environments read it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

BOS, MARK, MOST, COPY = 0, 1, 2, 3
FILLER = range(16, 64)
KEYS = range(64, 128)
VALUES = range(128, 192)
VOCABULARY = 192
LAST = 4
"""Tokens that `recency` copies."""


@dataclass(frozen=True)
class Ask:
    """question, answer: tokens; needed: positions of the context without which nobody could answer."""

    question: Ids
    answer: Ids
    needed: tuple[int, ...]


@dataclass(frozen=True)
class Drawn:
    """context: tokens, the first of them BOS; asks: what may be asked about it."""

    context: Ids
    asks: tuple[Ask, ...]


@dataclass(frozen=True)
class Batch:
    """context (examples, length), question (examples, n), answer (examples, m): tokens. needed (examples, length):
    whether an answer takes a token of the context. depth (examples,): where the first of those is, 0 … 1."""

    context: Ids
    question: Ids
    answer: Ids
    needed: NDArray[np.bool_]
    depth: NDArray[np.float64]


def passkey(rng: np.random.Generator, length: int) -> Drawn:
    """Three values behind a mark, somewhere in filler; asked by the mark."""
    context = _filler(rng, length)
    at = int(rng.integers(1, length - 4))
    secret = _pick(rng, VALUES, 3)
    context[at], context[at + 1 : at + 4] = MARK, secret
    return Drawn(context, (Ask(np.array([MARK]), secret, tuple(range(at, at + 4))),))


def needles(rng: np.random.Generator, length: int) -> Drawn:
    """Up to eight keys with their values, each behind a mark, in filler; asked by mark and key."""
    count = max(2, min(8, length // 16))
    context = _filler(rng, length)
    starts = 1 + (length - 1) // count * np.arange(count) + rng.integers(0, (length - 1) // count - 3, count)
    keys, values = _pick(rng, KEYS, count), _pick(rng, VALUES, count)
    for start, key, value in zip(starts, keys, values, strict=True):
        context[start : start + 3] = MARK, key, value
    return Drawn(
        context,
        tuple(
            Ask(np.array([MARK, key]), np.array([value]), (start, start + 1, start + 2))
            for start, key, value in zip(starts.tolist(), keys, values, strict=True)
        ),
    )


def recall(rng: np.random.Generator, length: int) -> Drawn:
    """Associative recall: pairs of a key and its value through the whole context; asked by the key."""
    count = min(len(KEYS), (length - 1) // 2)
    keys, values = _pick(rng, KEYS, count), rng.choice(np.array(VALUES), count)
    context = _filler(rng, length)
    starts = length - 2 * count + 2 * np.arange(count)
    context[starts], context[starts + 1] = keys, values
    return Drawn(
        context,
        tuple(
            Ask(np.array([key]), np.array([value]), (start, start + 1))
            for start, key, value in zip(starts.tolist(), keys, values, strict=True)
        ),
    )


def induction(rng: np.random.Generator, length: int) -> Drawn:
    """A span of keys and values in filler; asked by two of its tokens for the four that follow."""
    span = min(24, length // 3)
    context = _filler(rng, length)
    start = int(rng.integers(1, length - span))
    context[start : start + span] = _pick(rng, range(KEYS.start, VALUES.stop), span)
    asks = []
    for place in range(start, start + span - 5):
        asks.append(Ask(context[place : place + 2], context[place + 2 : place + 6], tuple(range(place, place + 6))))
    return Drawn(context, tuple(asks))


def most(rng: np.random.Generator, length: int) -> Drawn:
    """The most frequent of some values, which takes many tokens to tell: an eighth of the context, the next a
    sixteenth."""
    names = _pick(rng, VALUES, 3)
    context = _filler(rng, length)
    places = 1 + rng.permutation(length - 1)
    first, second = max(3, length // 8), max(1, length // 16)
    context[places[:first]] = names[0]
    context[places[first : first + second]] = names[1]
    context[places[first + second : first + 2 * second]] = names[2]
    return Drawn(context, (Ask(np.array([MOST]), names[:1], tuple(sorted(places[:first].tolist()))),))


def recency(rng: np.random.Generator, length: int) -> Drawn:
    """The last values again: what every cache with a window can do."""
    context = _filler(rng, length)
    context[length - LAST :] = rng.choice(np.array(VALUES), LAST)
    return Drawn(
        context, (Ask(np.array([COPY]), context[length - LAST :].copy(), tuple(range(length - LAST, length))),)
    )


TASKS: dict[str, Callable[[np.random.Generator, int], Drawn]] = {
    "passkey": passkey,
    "needles": needles,
    "recall": recall,
    "induction": induction,
    "most": most,
    "recency": recency,
}
CHANCE = dict.fromkeys(("needles", "recall", "most"), 1 / len(VALUES)) | dict.fromkeys(
    ("passkey", "induction", "recency"), 0.0
)
"""Of guessing among all values; of several tokens it is nearly none."""


def batch(name: str, seed: int, count: int, length: int) -> Batch:
    """Examples of one task, each with one question of those that may be asked. Equal seeds give equal examples."""
    rng = np.random.default_rng([seed, list(TASKS).index(name)])
    drawn = [TASKS[name](rng, length) for _ in range(count)]
    chosen = [each.asks[int(rng.integers(len(each.asks)))] for each in drawn]
    needed = np.zeros((count, length), bool)
    for row, ask in enumerate(chosen):
        needed[row, list(ask.needed)] = True
    return Batch(
        np.stack([each.context for each in drawn]),
        np.stack([ask.question for ask in chosen]),
        np.stack([ask.answer for ask in chosen]),
        needed,
        np.array([ask.needed[0] / length for ask in chosen]),
    )


def lesson(rng: np.random.Generator, name: str, length: int) -> tuple[Ids, NDArray[np.bool_]]:
    """A sequence to learn from: two thirds of it context, then questions with their answers, in an order by chance.

    Returns: ids (length,) and which of them are answers (length,).
    """
    drawn = TASKS[name](rng, 2 * length // 3)
    ids, answers = [drawn.context], [np.zeros(len(drawn.context), bool)]
    for place in rng.permutation(len(drawn.asks)):
        ask = drawn.asks[place]
        ids += [ask.question, ask.answer]
        answers += [np.zeros(len(ask.question), bool), np.ones(len(ask.answer), bool)]
    joined, is_answer = np.concatenate(ids)[:length], np.concatenate(answers)[:length]
    short = length - len(joined)
    return np.pad(joined, (0, short), constant_values=FILLER[0]), np.pad(is_answer, (0, short))


def drill(rng: np.random.Generator, length: int) -> tuple[Ids, NDArray[np.bool_]]:
    """A sequence to form induction by: some keys and values over and over, all but the first time as answers.

    How many they are differs, so that how far back to look is no way to answer. Returns: as `lesson`.
    """
    span = _pick(rng, range(KEYS.start, VALUES.stop), int(rng.integers(length // 6, length // 2)))
    ids = np.concatenate([[BOS], np.resize(span, length - 1)])
    return ids, np.arange(length) > len(span) + 1


def _filler(rng: np.random.Generator, length: int) -> Ids:
    context = rng.choice(np.array(FILLER), length)
    context[0] = BOS
    return context


def _pick(rng: np.random.Generator, among: range, count: int) -> Ids:
    """Different ones."""
    return rng.permutation(np.array(among))[:count]
