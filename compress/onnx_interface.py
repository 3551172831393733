"""What an ONNX model of images takes and gives. Imports little: a process that measures memory reads it too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import InputError

GIVEN = "compress.given"
"""Metadata of a graph that was given as ONNX: its interface as JSON."""
Run = Callable[[NDArray[Any]], Sequence[NDArray[Any]]]


@dataclass(frozen=True)
class Interface:
    """shape: of one image, (channels, h, w); batch: how many images the graph takes at once, 0 for any number; outputs:
    name and shape for one image, in the graph's order."""

    input: str
    shape: tuple[int, int, int]
    batch: int
    outputs: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many numbers each output has for an image."""
        return tuple(prod(shape) for _, shape in self.outputs)

    @property
    def text(self) -> str:
        """As JSON."""
        outputs = [[name, list(shape)] for name, shape in self.outputs]
        facts = {"input": self.input, "shape": list(self.shape), "batch": self.batch, "outputs": outputs}
        return json.dumps(facts, sort_keys=True)

    @classmethod
    def read(cls, text: str) -> Interface:
        """From `text`. Raises: InputError for anything else."""
        try:
            facts = json.loads(text)
            channels, height, width = (int(size) for size in facts["shape"])
            outputs = tuple((str(name), tuple(int(size) for size in shape)) for name, shape in facts["outputs"])
            name, batch = str(facts["input"]), int(facts["batch"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise InputError(f"The graph's metadata {GIVEN} tell no interface ({error!r}). Export it again.") from error
        if min(channels, height, width) < 1 or batch < 0 or not outputs:
            raise InputError(f"The graph's metadata {GIVEN} tell no interface: {text[:200]}. Export it again.")
        return cls(name, (channels, height, width), batch, outputs)

    def pieces(self, count: int) -> Iterator[tuple[int, int]]:
        """Where each call begins and ends in `count` images; the last may be short of what the graph takes."""
        step = self.batch or max(count, 1)
        for start in range(0, count, step):
            yield start, min(start + step, count)

    def rows(self, run: Run, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """images (n, channels, h, w) → (n, all outputs of an image in a row), as many at a time as `run` takes; a short
        piece is filled up with its last image."""
        found = []
        for start, end in self.pieces(len(images)):
            piece = images[start:end]
            short = max(0, self.batch - len(piece))
            if short:
                piece = np.concatenate([piece, np.repeat(piece[-1:], short, 0)])
            parts = [np.asarray(output).reshape(len(piece), -1) for output in run(piece)]
            found.append(np.concatenate(parts, 1)[: end - start])
        return np.concatenate(found)
