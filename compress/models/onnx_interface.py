"""What an ONNX model takes and gives. Imports little: a process that measures memory reads it too.

Inside of compress a sample is one row of float32, whatever a graph takes: an image (channels, h, w), or all its inputs
one after another (`Interface.joined`). Whole numbers up to 2^24 are exact in it. Where one axis of a sample may have
any length (that of a text), the width of the rows tells it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import InputError

GIVEN = "compress.given"
"""Metadata of a graph that was given as ONNX: its interface as JSON."""
KINDS = ("float32", "int64", "int32", "bool")
"""Types of inputs, as numpy names them."""
EXACT = 1 << 24
"""Whole numbers of this size and below are exact in float32."""
LARGEST = 1 << 29
"""Numbers of a sample, and of its outputs: 2 GiB."""
FREE = 0
"""The size of an axis that takes any length."""
IDS, MASK = "input_ids", "attention_mask"
TEXT = frozenset({IDS, MASK, "token_type_ids"})
"""What is made of a text's tokens."""
Shape = tuple[int, ...]
Floats = NDArray[np.float32]
Run = Callable[[dict[str, NDArray[Any]]], Sequence[NDArray[Any]]]


@dataclass(frozen=True)
class Feed:
    """One input. kind: its type; shape: of one sample, `FREE` where any length goes; high: numbers that are made up for
    it lie below, where it takes whole ones."""

    name: str
    kind: str
    shape: Shape
    high: int = 2

    def size(self, length: int) -> int:
        """How many numbers a sample has."""
        return prod(size or length for size in self.shape)


