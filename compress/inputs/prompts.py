"""What a user asks of an artifact → token ids: texts, ids, chats; and the texts of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import InputError, UsageError
from compress.inputs.documents import is_lines, read_documents
from compress.models.folder import first_line, load_tokenizer, parse_config, positions, read_object, refuse_code

Message = Mapping[str, str]
"""{"role": "user", "content": …}"""


@dataclass(frozen=True)
class Reader:
    """Turns prompts into ids. tokenizer: None where the artifact has none; vocabulary: ids are below it; longest:
    positions that the model has; ends: tokens that end a text; pad: what rows of a batch are filled up with."""

    where: str
    tokenizer: Any
    vocabulary: int
    longest: int
    ends: tuple[int, ...] = ()
    pad: int = 0

    def prompt(self, given: str | Sequence[int] | Sequence[Message], name: str = "The prompt") -> list[int]:
        """Ids to continue: of a text with the marks that the tokenizer puts before it, of a chat by the tokenizer's
        template, or as given. Raises: UsageError."""
        if not isinstance(given, str):
            is_chat = bool(given) and all(isinstance(part, Mapping) for part in given)
            ids = self._chat(given) if is_chat else [int(token) for token in given]  # type: ignore[arg-type]
        else:
            ids = self.encode(given)
        self._check(ids, name)
        if len(ids) >= self.longest:
            raise UsageError(
                f"{name} has {len(ids)} tokens; the model has positions for {self.longest} in all, so nothing can "
                "follow. Give a shorter one."
            )
        return ids

    def text(self, given: str | Sequence[int], name: str, truncate: bool = False) -> list[int]:
        """Ids to encode, with the marks that the tokenizer puts around a text; truncate: cut what is too long.

        Raises: UsageError.
        """
        ids = self._ids(given, marks=True) if isinstance(given, str) else [int(token) for token in given]
        if truncate and len(ids) > self.longest:
            ids = self._cut(given) if isinstance(given, str) else ids[: self.longest]
        self._check(ids, name)
        if len(ids) > self.longest:
            raise UsageError(
                f"{name} has {len(ids)} tokens; the model has positions for {self.longest}. Shorten it, or cut all "
                "texts there with --truncate (truncate=True)."
            )
        return ids

    def encode(self, text: str, marks: bool = True) -> list[int]:
        """Ids of a text that goes on, however long; with the marks that the tokenizer puts before it, unless it begins
        with the first of them already, as a chat's text does. Raises: UsageError."""
        begin = getattr(self.tokenizer, "bos_token", None)
        ids = self._ids(text, marks=marks and not (begin and text.startswith(begin)))
        # some tokenizers close each text, but this one goes on; an end that was typed stays
        closing = self._closing(ids) - self._closing(self._ids(text, marks=False))
        return ids[: max(1, len(ids) - closing)] if closing > 0 else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens without marks; their numbers where there is no tokenizer."""
        if self.tokenizer is None:
            return "".join(f" {token}" for token in ids)
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _ids(self, text: str, marks: bool) -> list[int]:
        if self.tokenizer is not None:
            found: list[int] = self.tokenizer(text, add_special_tokens=marks, verbose=False)["input_ids"]
            return found
        words = text.split()
        if not all(word.isascii() and word.isdigit() for word in words):
            raise UsageError(f"{self.where} has no tokenizer: give token ids, such as '1 403 407'.")
        return [int(word) for word in words]

    def _closing(self, ids: list[int]) -> int:
        """How many end tokens stand last."""
        return next((place for place, token in enumerate(reversed(ids)) if token not in self.ends), len(ids))

    def _cut(self, text: str) -> list[int]:
        """The first tokens, with the marks at both ends."""
        if self.tokenizer is None:
            return self._ids(text, marks=False)[: self.longest]
        found: list[int] = self.tokenizer(text, truncation=True, max_length=self.longest)["input_ids"]
        return found

    def _chat(self, messages: Sequence[Message]) -> list[int]:
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            what = "tokenizer" if self.tokenizer is None else "chat template"
            raise UsageError(f"{self.where} has no {what}, so it takes no chats. Give a plain text to continue.")
        for message in messages:
            if not (isinstance(message.get("role"), str) and isinstance(message.get("content"), str)):
                raise UsageError(f"A message is an object with 'role' and 'content', found {str(dict(message))[:80]}.")
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # the template is a program of its own, which refuses as it likes
            raise UsageError(
                f"The chat template of {self.where} refuses these messages: {first_line(error)}"
            ) from error
        return self._ids(str(text), marks=False)

    def _check(self, ids: Sequence[int], name: str) -> None:
        if not ids:
            raise UsageError(f"{name} is empty. Give at least one token.")
        wrong = next((token for token in ids if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            raise UsageError(f"{name} holds token {wrong}, but the vocabulary has {self.vocabulary} (ids from 0).")


def read_texts(source: str | Path) -> list[str] | list[list[int]]:
    """The texts of a file to encode: .txt one per line, .jsonl and .json one per entry (text or ids).

    Raises: UsageError for a missing file or unknown kind, InputError for a malformed one.
    """
    found = read_documents(source)
    if is_lines(source):
        lines = [line.removesuffix("\r") for line in str(found[0]).split("\n")]
        found = lines[:-1] if lines[-1] == "" else lines
        if not found:
            raise InputError(f"{source} is empty. Give one text per line.")
    return found


def read_reader(folder: Path) -> Reader:
    """How an exported language model or encoder reads its prompts. Raises: InputError."""
    raw = _object(folder / "config.json")
    refuse_code(folder / "config.json", raw)
    config = parse_config(folder, raw).get_text_config()
    given = _object(folder / "generation_config.json")
    tokenizer = load_tokenizer(folder)
    ends = given.get("eos_token_id", getattr(config, "eos_token_id", None))
    if ends is None and tokenizer is not None:
        ends = tokenizer.eos_token_id
    marks = (getattr(each, "pad_token_id", None) for each in (tokenizer, config))
    pad = next((each for each in marks if each is not None), 0)
    vocabulary = int(config.vocab_size)
    return Reader(
        str(folder),
        tokenizer,
        vocabulary,
        positions(config),
        tuple(int(end) for end in (ends if isinstance(ends, list) else [ends]) if end is not None),
        int(pad) if 0 <= int(pad) < vocabulary else 0,
    )


def _object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file. Raises: InputError."""
    return read_object(path, "Export the artifact again.") if path.is_file() else {}
