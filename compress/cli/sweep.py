"""Several recipes in one `compress run`, and the worker that each of them is given to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from compress.cli.info import console
from compress.cli.options import RECIPE_HELP, DebugOpt, JsonOpt, QuietOpt
from compress.errors import UsageError
from compress.progress import Progress

if TYPE_CHECKING:
    from compress.sweep.executor import Executor
    from compress.sweep.records import Limits
    from compress.sweep.setup import SweepRequest

RecipesOpt = Annotated[
    list[str] | None,
    typer.Option("--recipe", "-r", help=f"{RECIPE_HELP}. Several: compared in one report."),
]
PassesListOpt = Annotated[
    list[str] | None,
    typer.Option("--passes", help='Instead of --recipe: "gptq(bits=4), act_quant". May be repeated as well.'),
]
MaxLossOpt = Annotated[
    float | None,
    typer.Option(
        "--max-loss",
        help="Of several recipes: the most that may be lost. Language models: KL in nats per token; classifiers: "
        "percentage points of accuracy; others: 1 - cosine. Held against the worse end of the interval, as all limits.",
    ),
]
MaxLatencyOpt = Annotated[
    str | None,
    typer.Option("--max-latency", help="The longest a call may take: 5ms, or of the baseline's time 0.8x, 80%."),
]
MaxSizeOpt = Annotated[
    str | None, typer.Option("--max-size", help="The largest artifact: 30MB, bytes, or of the source's size 30%.")
]
PreferOpt = Annotated[
    str | None,
    typer.Option(
        "--prefer",
        help="What decides among those within the limits: one or several of latency, size, loss, the first named first "
        "[default: latency,size,loss].",
    ),
]
WorkersOpt = Annotated[int, typer.Option("--workers", min=1, help="Recipes compressed at a time, where memory holds.")]
ExecutorOpt = Annotated[
    Literal["processes", "ray"], typer.Option("--executor", help="What runs the workers; ray needs its extra.")
]


def limits_of(
    loss: float | None, latency: str | None, size: str | None, prefer: str | None, *, several: bool
) -> Limits:
    """The limits of a sweep. Raises: UsageError for any with a single recipe."""
    from compress.sweep.limits import read_limits

    given = {"--max-loss": loss, "--max-latency": latency, "--max-size": size, "--prefer": prefer}
    named = [name for name, value in given.items() if value is not None]
    if named and not several:
        raise UsageError(
            f"{named[0]} chooses among several recipes, and one was given. Add another --recipe or --passes; to hold "
            "one recipe to a bound, write quality.gates in it."
        )
    return read_limits(loss, latency, size, prefer)


def run_sweep(request: SweepRequest, workers: int, executor: str, quiet: bool, as_json: bool) -> int:
    """Run, print, and say by the exit code whether any variant may be taken."""
    from compress.sweep.finish import exit_code
    from compress.sweep.page import to_terminal
    from compress.sweep.run import sweep

    progress = Progress(quiet)
    with progress.catching_signals():
        found = sweep(request, progress, _executor(executor, workers, quiet))
    if as_json:
        print(found.model_dump_json(indent=1))
    else:
        to_terminal(found, console())
        print(f"\n{request.out / 'report.html'} has the whole report; {request.out / 'variants'} holds the artifacts.")
    return exit_code(found)


def worker(as_json: JsonOpt = False, quiet: QuietOpt = False, debug: DebugOpt = False) -> int:
    """Internal, started by `compress run`: one recipe of several.

    The task comes as JSON on standard input, the answer is a line of JSON on standard output."""
    from compress.sweep.executor import read_task
    from compress.sweep.variant import work

    task = read_task()
    os.chdir(task["directory"])  # Ray starts its workers elsewhere
    progress = Progress(quiet)
    with progress.catching_signals(told=False):
        answer = work(task, progress)
    print(json.dumps(answer))
    return 0


def sweep_text(artifact: Path, form: str) -> str | None:
    """The report of a sweep as --html, --markdown or --json; None where it is no sweep's, and '' where it was printed
    as a table. Raises: UsageError for another form."""
    from compress.sweep.load import load_sweep
    from compress.sweep.page import to_html, to_markdown, to_terminal

    found = load_sweep(artifact)
    if found is None:
        return None
    if not form:
        to_terminal(found, console(), full=True)
        return ""
    if form == "--json":
        return found.model_dump_json(indent=1) + "\n"
    makers = {"--html": to_html, "--markdown": to_markdown}
    if form not in makers:
        names = ", ".join(each.name for each in found.done)
        raise UsageError(f"{artifact} is a sweep of several recipes. {form} is of one: give a folder of it ({names}).")
    return makers[form](found)


def _executor(name: str, workers: int, quiet: bool) -> Executor:
    from compress.sweep.executor import Processes, Ray, require_ray

    if name == "ray":
        require_ray()  # before any work
        return Ray(workers=workers)
    return Processes(workers, quiet)
