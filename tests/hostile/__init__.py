"""A corpus of hostile files: each is made in a folder of its own and given to the command as its user would.

One module per kind of file; an entry is a function that spoils something and returns the command. Nothing in here is
large: what would take gigabytes is declared, or a limit of ours is lowered for the while.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROFILE = "cpu-x86-avx512-vnni"


@dataclass(frozen=True)
class Place:
    """folder: an empty one of the entry's own; model: a small Llama, data: a text, artifact: of `compress run`, to be
    copied, not written to."""

    folder: Path
    model: Path
    data: Path
    artifact: Path

    @property
    def out(self) -> Path:
        """Where an output would be; nothing may be there afterwards."""
        return self.folder / "out"

    def copied_model(self, name: str = "model") -> Path:
        """A model folder that may be spoiled."""
        return Path(shutil.copytree(self.model, self.folder / name))

    def copied_artifact(self) -> Path:
        """An artifact that may be spoiled."""
        return Path(shutil.copytree(self.artifact, self.folder / "artifact"))

    def write(self, name: str, content: str | bytes) -> Path:
        """A file in the entry's folder."""
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def run(self, model: object = None, recipe: object = "w8a16", data: object = None, **more: object) -> list[Any]:
        """`compress run` of something hostile; what is not given is sound."""
        given: list[Any] = ["run", model or self.model, "--data", data or self.data, "-o", self.out, "-q"]
        given += ["--profile", more.pop("profile", PROFILE), "--length", 32, "--samples", 4, "--quality-samples", 4]
        given += ["--passes", more.pop("passes")] if "passes" in more else ["--recipe", recipe]
        return given


@dataclass(frozen=True)
class Attack:
    """make: writes the files, returns the command's arguments; code: the exit code that is due; said: a part of the
    message; limits: settings of ours that are lowered meanwhile, `module:NAME` → value."""

    name: str
    make: Callable[[Place], list[Any]]
    code: int
    said: str
    limits: tuple[tuple[str, float], ...] = ()
