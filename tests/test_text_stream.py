"""Text from tokens, piece by piece."""

import random

import pytest

from compress.runtime.text_stream import Detokenizer, StopText


def from_bytes(ids: list[int]) -> str:
    """A tokenizer of single bytes."""
    return bytes(ids).decode("utf8", errors="replace")


def from_words(ids: list[int]) -> str:
    """A tokenizer whose words begin with a space, which the first one loses."""
    return "".join(f" w{token}" for token in ids).removeprefix(" ")


def pieces_of(detokenizer: Detokenizer, tokens: list[int]) -> list[str]:
    return [*(detokenizer.add(token) for token in tokens), detokenizer.flush()]


@pytest.mark.parametrize(
    "text", ["plain", "größe ∑ 漢字 🙂🙂 e\u0301", "🙂", "", "\ufffd in the midst \ufffd", "end \ufffd"]
)
def test_pieces_add_up_and_none_holds_half_a_character(text: str) -> None:
    pieces = pieces_of(Detokenizer(from_bytes), list(text.encode()))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert len([piece for piece in pieces if piece]) == len(text)  # each shown as soon as it is whole


def test_random_bytes_give_what_decoding_them_at_once_gives() -> None:
    maker = random.Random(0)
    for _ in range(200):
        tokens = [maker.choice([0x41, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x99, 0x82, 0xFF]) for _ in range(12)]
        assert "".join(pieces_of(Detokenizer(from_bytes), tokens)) == from_bytes(tokens)


def test_bytes_that_are_no_character_hold_nothing_up_once_text_follows() -> None:
    assert pieces_of(Detokenizer(from_bytes), [0xFF, 0x41, 0x42]) == ["", "\ufffdA", "B", ""]


def test_the_space_between_a_prompt_and_its_first_word_is_kept() -> None:
    assert "".join(pieces_of(Detokenizer(from_words, [1, 2]), [3, 4])) == " w3 w4"
    assert "".join(pieces_of(Detokenizer(from_words), [3, 4])) == "w3 w4"


def test_a_character_begun_in_the_prompt_is_shown_whole() -> None:
    assert pieces_of(Detokenizer(from_bytes, [0x41, 0xE2, 0x82]), [0xAC]) == ["€", ""]


def test_only_the_last_tokens_are_decoded_again() -> None:
    lengths: list[int] = []

    def decode(ids: list[int]) -> str:
        lengths.append(len(ids))
        return from_bytes(ids)

    pieces_of(Detokenizer(decode, [65] * 500), [65] * 500)
    assert max(lengths) <= 10


def slow_stop(text: str, stops: list[str]) -> str:
    """Character by character: cut before the stop that is complete first, of several the longest."""
    for end in range(len(text) + 1):
        hits = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(hits)]
    return text


@pytest.mark.parametrize("stops", [["ab"], ["aab", "ba"], ["abab", "b"], ["aaa"], ["bb", "abb"], []])
def test_stop_texts_cut_where_the_definition_cuts_however_the_text_comes(stops: list[str]) -> None:
    maker = random.Random(1)
    for _ in range(300):
        text, stream, shown, place = "".join(maker.choice("abc") for _ in range(12)), StopText(stops), "", 0
        while place < len(text) and not stream.found:
            size = maker.randint(0, 3)
            shown += stream.add(text[place : place + size])
            place += size
        assert shown + stream.flush() == slow_stop(text, stops)
        assert stream.found == any(stop in text for stop in stops)


def test_what_cannot_begin_a_stop_text_is_shown_at_once() -> None:
    stream = StopText(["END"])
    assert [stream.add(piece) for piece in ("a", "E", "N", "x", "ENDb")] == ["a", "", "", "ENx", ""]
    assert stream.found and stream.add("more") == "" and stream.flush() == ""
