"""`manifest.json`: every file of an artifact with its size and sha256, and what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compress.errors import InputError
from compress.files import write_text

SCHEMA = 1
NAME = "manifest.json"
Facts = dict[str, str | int]
"""Size and sha256 of a file."""
PACKAGES = ("compress", "torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "numpy")


def versions() -> dict[str, str]:
    """Versions of the packages that decide the bytes; those absent are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def code_digest() -> str:
    """Digest of this package's own source files: a changed pass must not resume what an older one began."""
    digest, root = hashlib.sha256(), Path(__file__).parent
    for folder, inner, names in os.walk(root, followlinks=True):  # a checkout links some folders in
        inner.sort()
        for path in sorted(Path(folder, name) for name in names if name.endswith(".py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def describe_files(
    folder: Path, keep: Collection[str] | None = None, known: Mapping[str, Facts] | None = None
) -> dict[str, Facts]:
    """Relative path → size and sha256 of every file but the manifest; `keep` limits it to some top entries.

    known: what an earlier call gave for files that have not been touched since.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    if keep is not None:
        paths = [path for path in paths if path.relative_to(folder).parts[0] in keep]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    found = known or {}
    return {name: found[name] if name in found else _facts(path) for name, path in names.items()}


def digests(found: Mapping[str, Facts]) -> dict[str, str]:
    """Relative path → sha256, of what `describe_files` found."""
    return {name: str(facts["sha256"]) for name, facts in found.items()}


def _facts(path: Path) -> Facts:
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write(
    folder: Path, facts: Mapping[str, Any], keep: Collection[str], known: Mapping[str, Facts] | None = None
) -> None:
    """Write the manifest over the entries of a folder that will stay.

    Args: facts: what it was made from, JSON-able; known: as `describe_files`.
    """
    content = {"schema_version": SCHEMA, **facts, "versions": versions(), "files": describe_files(folder, keep, known)}
    write_text(folder / NAME, json.dumps(content, indent=1, sort_keys=True) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """The manifest as a dict. Raises: InputError when it is missing, malformed or of another schema."""
    path = folder / NAME
    if not path.is_file():
        raise InputError(
            f"{folder} has no {NAME}: it is not an artifact of `compress run` (or the run did not finish)."
        )
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf8"))
        schema = content["schema_version"]
        assert isinstance(content["files"], dict)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise InputError(f"{path} is malformed ({error!r}). Run `compress run` again.") from error
    if schema != SCHEMA:
        raise InputError(f"{path} has schema {schema}; this version of compress reads {SCHEMA}.")
    return content


def check_files(folder: Path, keep: Collection[str] | None = None) -> dict[str, Any]:
    """Compare every file with the manifest; `keep` limits it to some top entries.

    Returns: the manifest. Raises: InputError naming each file that is missing, changed or extra.
    """
    content = read(folder)
    stated, found = content["files"], describe_files(folder, keep)
    if keep is not None:
        stated = {name: facts for name, facts in stated.items() if name.split("/")[0] in keep}
    missing = sorted(set(stated) - set(found))
    extra = sorted(set(found) - set(stated))
    changed = sorted(name for name in set(stated) & set(found) if stated[name] != found[name])
    problems = [f"missing {name}" for name in missing] + [f"changed {name}" for name in changed]
    problems += [f"not in the manifest: {name}" for name in extra]
    if problems:
        raise InputError(f"{folder} is not as it was written: {'; '.join(problems[:8])}. Copy or build it again.")
    return content