@dataclass(frozen=True)
class Interface:
    """batch: how many samples the graph takes at once, 0 for any number; outputs: name and shape for one sample, in the
    graph's order; length: of the free axis where none is given, 0 where no axis is free."""

    inputs: tuple[Feed, ...]
    batch: int
    outputs: tuple[tuple[str, Shape], ...]
    length: int = 0

    @property
    def is_image(self) -> bool:
        """Whether it takes images: one float input (channels, h, w), all sizes fixed."""
        first = self.inputs[0]
        return len(self.inputs) == 1 and first.kind == "float32" and len(first.shape) == 3 and not self.length

    @property
    def is_text(self) -> bool:
        """Whether all that it takes is made of tokens."""
        names = {feed.name for feed in self.inputs}
        is_flat = all(len(feed.shape) == 1 and feed.kind in ("int64", "int32") for feed in self.inputs)
        return IDS in names and names <= TEXT and is_flat and len({feed.shape for feed in self.inputs}) == 1

    @property
    def input(self) -> str:
        """The name of the first."""
        return self.inputs[0].name

    @property
    def shape(self) -> Shape:
        """Of a row: (channels, h, w) of an image, else its width at the usual length."""
        return self.inputs[0].shape if self.is_image else (self.width(self.length),)

    def width(self, length: int) -> int:
        """Of rows whose free axis is so long."""
        return sum(feed.size(length) for feed in self.inputs)

    def length_of(self, row: Shape) -> int:
        """Of the free axis, by the shape of a row; 0 where none is free. Raises: InputError where there is none."""
        if self.is_image or not self.length:
            length = 0
        else:
            fixed = sum(feed.size(0) for feed in self.inputs if FREE not in feed.shape)
            length = (row[0] - fixed) // max(1, sum(feed.size(1) for feed in self.inputs if FREE in feed.shape))
        if row != (self.shape if self.is_image else (self.width(length),)) or (self.length and length < 1):
            raise InputError(f"Rows of shape {row} are none of {', '.join(feed.name for feed in self.inputs)}.")
        return length

    def shapes(self, length: int) -> tuple[tuple[str, Shape], ...]:
        """Name and shape of each output for a sample whose free axis is so long."""
        return tuple((name, tuple(size or length for size in shape)) for name, shape in self.outputs)

    def sizes(self, length: int) -> tuple[int, ...]:
        """How many numbers each output has for a sample."""
        return tuple(prod(shape) for _, shape in self.shapes(length))

    def joined(self, arrays: Mapping[str, NDArray[Any]]) -> Floats:
        """Inputs by name, each (n, …) → rows (n, width)."""
        parts = [np.asarray(arrays[feed.name]) for feed in self.inputs]
        return np.concatenate([part.reshape(len(part), prod(part.shape[1:])).astype(np.float32) for part in parts], 1)

    def split(self, rows: Floats) -> dict[str, NDArray[Any]]:
        """Rows → inputs by name, as the graph takes them. Raises: InputError for rows of another width."""
        length = self.length_of(rows.shape[1:])
        if self.is_image:
            return {self.input: rows}
        found, start = {}, 0
        for feed in self.inputs:
            piece = rows[:, start : start + feed.size(length)]
            shape = (len(rows), *(size or length for size in feed.shape))
            found[feed.name] = np.ascontiguousarray(piece.reshape(shape).astype(feed.kind))
            start += feed.size(length)
        return found

    def of_tokens(self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None) -> Floats:
        """Tokens (n, length), and which of them are no padding → rows."""
        every = {IDS: ids, MASK: np.ones_like(ids) if mask is None else mask}
        return self.joined({feed.name: every.get(feed.name, np.zeros_like(ids)) for feed in self.inputs})

    def drawn(self, count: int, length: int, random: np.random.Generator) -> Floats:
        """Made-up rows: normal noise, whole numbers below `high`, nothing masked."""
        found: dict[str, NDArray[Any]] = {}
        for feed in self.inputs:
            shape = (count, *(size or length for size in feed.shape))
            if "mask" in feed.name:
                found[feed.name] = np.ones(shape, np.float32)
            elif feed.kind == "float32":
                found[feed.name] = random.standard_normal(shape, dtype=np.float32)
            else:
                found[feed.name] = random.integers(0, feed.high, shape)
        return found[self.input].astype(np.float32) if self.is_image else self.joined(found)

    def seen(self, rows: Floats) -> Floats | None:
        """(n, length), 0 where a text is filled up; None where there is no such mask. What a graph puts out there means
        nothing, so it is taken for zero."""
        return self.split(rows)[MASK].astype(np.float32) if self.is_text and self._has(MASK) else None

    def _has(self, name: str) -> bool:
        return any(feed.name == name for feed in self.inputs)

    def follows(self, place: int) -> bool:
        """Whether an output has a row for each token."""
        shape = self.outputs[place][1]
        return self.is_text and bool(shape) and shape[0] == self.inputs[0].shape[0]

    @property
    def text(self) -> str:
        """As JSON."""
        outputs = [[name, list(shape)] for name, shape in self.outputs]
        facts: dict[str, Any] = {"batch": self.batch, "outputs": outputs}
        if self.is_image:
            facts |= {"input": self.input, "shape": list(self.shape)}
        else:
            facts |= {"inputs": [asdict(feed) for feed in self.inputs], "length": self.length}
        return json.dumps(facts, sort_keys=True)

    @classmethod
    def read(cls, text: str) -> Interface:
        """From `text`. Raises: InputError for anything else."""
        try:
            facts = json.loads(text)
            outputs = tuple((str(name), tuple(int(size) for size in shape)) for name, shape in facts["outputs"])
            if "inputs" in facts:
                feeds = tuple(_feed(each) for each in facts["inputs"])
            else:
                feeds = (_feed({"name": facts["input"], "kind": "float32", "shape": facts["shape"]}),)
            made = cls(feeds, int(facts["batch"]), outputs, int(facts.get("length", 0)))
            is_known = bool(feeds) and all(feed.kind in KINDS and feed.high > 0 for feed in feeds)
            sizes = [size for feed in feeds for size in feed.shape] + [made.batch, made.length]
            is_fixed = all(min(feed.shape, default=1) >= (0 if made.length else 1) for feed in feeds)
            if not is_known or min(sizes) < 0 or not outputs or not is_fixed:
                raise ValueError(text[:200])
            if max(made.width(made.length), sum(made.sizes(made.length))) > LARGEST:
                raise ValueError("samples of more than 2 GiB")
            if "inputs" not in facts and not made.is_image:
                raise ValueError(f"an image of shape {facts['shape']}")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise InputError(f"The graph's metadata {GIVEN} tell no interface ({error!r}). Export it again.") from error
        return made

    def pieces(self, count: int) -> Iterator[tuple[int, int]]:
        """Where each call begins and ends in `count` samples; the last may be short of what the graph takes."""
        step = self.batch or max(count, 1)
        for start in range(0, count, step):
            yield start, min(start + step, count)

    def rows(self, run: Run, samples: Floats) -> Floats:
        """Rows (n, …) → (n, all outputs of a sample in a row), as many at a time as `run` takes; a short piece is
        filled up with its last sample."""
        found = []
        for start, end in self.pieces(len(samples)):
            piece = samples[start:end]
            short = max(0, self.batch - len(piece))
            if short:
                piece = np.concatenate([piece, np.repeat(piece[-1:], short, 0)])
            seen = self.seen(piece)
            parts = [
                np.asarray(output).reshape(len(piece), -1) * self._share(seen, place, np.asarray(output))
                for place, output in enumerate(run(self.split(piece)))
            ]
            found.append(np.concatenate(parts, 1)[: end - start])
        return np.concatenate(found)

    def _share(self, seen: Floats | None, place: int, output: NDArray[Any]) -> Floats | np.float32:
        """1 where a number of an output counts, (n, numbers), 0 where it does not."""
        if seen is None or not self.follows(place):
            return np.float32(1)
        return np.repeat(seen, output[0].size // seen.shape[1], 1)


def _feed(facts: Mapping[str, Any]) -> Feed:
    shape = tuple(int(size) for size in facts["shape"])
    return Feed(str(facts["name"]), str(facts["kind"]), shape, int(facts.get("high", 2)))
