"""Reading a report back: a file from anywhere, so nothing in it is trusted before it is checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.errors import InputError, UsageError
from compress.records import REPORT_SCHEMA, Report
from compress.report.format import clean

MAX_BYTES = 256 * 1024 * 1024  # a report of ten thousand layers takes a few; more is not a report
_MAX_PROBLEMS = 3


def load(path: str | Path) -> Report:
    """Read `report.json`, or the one in an artifact's folder."""
    file = Path(path)
    file = file / "report.json" if file.is_dir() else file
    text = _read(file)
    _check_version(file, _parse(file, text))
    try:
        return Report.model_validate_json(text)
    except ValidationError as error:
        raise InputError(f"{file}: not a valid report: {_problems(error)}. `compress run` writes it anew.") from error


def _read(file: Path) -> bytes:
    if not file.exists():
        raise UsageError(f"There is no report at {file}. A run writes it as OUT/report.json.")
    if not file.is_file():
        raise InputError(f"{file} is no regular file. A report is one JSON object.")
    try:
        length = file.stat().st_size
        if length > MAX_BYTES:
            raise InputError(f"{file}: {length} bytes, a report may have {MAX_BYTES} at most.")
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}.") from error


def _parse(file: Path, text: bytes) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{file}: not JSON: {error.msg} at {where}. A report is one JSON object.") from error
    except (UnicodeDecodeError, RecursionError, ValueError) as error:  # ValueError: a number of too many digits
        raise InputError(f"{file}: not JSON: {clean(str(error))}. A report is one JSON object.") from error


def _check_version(file: Path, found: Any) -> None:
    if not isinstance(found, dict):
        raise InputError(f"{file}: found a JSON {type(found).__name__}, a report is one JSON object.")
    if found.get("kind") == "sweep":
        raise UsageError(f"{file} is the report of several recipes. Give the folder of one: variants/NAME beside it.")
    version = found.get("schema_version")
    if type(version) is int and version == REPORT_SCHEMA:  # True == 1, and is no version
        return
    shown = clean(repr(version)) if "schema_version" in found else "none"
    hint = " Read it with a newer release of compress." if type(version) is int and version > REPORT_SCHEMA else ""
    raise InputError(f"{file}: schema_version found: {shown}; allowed: {REPORT_SCHEMA}.{hint}")


def _problems(error: ValidationError) -> str:
    found = error.errors(include_url=False)
    shown = [
        f"{clean('.'.join(str(part) for part in problem['loc']))}: {clean(problem['msg'])}, "
        f"found {clean(repr(problem['input']), limit=80)}"
        for problem in found[:_MAX_PROBLEMS]
    ]
    more = f" (and {len(found) - _MAX_PROBLEMS} more)" if len(found) > _MAX_PROBLEMS else ""
    return "; ".join(shown) + more
