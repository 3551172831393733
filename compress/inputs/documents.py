"""Files of texts or token ids, as lists of documents."""

from __future__ import annotations

import gzip
import importlib
import lzma
from pathlib import Path
from typing import Any

from compress.errors import InputError, UsageError
from compress.files import parse_json

SUFFIXES = (".txt", ".jsonl", ".json")
KINDS = ".txt, .jsonl (text or ids), .json (lists of ids), each also .gz or .xz, or module:callable"
OTHERS = "for a model of images .npz (images, labels) or a folder of images per class"
MOST_BYTES = 1 << 30
"""Of a file of texts, unpacked: a kilobyte can unpack to a thousand."""


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
        raise UsageError(f"No such data file: {path}. Allowed: {KINDS}; {OTHERS}.")
    name = _unpacked(path)
    if not name.endswith(SUFFIXES):
        raise UsageError(f"{path}: data of this kind is not read. Allowed: {KINDS}.")
    try:
        text = _read_text(path)
        if name.endswith(".txt"):
            documents: list[Any] = [text]
        elif name.endswith(".jsonl"):
            documents = [_from_row(_parsed(line, place, path), path) for place, line in _lines(text)]
        else:
            documents = parse_json(text)
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}). Allowed: {KINDS}, UTF-8.") from error
    checked: list[str] | list[list[int]] = _checked(documents, path)
    return checked


def _unpacked(path: Path) -> str:
    """The name that says what is in a file."""
    return path.name.removesuffix(".gz").removesuffix(".xz")


def _read_text(path: Path) -> str:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "rb") as stream:
        content: bytes = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise InputError(f"{path} holds more than {MOST_BYTES >> 20:,} MiB of text. Give a part of it.")
    return content.decode("utf8")


def _lines(text: str) -> list[tuple[int, str]]:
    """Lines that are not blank, by number. JSON strings may hold U+2028 and the like, where `splitlines` cuts."""
    return [(place, line) for place, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parsed(line: str, place: int, path: Path) -> Any:
    try:
        return parse_json(line)
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
    if is_text:
        _check_characters(documents, path)
    return documents


def _check_characters(documents: list[str], path: Path) -> None:
    """JSON can write half a character, which no tokenizer takes. Raises: InputError."""
    try:
        for text in documents:
            text.encode("utf8")
    except UnicodeEncodeError as error:
        raise InputError(f"{path}: a text holds half a character ({error.reason}). Write it anew as UTF-8.") from error


def is_lines(source: str | Path) -> bool:
    """Whether a file is plain text."""
    return _unpacked(Path(source)).endswith(".txt")


def read_lines(source: str | Path) -> list[Any]:
    """As `read_documents`, but of plain text one for each line that is not blank, which may be none."""
    documents = list[Any](read_documents(source))
    return [line for line in documents[0].splitlines() if line.strip()] if is_lines(source) else documents


def read_labels(source: str | Path) -> list[int]:
    """The `label` of each row of a .jsonl, whole numbers from 0. Raises: UsageError for another kind of file,
    InputError for a row without one."""
    path = Path(source)
    if not _unpacked(path).endswith(".jsonl"):
        raise UsageError(
            f"{path}: the texts of a classifier have labels. Give a .jsonl of rows such as "
            '{"text": "…", "label": 1}, or an .npz with its inputs and an array labels.'
        )
    found = []
    for place, line in _lines(_read_text(path)):
        row = _parsed(line, place, path)
        label = row.get("label") if isinstance(row, dict) else None
        if type(label) is not int or label < 0:
            raise InputError(f"{path}, line {place}: label is {label!r}; a whole number from 0 is wanted.")
        found.append(label)
    return found
