"""`compress reproduce`: repeat the run that a report tells of, and say whether the same came out.

A report is a file from anywhere: what it names is read, but no code that it names is run. A source `file.py:callable`
or data `module:callable` must be named again by the user.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError

from compress import hwprofiles, manifest, recipe
from compress.asked import ELSEWHERE
from compress.comparison import Comparison, compare
from compress.comparison.figures import excludes
from compress.comparison.records import Change
from compress.comparison.speed import STABLE
from compress.errors import InputError, UsageError
from compress.files import scratch_folder
from compress.hwprofiles import Profile
from compress.inputs.datasets import Samples
from compress.models.loading import load
from compress.models.model import Model
from compress.models.user_module import is_reference
from compress.progress import Progress
from compress.records import Asked, Report
from compress.records.base import Record
from compress.report.format import clean, listing
from compress.run import load_data, run
from compress.run_report import Request

Verdict = Literal["reproduced: same bytes", "reproduced: same figures within intervals", "differs"]
SIZE = 0.01
"""Share by which the size may differ where the bytes do: it has no interval."""


@dataclass(frozen=True)
class Places:
    """Where what a report names is now, if not where it was. calibration, quality: of a recipe that names two files."""

    model: str | None = None
    data: str | None = None
    calibration: str | None = None
    quality: str | None = None


NOWHERE_ELSE = Places()


class Reproduction(Record):
    """What came out of repeating a run."""

    verdict: Verdict
    files: int = Field(description="of the model and of what is deployed, in the report")
    changed: tuple[str, ...] = Field(description="files with other bytes, missing ones and new ones")
    figures: tuple[str, ...] = Field(description="figures that differ beyond both intervals")
    notes: tuple[str, ...] = ()
    comparison: Comparison


def reproduce(
    report: Report,
    out: Path | None = None,
    places: Places = NOWHERE_ELSE,
    *,
    overwrite: bool = False,
    command: str = "",
    progress: Progress | None = None,
) -> Reproduction:
    """Repeat a run and compare what came out: every file of the model and of what is deployed, and the figures.

    Args: out: where to keep the new artifact; None for a temporary folder.
    Raises: UsageError for a report that does not say enough, or a model or data that cannot be found again or are not
    what they were; InputError for a malformed request; and what `run` raises.
    """
    progress = progress or Progress(quiet=True)
    with _folder(out) as folder:
        request = request_of(report, places, folder)
        request = replace(request, overwrite=overwrite, command=command)
        notes = check(report, request)
        for note in notes:
            progress.note(f"warning: {note}")
        made = run(request, progress)
    return judge(report, made, notes)


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Where to write: the folder that was asked for, or one that is removed afterwards."""
    if out is not None:
        yield out
        return
    with scratch_folder("compress-reproduce-") as scratch:
        yield scratch / "out"


def request_of(report: Report, places: Places, out: Path) -> Request:
    """The request that a report tells of, for another output. Raises: UsageError, InputError."""
    asked = report.request
    if asked is None:
        raise UsageError(
            "This report holds no request, so the run cannot be repeated from it: it is older than `compress "
            f"reproduce`. Its command was: {clean(report.command) or 'not recorded'}."
        )
    model = places.model or _named(report.source, "--model", is_reference(report.source))
    wanted, known = asked.options, {each.name for each in fields(Request)} - ELSEWHERE
    options: dict[str, Any] = {name: value for name, value in wanted.items() if name in known}
    if places.data or options.get("data"):
        options["data"] = places.data or _named(str(options["data"]), "--data", ":" in str(options["data"]))
    values = {"model": model, "recipe": _recipe(asked, places), "profile": _profile(asked), "out": out, **options}
    try:
        found = TypeAdapter(Request).validate_python(values)
    except ValidationError as error:
        raise InputError(f"The report's request is malformed: {_first(error)}.") from error
    if found.device not in ("cpu", "cuda"):
        raise InputError(f"The report's request names device '{clean(found.device)}'. Allowed: cpu, cuda.")
    if found.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("The run computed on a CUDA device, and torch sees none here. Repeat it where there is one.")
    return found


def _named(source: str, option: str, is_code: bool) -> str:
    """A source that a report names. Raises: UsageError for one that would run code which the user has not named."""
    if is_code:
        raise UsageError(
            f"The report names code to be run: {clean(source)}. A report may come from anywhere, so look at that code "
            f"and name it yourself: {option} {clean(source)}."
        )
    return source


def _recipe(asked: Asked, places: Places) -> recipe.Recipe:
    content: dict[str, Any] = dict(asked.recipe)
    name = str(content.pop("name", "") or "report")
    for section, option, place in (
        ("calibration", "--calibration-data", places.calibration),
        ("quality", "--quality-data", places.quality),
    ):
        settings = content.get(section)
        data = settings.get("data") if isinstance(settings, dict) else None
        if place and not data:
            raise UsageError(f"{option}: the run had no such file of its own; its data were those of --data.")
        if isinstance(settings, dict) and data:
            content[section] = {**settings, "data": place or _named(str(data), option, ":" in str(data))}
    return recipe.parse(content, name, "the report's recipe")


