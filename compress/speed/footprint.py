"""What an artifact takes: bytes on disk, time to load and memory (design §7)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from compress.records import Footprint
from compress.speed.timing_process import last_line
from compress.target import Target

PROBE_PROMPT, PROBE_TOKENS = 128, 8
PROBE_S = 900.0
"""Seconds after which a process that loads and runs an arm once is given up."""


def deployable_bytes(folder: Path) -> int:
    """Bytes of all files in an exported folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def deployed_bytes(target: Target, folder: Path) -> int:
    """Of what the machine needs of an exported folder, where the target says so; else of all its files."""
    found: Callable[[Path], int] | None = getattr(target, "deployed_bytes", None)
    return deployable_bytes(folder) if found is None else found(folder)


def footprint(target: Target, folder: Path, threads: int, longest: int) -> Footprint:
    """Load time and peak memory, from a child process of its own. longest: positions that the model has.

    Raises: InputError when the child does not finish.
    """
    prompt = max(1, min(PROBE_PROMPT, longest - PROBE_TOKENS))
    command = target.probe_command(folder, threads, prompt, PROBE_TOKENS)
    found = json.loads(last_line(command, PROBE_S, f"{folder} could not be run in a process of its own"))
    return Footprint(
        disk_bytes=deployed_bytes(target, folder),
        load_s=found["load_s"],
        first_call_s=found.get("first_call_s"),
        peak_memory_bytes=int(found["peak_memory_bytes"]),
        cache_tokens=found.get("cache_tokens"),
        cache_bytes=found.get("cache_bytes"),
    )
