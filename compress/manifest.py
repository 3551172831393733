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
from compress.files import read_json, write_text

SCHEMA = 1
NAME = "manifest.json"
ADDED = "added"
"""Key of the names of files that `note` took in: not what the artifact was made with, though listed in `files`."""
PAGES = ("report.html", "report.md")
"""Files of an artifact that may be made anew."""
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
    save(folder, content)


def save(folder: Path, content: Mapping[str, Any]) -> None:
    """Put a manifest in place, whole at any time."""
    write_text(folder / NAME, json.dumps(content, indent=1, sort_keys=True) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """The manifest as a dict. Raises: InputError when it is missing, malformed or of another schema."""
    path = folder / NAME
    if not path.is_file():
        raise InputError(
            f"{folder} has no {NAME}: it is not an artifact of `compress run` (or the run did not finish)."
        )
    try:
        content: dict[str, Any] = read_json(path)
        schema = content["schema_version"]
        if not isinstance(content["files"], dict):
            raise TypeError("'files' is no object")
    except (OSError, ValueError, KeyError, TypeError) as error:
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
    problems += [f"not a regular file: {name}" for name in _odd(folder)]
    if problems:
        problems += [f"not in the manifest: {name}" for name in extra]
        raise InputError(f"{folder} is not as it was written: {'; '.join(problems[:8])}. Copy or build it again.")
    if extra:
        more = f" and {len(extra) - 8} more" if len(extra) > 8 else ""
        raise InputError(
            f"{folder} holds what is not in the manifest: {', '.join(extra[:8])}{more}. The artifact itself is whole: "
            "an extra file is harmless to delete. Delete or move it, then repeat the command."
        )
    return content


def _odd(folder: Path) -> list[str]:
    """Pipes, devices and links to nowhere: whoever opens one may wait for ever."""
    paths = (path for path in sorted(folder.rglob("*")) if not path.is_file() and not path.is_dir())
    return [path.relative_to(folder).as_posix() for path in paths]


def holding(path: Path) -> list[Path]:
    """The folders of artifacts that a path lies in, the innermost first (a variant's, then its sweep's)."""
    found = []
    for folder in _real(path).parents:
        try:
            found += [folder] if (folder / NAME).is_file() and read(folder) else []
        except (InputError, OSError):  # a manifest.json of something else
            continue
    return found


def is_part(path: Path) -> bool:
    """Whether a path is a file that an artifact was made with, other than its pages and what `note` took in."""
    for folder in holding(path)[:1]:
        content, name = read(folder), _real(path).relative_to(folder).as_posix()
        return name == NAME or (name in content["files"] and name not in (*PAGES, *content.get(ADDED, ())))
    return False


def note(path: Path) -> None:
    """Take a file that was written into an artifact's folder into its manifest, and that into a sweep's around it;
    does nothing for a file elsewhere. Manifests are whole at any time: a kill on the way leaves an extra file."""
    changed = [_real(path)]
    for folder in holding(path):
        content, names = read(folder), [each.relative_to(folder).as_posix() for each in changed]
        content["files"] |= {name: _facts(folder / name) for name in names}
        if len(changed) == 1 and names[0] not in PAGES:
            content[ADDED] = sorted({*content.get(ADDED, ()), names[0]})
        save(folder, content)
        changed.append(folder / NAME)


def _real(path: Path) -> Path:
    """Absolute, its folder without links."""
    return path.absolute().parent.resolve() / path.name
