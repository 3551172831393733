"""The verbs that judge a finished artifact: verify, eval, profile. Nothing is kept of them, so a signal ends them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.cli.info import console, show
from compress.cli.options import (
    AgainstOpt,
    ArtifactArg,
    BudgetOpt,
    DebugOpt,
    JsonOpt,
    ProcessesOpt,
    QuietOpt,
)
from compress.defaults import BUDGET_S, LENGTH
from compress.errors import InputError, UsageError
from compress.progress import Progress


def verify(
    artifact: ArtifactArg,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            "--timing-cache",
            help="Where TensorRT builds an engine here: its timing cache, read and written [default: one for this GPU "
            "and version in your cache folder].",
        ),
    ] = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> int:
    """Check all files, run the artifact, compare with its model.

    On the GPU that it is for, this builds its TensorRT engine and completes the report."""
    from compress.artifact import verify as verify_artifact

    found = verify_artifact(artifact, timing_cache=timing_cache, progress=Progress(quiet))
    word = "agrees" if found.agrees else "DOES NOT AGREE"
    text = (
        f"{artifact}: all files as written; {found.level} in {found.runtime} and {word} with the model "
        f"({found.positions} positions, relative difference {found.max_relative_difference:.2g}, "
        f"bound {found.bound:g}, same top token {found.top1_agreement:.1%}, "
        f"where the margin decides {found.decided_agreement:.1%})."
    )
    if not found.agrees:
        raise InputError(f"{text} Do not use it here.")
    show(found, " ".join([text, *found.notes]), as_json)
    return 0


def evaluate(
    artifact: ArtifactArg,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Text or token ids to judge by.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Instead of --data: tasks of lm-evaluation-harness, a,b (extra `eval`)."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="With --tasks: samples per task [default: all].")
    ] = None,
    task_path: Annotated[
        Path | None, typer.Option("--task-path", help="With --tasks: a folder of your own; code in it is run.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="With --tasks: through the model's chat template.")] = False,
    keep: Annotated[
        Path | None,
        typer.Option("--keep", help="With --tasks: a folder for per-sample logs and answers to go on from."),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            "--max-loss", min=0, help="With --tasks: end with 3 where a score may have lost more, such as 0.01."
        ),
    ] = None,
    model: AgainstOpt = None,
    quality_samples: Annotated[
        int | None, typer.Option("--quality-samples", min=1, help="Quality windows [default: all].")
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", min=2, help=f"Tokens per window [default: {LENGTH}].")
    ] = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> int:
    """Quality on other data or tasks, beside the original model."""
    if tasks is not None:
        _only_tasks(data, quality_samples, length)
        return _evaluate_tasks(artifact, tasks, limit, task_path, chat, keep, max_loss, model, as_json, quiet)
    if data is None:
        raise UsageError("Give what to judge by: --data FILE, or --tasks NAME,NAME.")
    given = {"--limit": limit, "--task-path": task_path, "--chat": chat, "--keep": keep, "--max-loss": max_loss}
    stray = [name for name, value in given.items() if value not in (None, False)]
    if stray:
        raise UsageError(f"{stray[0]} goes with --tasks only. Leave it out.")
    from compress.artifact import evaluate_artifact
    from compress.report.parts import show_quality

    found = evaluate_artifact(
        artifact, data, against=model, samples=quality_samples, length=length or LENGTH, progress=Progress(quiet)
    )
    if as_json:
        parts = {"baseline": found.baseline, "artifact": found.artifact, "memory": found.memory}
        # each record prints itself: it writes what is no number as text, which JSON has no sign for
        print("{" + ", ".join(f'"{name}": {part.model_dump_json()}' for name, part in parts.items()) + "}")
    else:
        show_quality(found.baseline, found.artifact, found.memory, console())
    return 0


def _only_tasks(data: str | None, quality_samples: int | None, length: int | None) -> None:
    """Raises: UsageError for an option of --data."""
    given = {"--data": data, "--quality-samples": quality_samples, "--length": length}
    stray = [name for name, value in given.items() if value is not None]
    if stray:
        raise UsageError(f"{stray[0]} does not go with --tasks, which brings its own samples. Leave it out.")


def _evaluate_tasks(
    artifact: Path,
    tasks: str,
    limit: int | None,
    folder: Path | None,
    chat: bool,
    keep: Path | None,
    max_loss: float | None,
    model: str | None,
    as_json: bool,
    quiet: bool,
) -> int:
    from compress.artifact import evaluate_tasks
    from compress.quality.harness import TaskRequest
    from compress.report.parts import show_tasks

    names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if not names:
        raise UsageError("--tasks names no task. Give one or several, such as --tasks arc_easy,piqa.")
    request = TaskRequest(names, limit, folder, chat, keep, max_loss)
    found = evaluate_tasks(artifact, request, against=model, progress=Progress(quiet))
    if as_json:
        print(found.model_dump_json(indent=1))
    else:
        show_tasks(found, console())
    return 0 if all(gate.met for gate in found.gates) else 3


def profile(
    artifact: ArtifactArg,
    model: AgainstOpt = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            "--input",
            help="What whole requests begin with: a text, or an image file or a folder of them [default: the text that "
            "the artifact keeps].",
        ),
    ] = None,
    budget: BudgetOpt = BUDGET_S,
    processes: ProcessesOpt = 1,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> int:
    """Latency, load time and memory against the original, here."""
    from compress.artifact import profile as profile_artifact
    from compress.report.parts import show_speed

    found = profile_artifact(
        artifact,
        against=model,
        inputs=inputs,
        budget_s=budget,
        processes=processes,
        progress=Progress(quiet),
    )
    if as_json:
        print(found.model_dump_json(indent=1))
    else:
        show_speed(found, console())
    return 0
