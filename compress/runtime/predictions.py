"""What `compress predict` prints and writes: arrays, rows for JSON, and lines for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import ResourceError, UsageError
from compress.files import whole_file
from compress.inputs.prompts import read_texts
from compress.models.embedding import Pool
from compress.models.model import Task
from compress.runtime.engine import Engine
from compress.runtime.sampling import softmax

Arrays = dict[str, NDArray[Any]]
Rows = tuple[Arrays, list[dict[str, Any]], list[str]]


def image_rows(engine: Engine, source: str | Path, top: int | None, batch: int) -> Rows:
    """`class_rows` or, where a model puts out something else, `output_rows`. Raises: UsageError for a top of these."""
    if not engine.outputs:
        return class_rows(engine, source, top or 5, batch)
    if top is not None:
        names = ", ".join(name for name, _ in engine.outputs)
        raise UsageError(f"{engine.folder} puts out {names}, not classes, which --top is for. Leave it out.")
    return output_rows(engine, source, batch)


def array_rows(engine: Engine, given: Any, top: int | None, batch: int, truncate: bool) -> Rows:
    """Of a graph of texts or arrays: as `class_rows`, or `output_rows`. Raises: UsageError for a top of outputs that
    are no classes."""
    if top is not None and engine.task is not Task.CLASSIFIER:
        raise UsageError(f"{engine.folder} puts out no classes, which --top is for. Leave it out.")
    names, found = engine.apply(given, batch, truncate)
    if engine.task is Task.CLASSIFIER:
        return _class_rows(names, next(iter(found.values())), top or 5)
    return _output_rows(names, found)


def class_rows(engine: Engine, source: str | Path, top: int, batch: int) -> Rows:
    """Images → arrays names (n,), logits, probabilities (n, classes); rows and lines with the `top` likeliest."""
    return _class_rows(*engine.classify_files(source, batch), top)


def _class_rows(names: list[str], logits: NDArray[Any], top: int) -> Rows:
    chances = softmax(logits).astype(np.float32)
    rows, lines = [], []
    for name, values in zip(names, chances, strict=True):
        best = [(int(place), float(values[place])) for place in np.argsort(-values, kind="stable")[:top]]
        rows.append({"input": name, "classes": [{"class": place, "probability": chance} for place, chance in best]})
        lines.append(f"{name}: " + ", ".join(f"class {place} {chance:.1%}" for place, chance in best))
    return {"names": np.array(names), "logits": logits, "probabilities": chances}, rows, lines


def output_rows(engine: Engine, source: str | Path, batch: int) -> Rows:
    """Images → arrays names (n,) and each output (n, its shape) by name; rows and lines with shapes and ranges."""
    names, flat = engine.classify_files(source, batch)
    sizes = [prod(shape) for _, shape in engine.outputs]
    parts = np.split(flat, np.cumsum(sizes)[:-1], axis=1)
    found = {name: part.reshape(len(part), *shape) for (name, shape), part in zip(engine.outputs, parts, strict=True)}
    return _output_rows(names, found)


def _output_rows(names: list[str], found: Arrays) -> Rows:
    rows, lines = [], []
    for place, name in enumerate(names):
        spans = {key: (float(array[place].min()), float(array[place].max())) for key, array in found.items()}
        rows.append({"input": name, "outputs": {key: {"min": low, "max": high} for key, (low, high) in spans.items()}})
        shown = [f"{key} {list(found[key].shape[1:])} from {low:g} to {high:g}" for key, (low, high) in spans.items()]
        lines.append(f"{name}: {', '.join(shown)}")
    return {"names": np.array(names), **found}, rows, lines


def text_rows(
    engine: Engine, source: str | Path | None, texts: Sequence[str], pool: Pool, batch: int, truncate: bool
) -> Rows:
    """Texts → array embeddings (n, hidden), or for pool "none" hidden (all tokens, hidden) and offsets (n + 1,), of
    which a text's tokens lie between its own and the next; a line is a JSON object."""
    engine.require_encoder()  # before a file is read in vain
    given: Sequence[Any] = read_texts(source) if source is not None else texts
    found = engine.predict(given, pool=pool, batch=batch, truncate=truncate)
    assert not isinstance(found, dict)
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
    try:
        with whole_file(path) as beside, beside.open("wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise ResourceError(f"{path} cannot be written ({error}).") from error
