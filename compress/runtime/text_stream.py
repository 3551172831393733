"""Tokens that come one by one → text that can be shown at once: whole characters, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
"""What decoders put for bytes that are no character, or not yet."""


class Detokenizer:
    """Turns tokens into text piece by piece; the pieces add up to the text of all tokens.

    Only the tokens since the last place where a character ended are decoded again, with those before them for context
    (a decoder drops the space of a first word). Bytes of an unfinished character wait for the next token.

    Args: decode: token ids → text; before: the tokens ahead of the first one (the prompt), which give no text.
    """

    def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(before)[-CONTEXT:]
        self._start, self._end = 0, len(self._ids)
        self._settled = decode(self._ids).rstrip(UNFINISHED) if self._ids else ""

    def add(self, token: int) -> str:
        """The text that a token completes; often "" in the midst of a character."""
        self._ids.append(token)
        whole = self._decode(self._ids[self._start :])
        stable = whole.rstrip(UNFINISHED)
        piece = stable[len(self._settled) :]
        if len(stable) == len(whole):
            self._start, self._end = self._end, len(self._ids)
            self._settled = self._decode(self._ids[self._start : self._end])
        elif piece:
            self._settled = stable
        return piece

    def flush(self) -> str:
        """What is left at the end: a character that was never finished shows as U+FFFD."""
        whole = self._decode(self._ids[self._start :])
        piece, self._settled = whole[len(self._settled) :], whole
        return piece


CONTEXT = 8
"""Tokens of the prompt that the first new one is decoded after."""


class StopText:
    """Passes text on until one of some texts has come; it and what follows are not passed on.

    A tail that may be the beginning of one is held back until it is known.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """The text that may be shown now."""
        if self.found:
            return ""
        text = self._held + piece
        hits = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        if hits:  # the one that is complete first, however the text was cut into pieces
            self.found, self._held = True, ""
            return text[: min(hits)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
