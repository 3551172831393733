"""Which of ONNX Runtime's execution providers take a graph here: the list of those compiled in proves nothing."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

REMOTE = "AzureExecutionProvider"  # takes any graph, and computes nothing on this machine
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_LOADING = re.compile(r"with error: (.+)")
_LOGGED = re.compile(r"^\S+ \S+ \[[EF]:[^\]]*\] (?:.*? : FAIL : )?(.+)", re.M)


@dataclass(frozen=True)
class Provider:
    """name: without "ExecutionProvider"; problem: why it takes no graph here, empty where it does."""

    name: str
    problem: str


def probe_providers(runtime: Any, graph: bytes) -> list[Provider]:
    """Each that is compiled in. runtime: the module onnxruntime; graph: that they are to take. What its libraries print
    meanwhile is kept back."""
    return [_probe(runtime, name, graph) for name in runtime.get_available_providers() if name != REMOTE]


def _probe(runtime: Any, name: str, graph: bytes) -> Provider:
    short, options, told = name.removesuffix("ExecutionProvider"), runtime.SessionOptions(), ""
    with captured_stderr() as printed:
        try:
            session = runtime.InferenceSession(graph, options, providers=[name], enable_fallback=0)
            taken = session.get_providers()[0] == name
        except Exception as error:  # onnxruntime raises its own kinds, which share no base but Exception
            taken, told = False, str(error)
        printed.seek(0)
        logged = printed.read().decode("utf8", "replace")
    return Provider(short, "" if taken else reason(logged, told))


def reason(logged: str, raised: str) -> str:
    """The library that is missing, or the first error, in a line. logged: from the runtime's log; raised: its error."""
    text = _COLOUR.sub("", logged)
    found = _LOADING.search(text) or _LOADING.search(raised) or _LOGGED.search(text)
    if found is not None:
        return found[1].strip()[:200]
    return (raised.strip().splitlines() or ["it takes no graph here"])[0][:200]


@contextmanager
def captured_stderr() -> Iterator[IO[bytes]]:
    """A file that holds what is printed on standard error meanwhile, also by libraries that know no Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(kept, 2)
            os.close(kept)
