"""What an exported graph of texts or arrays takes, and a user's texts or arrays as its rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import InputError, UsageError, unread
from compress.files import read_json
from compress.inputs.arrays import check_arrays, filled, read_npz, tokens_of
from compress.inputs.documents import read_lines
from compress.inputs.pictures import NAME
from compress.models.folder import load_tokenizer
from compress.models.onnx_interface import Floats, Interface


@dataclass(frozen=True, eq=False)
class ArrayInput:
    """folder: an exported one, with the tokenizer of a model of texts; longest: tokens of the longest text."""

    folder: Path
    interface: Interface
    longest: int

    @cached_property
    def tokenizer(self) -> Any:
        """That of the folder, None where it has none. Raises: InputError for a broken one."""
        return load_tokenizer(self.folder)

    @classmethod
    def read(cls, folder: Path) -> ArrayInput:
        """From the preprocessing.json of an exported folder. Raises: InputError."""
        path = folder / NAME
        try:
            content: dict[str, Any] = read_json(path)
            return cls(folder, Interface.read(json.dumps(content["interface"])), int(content["longest"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} does not say how inputs are made ({unread(error)}). Export the artifact again."
            ) from error

    def rows(self, given: Any, truncate: bool = False) -> tuple[list[str], Floats]:
        """Names and rows of a file (.npz, or texts), of arrays by name, or of one text or a list of texts or ids.

        Raises: UsageError for what is of another kind or too long (unless truncate), InputError for a malformed file.
        """
        if isinstance(given, Path) and (given.suffix == ".npz" or not self.interface.is_text):
            given = read_npz(given, self.interface)
        if isinstance(given, Mapping):
            rows = self.interface.joined(check_arrays(Path("The arrays"), given, self.interface))
            return [str(place) for place in range(len(rows))], rows
        if not self.interface.is_text:
            names = ", ".join(feed.name for feed in self.interface.inputs)
            raise UsageError(f"{self.folder} takes no texts. Give an .npz, or arrays by name: {names}.")
        return self._texts(given, truncate)

    def _texts(self, given: Any, truncate: bool) -> tuple[list[str], Floats]:
        where = "The input"
        if isinstance(given, Path):
            where, documents = str(given), read_lines(given)
        else:
            documents = [given] if isinstance(given, str) else list(given)
        if not documents:
            raise UsageError(f"{where} holds no text. Give one or more.")
        ids, cut, pad = tokens_of(documents, self.interface, self.tokenizer, self.longest, where)
        if cut and not truncate:
            raise UsageError(
                f"{where} holds {cut} text(s) of more than {self.longest} tokens, the longest that "
                "it takes. Shorten them, or cut all texts there with --truncate (truncate=True)."
            )
        rows = self.interface.of_tokens(*filled(ids, self.interface, pad))
        return [text if isinstance(text, str) else str(place) for place, text in enumerate(documents)], rows

    def named(self, rows: Floats, found: Floats) -> dict[str, NDArray[Any]]:
        """Outputs by name, each (n, its shape), from all of them in a row."""
        shapes = self.interface.shapes(self.interface.length_of(rows.shape[1:]))
        parts = np.split(found, np.cumsum([prod(shape) for _, shape in shapes])[:-1], axis=1)
        return {name: part.reshape(len(part), *shape) for (name, shape), part in zip(shapes, parts, strict=True)}


def first_text(source: str | Path) -> str:
    """Of a file; empty where it holds token ids."""
    found = next(iter(read_lines(source)), "")
    return found if isinstance(found, str) else ""
