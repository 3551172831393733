"""One request from beginning to end, told apart into its spans, of every kind of model (design §7)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from compress.inputs.array_input import ArrayInput
from compress.inputs.pictures import ImageInput, read_pictures
from compress.inputs.prompts import Reader
from compress.models.embedding import pool_hidden
from compress.runtime.generation import padded
from compress.speed.spans import AFTER, BEFORE, COMPUTE, Request, Stopwatch
from compress.target import Runner, Session


def text_request(runner: Runner, reader: Reader, text: str, count: int) -> Request:
    """Text → tokens → the prompt read and `count` tokens made, the likeliest each time → text. No end ends it: a model
    that stops earlier would look faster."""
    alive = np.ones(1, np.bool_)

    def request(watch: Stopwatch) -> str:
        watch.begin()
        batch = padded([reader.prompt(text)], reader.pad, left=True)
        watch.lap(BEFORE)
        logits = runner.start(*batch)
        watch.lap(COMPUTE)
        tokens = [int(logits[0].argmax())]
        while len(tokens) < count:
            last = np.array(tokens[-1:], np.int64)
            watch.lap(AFTER)
            logits = runner.step(last, alive)
            watch.lap(COMPUTE)
            tokens.append(int(logits[0].argmax()))
        made = reader.decode(tokens)
        watch.lap(AFTER)
        return made

    return request


def encoder_request(runner: Runner, reader: Reader, text: str) -> Request:
    """Text → tokens → hidden states → their mean."""

    def request(watch: Stopwatch) -> Any:
        watch.begin()
        ids, mask = padded([reader.text(text, "The text", truncate=True)], reader.pad, left=False)
        watch.lap(BEFORE)
        hidden = runner.hidden(ids, mask)
        watch.lap(COMPUTE)
        made = pool_hidden(hidden, mask, "mean")
        watch.lap(AFTER)
        return made

    return request


def image_request(session: Session, images: ImageInput, picture: Path) -> Request:
    """File → pixels → inputs → logits → the likeliest class."""

    def request(watch: Stopwatch) -> int:
        watch.begin()
        values = images.prepare(read_pictures(picture, images.shape)[1])
        watch.lap(BEFORE)
        logits = session.logits(values)
        watch.lap(COMPUTE)
        made = int(logits[0].argmax())
        watch.lap(AFTER)
        return made

    return request


def rows_request(session: Session, inputs: ArrayInput, text: str) -> Request:
    """Text → tokens → outputs by name."""

    def request(watch: Stopwatch) -> Any:
        watch.begin()
        rows = inputs.rows(text, truncate=True)[1]
        watch.lap(BEFORE)
        found = session.logits(rows)
        watch.lap(COMPUTE)
        made = inputs.named(rows, found)
        watch.lap(AFTER)
        return made

    return request
