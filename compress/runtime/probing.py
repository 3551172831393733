"""What a process of its own measures of an exported folder (`Target.probe_command`). Imports numpy only, so that the
memory is the runtime's, not ours."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from compress.memory import peak_memory
from compress.target import Session

LONG = 2048
"""Tokens of the sequence by which the size of a cache is told."""


class Probed(Session, Protocol):
    """A session that knows how long it took to load, and the shape (channels, h, w) of an image if it takes images."""

    load_s: float

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Empty for token ids."""
        ...


def probe(session: Probed, prompt: int, tokens: int) -> dict[str, float]:
    """Read a prompt, decode: seconds to load and of the first call, and peak memory: of this whole process,
    or what the session says of its device (`peak_memory`); and where it can tell, what a long sequence's keys and
    values take (`cache_use`)."""
    ids = np.ones((1, prompt), np.int64)
    started = time.perf_counter()
    if session.image_shape:
        session.logits(np.zeros((1, *session.image_shape), np.float32))
    elif session.is_decoder:
        session.greedy(ids[0].tolist(), 1)
    else:
        session.logits(ids)
    first_s = time.perf_counter() - started
    if session.is_decoder:
        session.greedy(ids[0].tolist(), tokens)
    peak: Callable[[], int] = getattr(session, "peak_memory", peak_memory)
    found = {"load_s": session.load_s, "first_call_s": first_s, "peak_memory_bytes": peak()}
    use: Callable[[], tuple[int, int]] | None = getattr(session, "cache_use", None) if session.is_decoder else None
    return found if use is None else found | dict(zip(("cache_tokens", "cache_bytes"), use(), strict=True))


def command(module: str, folder: Path, threads: int, prompt: int, tokens: int) -> list[str]:
    """What runs a runtime's module in a process of its own, as `main` reads it."""
    given = ("--threads", str(threads), "--prompt", str(prompt), "--tokens", str(tokens))
    return [sys.executable, "-m", module, str(folder), *given]


def main(load: Callable[[Path, int], Probed]) -> None:
    """The command line of a runtime's module: load a folder with so many threads, and print what is measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=8)
    given = parser.parse_args()
    print(json.dumps(probe(load(given.folder, given.threads), given.prompt, given.tokens)))
