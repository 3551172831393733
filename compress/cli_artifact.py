"""The verbs that judge a finished artifact: verify, eval, profile. Nothing is kept of them, so a signal ends them."""

from __future__ import annotations

from typing import Annotated

import typer

from compress.cli_info import console, show
from compress.cli_options import (
    AgainstOpt,
    ArtifactArg,
    BudgetOpt,
    DebugOpt,
    JsonOpt,
    LengthOpt,
    QuietOpt,
)
from compress.errors import InputError
from compress.progress import Progress


def verify(artifact: ArtifactArg, as_json: JsonOpt = False, debug: DebugOpt = False) -> int:
    """Check every file of an artifact, run it here, and compare it with its model."""
    from compress.artifact import verify as verify_artifact

    found = verify_artifact(artifact)
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
    data: Annotated[str, typer.Option("--data", "-d", help="Text or token ids to judge by.")],
    model: AgainstOpt = None,
    quality_samples: Annotated[
        int | None, typer.Option("--quality-samples", min=1, help="Quality windows [default: all].")
    ] = None,
    length: LengthOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> int:
    """Quality of an artifact on other data, beside its uncompressed model."""
    from compress.artifact import evaluate_artifact
    from compress.report.parts import show_quality

    found = evaluate_artifact(
        artifact, data, against=model, samples=quality_samples, length=length or 512, progress=Progress(quiet)
    )
    if as_json:
        parts = {"baseline": found.baseline, "artifact": found.artifact, "memory": found.memory}
        # each record prints itself: it writes what is no number as text, which JSON has no sign for
        print("{" + ", ".join(f'"{name}": {part.model_dump_json()}' for name, part in parts.items()) + "}")
    else:
        show_quality(found.baseline, found.artifact, found.memory, console())
    return 0


def profile(
    artifact: ArtifactArg,
    model: AgainstOpt = None,
    budget: BudgetOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> int:
    """Latency, load time and memory of an artifact against its uncompressed model, measured here."""
    from compress.artifact import profile as profile_artifact
    from compress.measure import BUDGET_S
    from compress.report.parts import show_speed

    found = profile_artifact(artifact, against=model, budget_s=budget or BUDGET_S, progress=Progress(quiet))
    if as_json:
        print(found.model_dump_json(indent=1))
    else:
        show_speed(found, console())
    return 0
