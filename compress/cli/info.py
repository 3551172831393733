"""The verbs that tell what there is: passes, hardware profiles, and the state of this installation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.options import DebugOpt, JsonOpt, ProfileOpt, QuietOpt

if TYPE_CHECKING:
    from rich.console import Console

hardware = typer.Typer(no_args_is_help=True, help="Hardware profiles: list, show, detect, calibrate.")


def passes(
    name: Annotated[str | None, typer.Argument(help="One pass, with its settings.")] = None,
    as_json: JsonOpt = False,
    debug: DebugOpt = False,
) -> int:
    """List the passes, or show one with its settings."""
    from compress.passes import find, table

    if name is None:
        found = {key: entry.summary for key, entry in table().items()}
        show(found, columns(found), as_json)
        return 0
    from compress.describe import describe_pass, pass_settings

    cls = find(name)
    show({"name": name, "settings": pass_settings(cls)}, describe_pass(cls), as_json)
    return 0


def recipes(as_json: JsonOpt = False, debug: DebugOpt = False) -> int:
    """List the recipes that ship, for --recipe."""
    from compress.recipe import load, presets

    found = {name: load(name).summary for name in presets()}
    show(found, columns(found), as_json)
    return 0


@hardware.command("list")
def hardware_list(as_json: JsonOpt = False, debug: DebugOpt = False) -> int:
    """The profiles that ship."""
    from compress import hwprofiles

    found = {name: hwprofiles.load(name).name for name in hwprofiles.names()}
    show(found, columns(found), as_json)
    return 0


@hardware.command("show")
def hardwareshow(
    name: Annotated[str, typer.Argument(help="Profile id or file.")], as_json: JsonOpt = False, debug: DebugOpt = False
) -> int:
    """One profile: memory, peaks, the kernel of each format."""
    from compress.describe import describe_profile
    from compress.profiles import as_profile

    found = as_profile(name)

    show(found.model_dump(mode="json"), describe_profile(found), as_json)
    return 0


@hardware.command("detect")
def hardware_detect(as_json: JsonOpt = False, debug: DebugOpt = False) -> int:
    """What this machine is, and the profile that fits it."""
    from compress import hwprofiles
    from compress.profiles import as_profile

    found, facts = as_profile(None), hwprofiles.machine_summary()
    lines = [f"{key}: {value}" for key, value in facts.items()]
    show({"profile": found.id, "machine": facts}, "\n".join([f"profile: {found.id}", *lines]), as_json)
    return 0


@hardware.command("calibrate")
def hardware_calibrate(
    out: Annotated[Path, typer.Option("--out", "-o", help="The profile to write, a .yaml file.")],
    profile: ProfileOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
    debug: DebugOpt = False,
) -> int:
    """Measure this machine and write a profile. Takes about a minute."""
    from compress.calibrate import calibrate, require_new, write
    from compress.describe import describe_profile
    from compress.profiles import as_profile
    from compress.progress import Progress

    require_new(out)
    found = calibrate(as_profile(profile), out.stem, progress=Progress(quiet))
    write(found, out)
    show(found.model_dump(mode="json"), f"{describe_profile(found)}\n\nWrote {out}: give it as --profile.", as_json)
    return 0


def doctor(as_json: JsonOpt = False, debug: DebugOpt = False) -> int:
    """What works on this machine and in this installation.

    Ends with 4 where something that a run needs does not work."""
    from compress.doctor import diagnose

    found = diagnose(Path.cwd())
    width = max(len(one.what) for one in found.findings)
    lines = [f"{one.state:<8} {one.what:<{width}}  {one.text}" for one in found.findings]
    show(found, "\n".join(lines), as_json)
    return 0 if found.healthy else 4


def columns(rows: Mapping[str, str]) -> str:
    """Names beside their texts, aligned by the longest name."""
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def show(content: Any, text: str, as_json: bool) -> None:
    """Print a result for people, or as one JSON object; a record prints its own."""
    if not as_json:
        print(text)
    elif hasattr(content, "model_dump_json"):
        print(content.model_dump_json())
    else:
        print(json.dumps(content))


def console() -> Console:
    """Where tables are printed."""
    from rich.console import Console

    return Console()
