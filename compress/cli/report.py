"""The verbs that read a report: report, compare, reproduce."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli.info import console, show
from compress.cli.options import DebugOpt, JsonOpt, OverwriteOpt, QuietOpt
from compress.errors import UsageError

if TYPE_CHECKING:
    from compress.comparison.reproduction import Reproduction

ReportArg = Annotated[Path, typer.Argument(help="The -o folder of a run, or a report.json.")]
FileOpt = Annotated[Path | None, typer.Option("--out", "-o", help="File to write in place of stdout.")]


def report(
    artifact: ReportArg,
    as_html: Annotated[bool, typer.Option("--html", help="The page report.html, made anew.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The page report.md, made anew.")] = False,
    as_card: Annotated[
        bool, typer.Option("--model-card", help="A README.md for the Hugging Face hub, with its front matter.")
    ] = False,
    as_statement: Annotated[
        bool, typer.Option("--in-toto", help="manifest.json as an in-toto statement, to be signed.")
    ] = False,
    out: FileOpt = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> int:
    """Show the report of a run again, or print it another way.

    As HTML, Markdown, JSON, a model card or an in-toto statement."""
    chosen = {
        "--html": as_html,
        "--markdown": as_markdown,
        "--model-card": as_card,
        "--in-toto": as_statement,
        "--json": as_json,
    }
    names = [name for name, is_given in chosen.items() if is_given]
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)}: give one of them.")
    if out is not None and not names:
        raise UsageError(f"-o {out}: say what to write: {', '.join(chosen)}.")
    from compress.cli.sweep import sweep_text

    of_sweep = sweep_text(artifact, names[0] if names else "")
    if of_sweep is not None:
        if names:
            _put(of_sweep, out, overwrite)
        return 0
    if not names:
        from compress.report import load, to_terminal

        to_terminal(load(artifact), console(), full=True, folder=_folder(artifact))
        return 0
    _put(_MAKERS[names[0]](artifact), out, overwrite)
    return 0


def compare(
    before: Annotated[
        Path, typer.Argument(metavar="BEFORE", help="The earlier artifact's folder, or its report.json.")
    ],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="The newer one's.")],
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-if",
            help="Exit with 3 where this is so: 'latency>+3%' (AFTER against BEFORE), 'kl>0.05' (AFTER's own value). "
            "May be repeated.",
        ),
    ] = None,
    allow_cross_machine: Annotated[
        bool, typer.Option("--allow-cross-machine", help="Compare speed-ups where the machines differ.")
    ] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write the Markdown to as well.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> int:
    """What changed between two reports, with intervals.

    Ends with 3 where a condition of --fail-if is so."""
    from compress.comparison import compare as compare_reports
    from compress.comparison.conditions import judge, parse
    from compress.comparison.page import comparison_page
    from compress.report import load
    from compress.report.markdown import page_markdown
    from compress.report.terminal import print_page

    if as_markdown and as_json:
        raise UsageError("--markdown and --json: give one of them.")
    conditions = [parse(text) for text in fail_if or ()]  # a wrong one is told before anything is read
    found = compare_reports(load(before), load(after), allow_cross_machine=allow_cross_machine)
    judged = tuple(each for condition in conditions for each in judge(condition, found))
    found = found.model_copy(update={"conditions": judged})
    page = comparison_page(found)
    if out is not None:
        _put(page_markdown(page), out, overwrite)
    if as_json:
        print(found.model_dump_json(indent=1))
    elif as_markdown:
        _print(page_markdown(page))
    else:
        print_page(page, console())
    return 3 if found.failed else 0


def reproduce(
    artifact: ReportArg,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder to keep the new artifact in [default: a temporary one, removed]."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Where the source is now [default: where it was].")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Where the data are now [default: where they were].")
    ] = None,
    calibration_data: Annotated[
        str | None, typer.Option("--calibration-data", help="Where the recipe's calibration.data is now.")
    ] = None,
    quality_data: Annotated[
        str | None, typer.Option("--quality-data", help="Where the recipe's quality.data is now.")
    ] = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> int:
    """Repeat the run of a report and compare what comes out.

    Byte for byte and figure by figure; ends with 3 where it differs."""
    from compress.comparison.reproduction import Places
    from compress.comparison.reproduction import reproduce as repeat
    from compress.progress import Progress
    from compress.report import load

    found = load(artifact)
    progress = Progress(quiet)
    places = Places(model, data, calibration_data, quality_data)
    command = "compress " + shlex.join(sys.argv[1:])
    with progress.catching_signals():
        made = repeat(found, out, places, overwrite=overwrite, command=command, progress=progress)
    show(made, "\n".join(_told(made)), as_json)
    return 3 if made.verdict == "differs" else 0


def _told(made: Reproduction) -> list[str]:
    from compress.report.format import clean, listing

    lines: list[str] = [made.verdict]
    if not made.files:
        lines.append("the report holds no digests of its files, so the bytes were not compared")
    elif made.changed:
        lines.append(f"other bytes: {listing(made.changed)}")
    else:
        lines.append(f"{made.files} files have the bytes that the report tells")
    if made.figures:
        lines.append(f"figures that differ: {listing(made.figures)}")
    return [*lines, *(f"note: {clean(note, limit=600)}" for note in made.notes)]


def _html(artifact: Path) -> str:
    from compress.report import load, to_html

    return to_html(load(artifact), _folder(artifact))


def _markdown(artifact: Path) -> str:
    from compress.report import load, to_markdown

    return to_markdown(load(artifact), _folder(artifact))


def _json(artifact: Path) -> str:
    from compress.report import load

    return load(artifact).model_dump_json(indent=1) + "\n"


def _card(artifact: Path) -> str:
    from compress.report import load
    from compress.report.model_card import to_model_card

    return to_model_card(load(artifact))


def _statement(artifact: Path) -> str:
    from compress import manifest
    from compress.provenance import statement

    return json.dumps(statement(manifest.read(_folder(artifact))), indent=1) + "\n"


def _folder(artifact: Path) -> Path:
    """That of a report, which may be given itself."""
    return artifact if artifact.is_dir() else artifact.parent


_MAKERS: dict[str, Callable[[Path], str]] = {
    "--html": _html,
    "--markdown": _markdown,
    "--json": _json,
    "--model-card": _card,
    "--in-toto": _statement,
}


def _put(text: str, out: Path | None, overwrite: bool) -> None:
    """To stdout, or into a file, complete or absent; in an artifact's folder its manifest takes it in.

    Raises: UsageError where it is there already, or is a file of the artifact; ResourceError.
    """
    if out is None:
        _print(text)
        return
    from compress import manifest
    from compress.engine.disk import disk_errors
    from compress.files import write_text

    if out.is_dir() or (out.exists() and not overwrite):
        raise UsageError(f"{out} exists. Name another file{'' if out.is_dir() else ', or add --overwrite'}.")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"{out}: there is no folder {out.parent}. Make it first.")
    if manifest.is_part(out):
        raise UsageError(f"{out} is a file that the artifact was made with. Name another file.")
    with disk_errors(out):
        write_text(out, text)
        manifest.note(out)


def _print(text: str) -> None:
    """In characters that the output's encoding has."""
    encoding = sys.stdout.encoding or "utf8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end="")
