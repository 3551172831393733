"""What a report could not say when it was written, added where the artifact meets the machine that it is for.

An engine that only that machine can build, and how far the artifact was checked: `compress verify` raises the report's
level (`checked`, `built`, `ran`) when it gets further, and never lowers it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress import manifest
from compress import report as reports
from compress.errors import UnsupportedError
from compress.files import write_text
from compress.records import Report, Verification
from compress.target import Target

LEVELS = ("checked", "built", "ran")
REPORT = "report.json"


def build_missing(folder: Path, target: Target, timing_cache: Path | None) -> bool:
    """Build what only this machine can, by the target's function `complete` if it has one, and note the files in the
    manifest. Returns: whether anything was built. Raises: as that; UnsupportedError for a timing cache without use."""
    complete: Callable[[Path, Path | None], bool] | None = getattr(target, "complete", None)
    if complete is None:
        if timing_cache is not None:
            raise UnsupportedError(
                f"{folder} is for {target.RUNTIME}, which builds no engines: leave --timing-cache out."
            )
        return False
    if not complete(folder / target.FOLDER, timing_cache):
        return False
    content, deployed = manifest.read(folder), _deployed(folder, target)
    if content.get("metrics") and deployed is not None:
        content["metrics"]["artifact_bytes"] = deployed
    _restate(folder, content, target.FOLDER)
    return True


def complete_report(folder: Path, target: Target, found: Verification) -> str:
    """Put a check that got further than the report's own into the report and the manifest.

    Returns: what was done, in a sentence for the user; empty where the report says as much already or there is none.
    """
    if not (folder / REPORT).is_file():
        return ""
    report = reports.load(folder)
    before = report.verification.level if report.verification is not None else LEVELS[0]
    if LEVELS.index(found.level) <= LEVELS.index(before):
        return ""
    try:
        _write(folder, _amended(folder, target, report, found))
    except OSError as error:
        return f"the report still says '{before}', since {folder} cannot be written ({error.strerror or error})"
    return f"report.html, report.md and report.json now say '{found.level}'"


def _amended(folder: Path, target: Target, report: Report, found: Verification) -> Report:
    deployed = _deployed(folder, target)
    size = report.artifact_bytes if deployed is None else deployed
    sizes: dict[str, Any] = {"source_bytes": report.source_bytes, "artifact_bytes": size}
    pieces: dict[str, Any] = {
        "speed": report.speed,
        "baseline_quality": report.baseline_quality,
        "artifact_quality": report.artifact_quality,
        "memory_quality": report.memory_quality,
        "gates": report.gates,
        "verification": found,
    }
    verdict = reports.verdict_sentence(**sizes, **pieces)
    stated = manifest.read(folder)
    described = manifest.describe_files(folder, ("model", target.FOLDER), stated["files"])
    added = stated.get(manifest.ADDED, ())
    files = manifest.digests({name: facts for name, facts in described.items() if name not in added})
    return report.model_copy(update={**sizes, "verification": found, "verdict": verdict, "files": files})


def _write(folder: Path, report: Report) -> None:
    write_text(folder / REPORT, report.model_dump_json(indent=1) + "\n")
    write_text(folder / "report.md", reports.to_markdown(report, folder))
    write_text(folder / "report.html", reports.to_html(report, folder))
    assert report.verification is not None
    content = manifest.read(folder)
    tokens = list(report.verification.greedy_tokens)
    content["verification"] = {**(content.get("verification") or {}), "greedy_tokens": tokens}
    _restate(folder, content, "report.")


def _deployed(folder: Path, target: Target) -> int | None:
    """Bytes of what the machine needs, as it is now; None for a target whose files are that from the beginning."""
    deployed: Callable[[Path], int] | None = getattr(target, "deployed_bytes", None)
    return None if deployed is None else deployed(folder / target.FOLDER)


def _restate(folder: Path, content: dict[str, Any], changed: str) -> None:
    """The manifest with this content and the files that are there now, of which those below `changed` are read."""
    tops = {name.split("/")[0] for name in content["files"]}
    known = {name: facts for name, facts in content["files"].items() if not name.startswith(changed)}
    content |= {"files": manifest.describe_files(folder, tops, known)}
    manifest.save(folder, content)
