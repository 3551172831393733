"""The command as its users call it, small enough for tests, and what it leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROFILE = "cpu-x86-avx512-vnni"
NEUTRAL: dict[str, Any] = {"cwd": tempfile.gettempdir(), "env": {**os.environ, "PYTHONSAFEPATH": "1"}}
"""Children import what is installed, not the checkout that the tests were started in."""

Done = subprocess.CompletedProcess[str]


def command(*arguments: object, timeout: float = 300) -> Done:
    """A process of its own. Where that proves nothing, `compress.__main__.main` takes no import of torch."""
    words = [sys.executable, "-m", "compress", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False, **NEUTRAL)


def arguments(model: Path, data: Path, out: Path, recipe: str | Path = "w4a16") -> list[str]:
    """Of `compress run` with little to calibrate, judge and time."""
    given = ["run", model, "--recipe", recipe, "--profile", PROFILE, "--data", data, "-o", out]
    given += ["--length", 64, "--samples", 16, "--quality-samples", 24, "--budget", 0.1]
    return [str(item) for item in given]


def deployed_bytes(out: Path) -> dict[str, bytes]:
    """Everything that must not depend on how often a run was stopped, or on what ran beside it."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for part in ("model", "onnx")
        for path in sorted((out / part).rglob("*"))
        if path.is_file()
    }