def _profile(asked: Asked) -> Profile:
    try:
        return Profile.model_validate(asked.profile)
    except (ValidationError, hwprofiles.ProfileError) as error:
        text = _first(error) if isinstance(error, ValidationError) else clean(str(error))
        raise InputError(f"The report's hardware profile is malformed: {text}.") from error


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    place = clean(".".join(str(part) for part in problem["loc"]))
    return f"{place}: {clean(problem['msg'])}, found {clean(repr(problem['input']), 80)}"


def check(report: Report, request: Request) -> tuple[str, ...]:
    """Hold model and data against their digests, before anything expensive.

    Returns: what else differs and may change what comes out. Raises: UsageError.
    """
    with _found_again("source", "--model"):
        model = load(request.model)
    if model.digest != report.source_digest:
        raise UsageError(
            f"The source differs: the weights of {clean(request.model)} have digest {model.digest[:16]}…, the report's "
            f"{clean(report.source_digest)[:16]}…. Name the model that it was made from with --model."
        )
    with _found_again("data", "--data, or --calibration-data and --quality-data"):
        calibration, windows = load_data(model, request)
    _check_data("calibration", str(report.calibration.get("digest", "")), calibration.windows if calibration else None)
    _check_data("training", str(report.calibration.get("rest_digest", "")), calibration.rest if calibration else None)
    quality = report.artifact_quality or report.memory_quality or report.baseline_quality
    _check_data("quality", quality.data_digest if quality else "", windows)
    return tuple(_differences(report, model))


@contextmanager
def _found_again(what: str, options: str) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        raise UsageError(
            f"The {what} of this report cannot be found again. {error} If it is elsewhere now, name it with {options}."
        ) from error


def _check_data(what: str, stated: str, found: Samples | None) -> None:
    """Raises: UsageError for other data than those of the report."""
    digest = found.digest if found else ""
    if stated != digest:
        raise UsageError(
            f"The {what} data differ: they have digest {digest[:16] or 'none'}, the report's "
            f"{clean(stated)[:16] or 'none'}. The file, the tokenizer or the way windows are chosen has changed since."
        )


def _differences(report: Report, model: Model) -> Iterator[str]:
    """Versions, code and machine, which may change what comes out."""
    asked, now = report.request, manifest.versions()
    assert asked is not None
    for name in sorted({*report.versions, *now}):
        before, after = report.versions.get(name, "absent"), now.get(name, "absent")
        if before != after:
            yield f"{clean(name)} was {clean(before)}, is {after}"
    if asked.code_digest != manifest.code_digest():
        yield "the code of compress has changed since"
    here = hwprofiles.machine_summary()
    if any(asked.machine.get(key) != here.get(key) for key in STABLE):
        yield "this is another machine, where sums may be rounded otherwise"
    if asked.threads != torch.get_num_threads():
        yield f"the passes computed in {asked.threads} threads then, {torch.get_num_threads()} now"
    if asked.task != str(model.task):
        yield f"the model is opened as {model.task} now, was {clean(asked.task)}"


def judge(report: Report, made: Report, notes: tuple[str, ...] = ()) -> Reproduction:
    """Compare a report with that of the same run again.

    The bytes decide, and every quality figure that has an interval: the difference must not lie beyond it. Where bytes
    differ the size may by 1 %, and where no figure can be compared they alone decide. Speed is told and does not
    decide, for a machine is not equally busy twice.
    """
    found = compare(report, made, allow_cross_machine=True)
    changed = tuple(
        name for name in sorted({*report.files, *made.files}) if report.files.get(name) != made.files.get(name)
    )
    is_same = bool(report.files) and not changed
    judged = [change for change in found.changes if change.kind == "quality" and change.difference is not None]
    figures = [change for change in judged if _has_interval(change) and change.word in ("better", "worse")]
    size = next(change for change in found.changes if change.kind == "size")
    if size.ratio is not None and excludes(size.ratio, 1 - SIZE, 1 + SIZE):
        figures.append(size)
    is_untold = not judged and (report.artifact_quality is not None or not is_same)
    verdict: Verdict = "reproduced: same bytes" if is_same else "reproduced: same figures within intervals"
    if figures or (is_untold and not is_same):
        verdict = "differs"
    return Reproduction(
        verdict=verdict,
        files=len(report.files),
        changed=changed,
        figures=tuple(change.name for change in figures),
        notes=(*notes, *_remarks(found, is_untold)),
        comparison=found,
    )


def _has_interval(change: Change) -> bool:
    return change.difference is not None and change.difference.interval is not None


def _remarks(found: Comparison, is_untold: bool) -> Iterator[str]:
    if is_untold:
        yield "no quality figure could be compared"
    moved = [change.name for change in found.changes if change.kind == "speedup" and change.word in ("better", "worse")]
    if moved:
        yield f"the speed-up differs beyond the noise of both at {listing([name[8:] for name in moved])}"
    single = [change for change in found.changes if change.kind == "quality" and not _has_interval(change)]
    others = [change.name for change in single if change.word in ("lower", "higher")]
    if others:
        yield f"figures without an interval differ: {listing(others)}"
