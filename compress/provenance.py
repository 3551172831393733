"""An artifact's manifest as an in-toto statement: what signing tools attest (`compress report OUT --in-toto`).

Statement v1: https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md; its predicate is SLSA provenance
v1: https://slsa.dev/spec/v1.0/provenance. Each file of the manifest is one subject, with its digest as the manifest has
it, so signing is all that is left to do. The statement says what the maker recorded; `compress verify` holds the files
against it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from compress.errors import InputError
from compress.report.format import clean

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD = "urn:compress:run:v1"
"""What the parameters below mean: those of `compress run`."""
BUILDER = "urn:compress:local"
"""A machine of the maker's own; whom to trust is told by who signs."""
WEIGHTS = "compressWeightsV1"
"""The algorithm of a model's digest: sha256 over the names and bytes of its weight files, one after another."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def statement(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The statement of a manifest, JSON-able. Raises: InputError for a manifest with other files than names and digests
    of files below its folder."""
    return {
        "_type": STATEMENT,
        "subject": [_subject(name, facts) for name, facts in sorted(manifest["files"].items())],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD,
                "externalParameters": _external(manifest),
                "internalParameters": _known(manifest, ("calibration", "quality_digest", "task")),
                "resolvedDependencies": _dependencies(manifest),
            },
            "runDetails": {"builder": {"id": BUILDER, "version": _versions(manifest)}},
        },
    }


def _subject(name: str, facts: Any) -> dict[str, Any]:
    digest = facts.get("sha256") if isinstance(facts, Mapping) else None
    path = PurePosixPath(name)
    is_below = bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name
    if not is_below or not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise InputError(
            f"manifest.json: '{clean(name)}' with sha256 {clean(repr(digest), 80)} names no file below its folder by a "
            "digest of 64 hexadecimal digits. Make the artifact again."
        )
    return {"name": name, "digest": {"sha256": digest}}


def _external(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the user chose. Of the profile its id and target: it is a page long, and the manifest holds it whole."""
    found = _known(manifest, ("source", "recipe", "seed"))
    profile = manifest.get("profile")
    if isinstance(profile, Mapping):
        found |= {f"profile_{key}": profile[key] for key in ("id", "target") if key in profile}
    return found


def _known(manifest: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: manifest[key] for key in keys if key in manifest}


def _dependencies(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The source weights, and the packages that decide the bytes."""
    found = []
    if manifest.get("source_digest"):
        found.append({"name": str(manifest.get("source", "")), "digest": {WEIGHTS: str(manifest["source_digest"])}})
    others = {name: number for name, number in _versions(manifest).items() if name != "compress"}
    return [*found, *({"uri": f"pkg:pypi/{quote(name)}@{quote(number)}"} for name, number in sorted(others.items()))]


def _versions(manifest: Mapping[str, Any]) -> dict[str, str]:
    found = manifest.get("versions")
    return {str(name): str(number) for name, number in found.items()} if isinstance(found, Mapping) else {}
