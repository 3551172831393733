"""What `compress predict` prints and writes: arrays, rows for JSON, and lines for people."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.embedding import Pool
from compress.engine import Engine
from compress.errors import ResourceError
from compress.prompts import read_texts
from compress.sampling import softmax
from compress.store import umask

Arrays = dict[str, NDArray[Any]]
Rows = tuple[Arrays, list[dict[str, Any]], list[str]]


def class_rows(engine: Engine, source: str | Path, top: int, batch: int) -> Rows:
    """Images → arrays names (n,), logits, probabilities (n, classes); rows and lines with the `top` likeliest."""
    names, logits = engine.classify_files(source, batch)
    chances = softmax(logits).astype(np.float32)
    rows, lines = [], []
    for name, values in zip(names, chances, strict=True):
        best = [(int(place), float(values[place])) for place in np.argsort(-values, kind="stable")[:top]]
        rows.append({"input": name, "classes": [{"class": place, "probability": chance} for place, chance in best]})
        lines.append(f"{name}: " + ", ".join(f"class {place} {chance:.1%}" for place, chance in best))
    return {"names": np.array(names), "logits": logits, "probabilities": chances}, rows, lines


def text_rows(
    engine: Engine, source: str | Path | None, texts: Sequence[str], pool: Pool, batch: int, truncate: bool
) -> Rows:
    """Texts → array embeddings (n, hidden), or for pool "none" hidden (all tokens, hidden) and offsets (n + 1,), of
    which a text's tokens lie between its own and the next; a line is a JSON object."""
    engine.require_encoder()  # before a file is read in vain
    given: Sequence[Any] = read_texts(source) if source is not None else texts
    found = engine.predict(given, pool=pool, batch=batch, truncate=truncate)
    key = "text" if isinstance(given[0], str) else "ids"
    word = "hidden" if pool == "none" else "embedding"
    rows = [{key: text, word: values.tolist()} for text, values in zip(given, found, strict=True)]
    lines = [json.dumps(row) for row in rows]
    if isinstance(found, np.ndarray):
        return {"embeddings": found}, rows, lines
    offsets = np.cumsum([0, *(len(values) for values in found)])
    return {"hidden": np.concatenate(found), "offsets": offsets}, rows, lines


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """An .npz, complete or absent. Raises: ResourceError where it cannot be written."""
    name = ""
    try:
        with tempfile.NamedTemporaryFile(dir=path.absolute().parent, suffix=".npz", delete=False) as stream:
            name = stream.name
            np.savez(stream, **arrays)  # type: ignore[arg-type]
        Path(name).chmod(0o666 & ~umask())  # a temporary file is its owner's alone
        Path(name).replace(path)
    except OSError as error:
        Path(name).unlink(missing_ok=True) if name else None
        raise ResourceError(f"{path} cannot be written ({error}).") from error
