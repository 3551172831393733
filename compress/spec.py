"""The one-line text of passes and formats: `gptq(format=int4(group=128), damp=0.02)`.

Grammar:  pipeline = call {"," call}      call = name ["(" [item {"," item}] ")"]
          item = [key "="] value          value = number | true | false | null | "text" | word | list | map | call
A `word` may hold glob characters, so layer patterns need no quotes. `parse` and `Call.text` are inverse up to
white space; nothing is evaluated.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from compress.errors import UsageError, nearest

_TOKEN = re.compile(
    r"""\s*(?:(?P<text>"(?:[^"\\]|\\.)*")|(?P<mark>[(){}\[\],=])|(?P<word>[^\s(){}\[\],="]+?(?=\s*(?:[(){}\[\],="]|:\s|$|\s)))|(?P<colon>:))"""
)
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$")
_PLAIN = re.compile(r"[\w.*?:/-]+$")
DEEPEST = 50
"""Values inside each other."""
SHOWN = 200
"""Characters of a text in an error."""
_CONSTANTS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class Call:
    """`name(args…, key=value…)` as data. Values: numbers, booleans, None, strings, lists, dicts, calls."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """The canonical text, which parses back to an equal call."""
        items = [print_value(value) for value in self.args]
        items += [f"{key}={print_value(value)}" for key, value in self.kwargs.items()]
        return f"{self.name}({', '.join(items)})" if items else self.name

    def require_known(self, settings: Collection[str]) -> None:
        """Raises: UsageError for a setting (`key=value`) that is none of these."""
        unknown = sorted(set(self.kwargs) - set(settings))
        if unknown:
            raise UsageError(f"{self.name}: unknown setting '{unknown[0]}'.{nearest(unknown[0], settings)}")


def print_value(value: Any) -> str:
    """One value in the grammar above."""
    if isinstance(value, Call):
        return value.text()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{print_value(k)}: {print_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(print_value(item) for item in value) + "]"
    if not isinstance(value, str):
        return _print_other(value)
    is_plain = _PLAIN.match(value) and not value.endswith(":")
    return value if is_plain and value not in _CONSTANTS and not _NUMBER.match(value) else json.dumps(value)


def _print_other(value: Any) -> str:
    try:
        return json.dumps(value)
    except TypeError as error:  # YAML has dates, bytes and sets
        raise UsageError(
            f"{reprlib.repr(value)} is no value of a setting. Give a number, true, false, null, a text, list or map."
        ) from error


def parse_pipeline(text: str) -> tuple[Call, ...]:
    """Parse `a(…), b(…)`.

    Raises: UsageError naming the place where the text stops making sense.
    """
    reader = _Reader(text)
    calls = [reader.call()]
    while reader.accept(","):
        calls.append(reader.call())
    reader.end()
    return tuple(calls)


def parse_call(text: str) -> Call:
    """Parse exactly one call."""
    reader = _Reader(text)
    call = reader.call()
    reader.end()
    return call


class _Reader:
    """Recursive descent over the tokens of one line."""

    def __init__(self, text: str) -> None:
        self.text = text if len(text) <= SHOWN else text[:SHOWN] + "…"
        self.tokens = self._scan(text.rstrip())
        self.position = 0
        self.length, self.depth = len(text), 0

    def _scan(self, text: str) -> list[tuple[str, str, int]]:
        tokens, at = [], 0
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise UsageError(f"Cannot read '{self.text}' at character {at + 1}: '{text[at : at + 12]}'.")
            kind = str(match.lastgroup)
            tokens.append((kind, match.group(kind), match.start(kind)))
            at = match.end()
        return tokens

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.position][:2] if self.position < len(self.tokens) else ("end", "")

    def accept(self, mark: str) -> bool:
        kind, found = self.peek()
        if kind == "text" or found != mark:
            return False
        self.position += 1
        return True

    def expect(self, mark: str) -> None:
        if not self.accept(mark):
            raise self.error(f"'{mark}'")

    def error(self, wanted: str) -> UsageError:
        at = self.tokens[self.position][2] if self.position < len(self.tokens) else self.length
        found = self.peek()[1][:SHOWN] or "the end"
        return UsageError(
            f"Cannot read '{self.text}': at character {at + 1} {wanted} was expected, found '{found}'. "
            "The form is name(setting=value, …), …"
        )

    def end(self) -> None:
        if self.peek()[0] != "end":
            raise self.error("',' or the end")

    def word(self) -> str:
        kind, found = self.peek()
        if kind != "word":
            raise self.error("a name")
        self.position += 1
        return found

    def call(self) -> Call:
        name = self.word()
        return self.arguments(name) if self.accept("(") else Call(name)

    def arguments(self, name: str) -> Call:
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        while not self.accept(")"):
            self.item(args, kwargs)
            if self.peek()[1] != ")":
                self.expect(",")
        return Call(name, tuple(args), kwargs)

    def item(self, args: list[Any], kwargs: dict[str, Any]) -> None:
        follows = self.tokens[self.position + 1][1] if self.position + 1 < len(self.tokens) else ""
        if follows != "=":
            args.append(self.value())
            return
        key = self.word()
        self.expect("=")
        if key in kwargs:
            raise UsageError(f"Cannot read '{self.text}': setting '{key}' is given twice. Keep one of them.")
        kwargs[key] = self.value()

    def value(self) -> Any:
        self.depth += 1
        if self.depth > DEEPEST:
            raise UsageError(f"Cannot read '{self.text}': it is nested deeper than {DEEPEST} values.")
        found = self.inner_value()
        self.depth -= 1
        return found

    def inner_value(self) -> Any:
        if self.peek()[0] == "text":
            return self.literal('a text with escapes as in JSON (\\" \\\\ \\n \\u00e9)')
        if self.accept("["):
            return self.sequence()
        if self.accept("{"):
            return self.mapping()
        if self.is_number():
            return self.literal("a number as in JSON (4, -1, 0.5, 1e-3)")
        word = self.word()
        if self.accept("("):
            return self.arguments(word)
        return _CONSTANTS.get(word, word)

    def is_number(self) -> bool:
        """`.5` and `+5` are words, which settings of type number read by themselves."""
        kind, found = self.peek()
        return kind == "word" and _NUMBER.match(found) is not None and not found.startswith((".", "+"))

    def literal(self, wanted: str) -> Any:
        """A token in JSON's own form."""
        try:
            value = json.loads(self.peek()[1])
        except ValueError as error:  # 04, 1., a bad escape
            raise self.error(wanted) from error
        self.position += 1
        return value

    def sequence(self) -> list[Any]:
        items = []
        while not self.accept("]"):
            items.append(self.value())
            if self.peek()[1] != "]":
                self.expect(",")
        return items

    def mapping(self) -> dict[str, Any]:
        items: dict[Any, Any] = {}
        while not self.accept("}"):
            if self.peek()[1] in ("[", "{"):
                raise self.error("a name")
            key = self.value()
            if isinstance(key, Call) or key in items:
                raise UsageError(f"Cannot read '{self.text}': {print_value(key)} is no name, or is given twice.")
            self.expect(":")
            items[key] = self.value()
            if self.peek()[1] != "}":
                self.expect(",")
        return items
