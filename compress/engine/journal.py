"""What a run has finished, kept so that a repeated command resumes it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.files import parse_json


class Journal:
    """What is finished, one JSON line each, synced: step name → data. A torn last line counts as not written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: dict[str, Any] = {}
        whole = 0
        if path.is_file():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    entry = parse_json(line) if line.endswith(b"\n") else {}
                    self.steps[str(entry["step"])] = entry["data"]
                except (ValueError, KeyError, TypeError):
                    break
                whole += len(line)
            os.truncate(path, whole)

    def __contains__(self, step: str) -> bool:
        return step in self.steps

    def get(self, step: str) -> Any:
        """The data of a finished step, or None."""
        return self.steps.get(step)

    def add(self, step: str, data: Any = None) -> None:
        """Note a step as finished."""
        with self.path.open("a", encoding="utf8") as stream:
            stream.write(json.dumps({"step": step, "data": data}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.steps[step] = data


@dataclass(frozen=True)
class Steps:
    """A part of a journal: its steps have names of their own."""

    journal: Journal
    prefix: str

    def __contains__(self, step: str) -> bool:
        return self.prefix + step in self.journal

    def get(self, step: str) -> Any:
        """The data of a finished step, or None."""
        return self.journal.get(self.prefix + step)

    def add(self, step: str, data: Any = None) -> None:
        """Note a step as finished."""
        self.journal.add(self.prefix + step, data)
