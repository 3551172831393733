"""Reading a sweep's report back, as little trusted as any file."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from compress.errors import InputError
from compress.files import read_json
from compress.sweep.records import SWEEP_SCHEMA, Sweep

_START = 4096  # characters in which a sweep names itself


def load_sweep(path: str | Path) -> Sweep | None:
    """`report.json`, or the one in a sweep's folder; None where it is no sweep's. Raises: InputError."""
    file = Path(path)
    file = file / "report.json" if file.is_dir() else file
    if not file.is_file():  # a pipe would never end
        return None
    try:
        with file.open(encoding="utf8") as stream:
            if '"kind": "sweep"' not in stream.read(_START):
                return None
        content = read_json(file)
    except (OSError, ValueError):
        return None  # whoever reads it as a report says what is wrong
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SWEEP_SCHEMA:
        raise InputError(f"{file}: a sweep of schema {version!r}; this version of compress reads {SWEEP_SCHEMA}.")
    try:
        return Sweep.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{file}: not a valid sweep: {where}: {first['msg']}. `compress run` writes it anew."
        ) from error
