"""The command line: each verb is a function of the Python API with its result printed. Imports nothing heavy."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress import __version__
from compress.cli import artifact as cli_artifact
from compress.cli import engine as cli_engine
from compress.cli import info as cli_info
from compress.cli import report as cli_report
from compress.cli import sweep as cli_sweep
from compress.cli.info import console, show
from compress.cli.options import (
    ArtifactArg,
    BudgetOpt,
    DataOpt,
    DebugOpt,
    DtypeOpt,
    JsonOpt,
    LengthOpt,
    ModelArg,
    OutOpt,
    OverwriteOpt,
    PassesOpt,
    ProfileOpt,
    QualitySamplesOpt,
    QuietOpt,
    RecipeOpt,
    SamplesOpt,
    SeedOpt,
    TargetOpt,
)
from compress.defaults import BUDGET_S, QUICKSTART
from compress.errors import UsageError
from compress.progress import Progress

if TYPE_CHECKING:
    from compress.recipe import Recipe
    from compress.run_report import Request

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Compress a model for the machine at hand, and report what it cost and gained.",
    epilog="Example: compress run path/to/model --recipe w4a16 --data text.txt -o out",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"compress {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compress a model for the machine at hand, and report what it cost and gained."""


@app.command()
def run(
    model: ModelArg,
    out: OutOpt,
    recipe: cli_sweep.RecipesOpt = None,
    passes: cli_sweep.PassesListOpt = None,
    profile: ProfileOpt = None,
    target: TargetOpt = None,
    data: DataOpt = None,
    samples: SamplesOpt = None,
    quality_samples: QualitySamplesOpt = None,
    length: LengthOpt = None,
    dtype: DtypeOpt = None,
    seed: SeedOpt = None,
    device: Annotated[str, typer.Option(help="Where blocks run during calibration: cpu or cuda.")] = "cpu",
    budget: BudgetOpt = BUDGET_S,
    max_loss: cli_sweep.MaxLossOpt = None,
    max_latency: cli_sweep.MaxLatencyOpt = None,
    max_size: cli_sweep.MaxSizeOpt = None,
    prefer: cli_sweep.PreferOpt = None,
    workers: cli_sweep.WorkersOpt = 1,
    executor: cli_sweep.ExecutorOpt = "processes",
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> int:
    """Compress a model and report what it cost and gained.

    Passes, export, verification, quality, speed, report; several recipes are compared in one."""
    from compress.profiles import as_profile

    given: list[tuple[str | None, str | None]] = [(name, None) for name in recipe or ()]
    given += [(None, text) for text in passes or ()]
    limits = cli_sweep.limits_of(max_loss, max_latency, max_size, prefer, several=len(given) > 1)
    chosen = [_recipe(*each, samples, quality_samples, length, seed, dtype) for each in given or [(None, None)]]
    machine, command = as_profile(profile, target), "compress " + shlex.join(sys.argv[1:])
    asked = (machine, out, data, _device(device), overwrite, command, budget)
    if len(chosen) > 1:
        from compress.sweep.setup import SweepRequest

        sweep = SweepRequest(model, tuple(chosen), *asked, limits)
        return cli_sweep.run_sweep(sweep, workers, executor, quiet, as_json)
    from compress.run_report import Request

    return _run(Request(model, chosen[0], *asked), quiet, as_json)


@app.command()
def quickstart(
    out: OutOpt = Path("quickstart-out"),
    recipe: RecipeOpt = QUICKSTART,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> int:
    """Compress the small model that ships here; needs no network."""
    from compress.quickstart import request

    return _run(request(out, recipe, overwrite), quiet, as_json)


@app.command()
def plan(
    model: ModelArg,
    recipe: RecipeOpt = None,
    passes: PassesOpt = None,
    profile: ProfileOpt = None,
    target: TargetOpt = None,
    samples: SamplesOpt = None,
    quality_samples: QualitySamplesOpt = None,
    length: LengthOpt = None,
    dtype: DtypeOpt = None,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> int:
    """What a run would touch, store and cost.

    Reads config.json only, so the weights need not be there."""
    from compress.models.loading import load
    from compress.plan import make_plan, refusal
    from compress.profiles import as_profile
    from compress.report.plan_table import show_plan

    chosen = _recipe(recipe, passes, samples, quality_samples, length, None, dtype)
    made = make_plan(load(model, weights=False), chosen, as_profile(profile, target))
    if as_json:
        print(made.model_dump_json(indent=1))
    else:
        show_plan(made, console())
    error = refusal(made) if made.refusals else None
    return error.exit_code if error else 0


@app.command()
def export(
    artifact: ArtifactArg,
    out: OutOpt,
    profile: ProfileOpt = None,
    target: TargetOpt = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> int:
    """Export an artifact's model for another profile or target.

    Without calibrating again."""
    from compress.artifact import export as export_artifact
    from compress.profiles import as_profile

    progress = Progress(quiet)
    with progress.catching_signals():
        machine = as_profile(profile, target)
        made = export_artifact(artifact, profile=machine, out=out, overwrite=overwrite, progress=progress)
    show(
        {"artifact": str(made.folder), "profile": made.profile.id, "target": made.profile.target},
        f"Wrote {made.deployable} for {made.profile.id}.",
        as_json,
    )
    return 0


app.command()(cli_artifact.verify)
app.command("eval")(cli_artifact.evaluate)
app.command()(cli_artifact.profile)
app.command()(cli_report.report)
app.command()(cli_report.compare)
app.command()(cli_report.reproduce)
app.command()(cli_engine.generate)
app.command()(cli_engine.predict)
app.command(hidden=True)(cli_sweep.worker)
app.command()(cli_info.recipes)
app.command()(cli_info.passes)
app.command()(cli_info.doctor)
app.add_typer(cli_info.hardware, name="hardware")


def _recipe(
    recipe: str | None,
    passes: str | None,
    samples: int | None,
    quality_samples: int | None,
    length: int | None,
    seed: int | None,
    dtype: str | None,
) -> Recipe:
    """The recipe with the options laid over it."""
    from compress import recipe as recipes

    if (recipe is None) == (passes is None):
        raise UsageError(f"Give one of --recipe and --passes. Presets: {', '.join(recipes.presets())}.")
    found = recipes.load(recipe) if recipe is not None else recipes.of_passes(passes or "")
    changed: dict[str, Any] = {} if seed is None else {"seed": seed}
    sizes = {"length": length} if length else {}
    given = {"samples": samples, "dtype": dtype}
    chosen = {name: value for name, value in given.items() if value}
    changed["calibration"] = found.calibration.model_copy(update=sizes | chosen)
    wanted = {"samples": quality_samples} if quality_samples else {}
    changed["quality"] = found.quality.model_copy(update=sizes | wanted)
    return found.model_copy(update=changed)


def _device(name: str) -> str:
    import torch

    if name not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: allowed are cpu and cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here. Use --device cpu.")
    return name


def _run(request: Request, quiet: bool, as_json: bool) -> int:
    """Carry it out and print its report; 3 where a gate was not met."""
    from compress.export import find
    from compress.report import to_terminal
    from compress.run import run as run_request

    progress, out = Progress(quiet), request.out
    with progress.catching_signals():
        report = run_request(request, progress)
    if as_json:
        print(report.model_dump_json(indent=1))
    else:
        to_terminal(report, console(), folder=out)
        print(f"\n{out / 'report.html'} has the whole report; {out / find(report.target).FOLDER} is the artifact.")
    return 0 if all(gate.met for gate in report.gates) else 3
