"""tensorrt.json: what a folder of this target holds, and for what it was made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from compress.errors import InputError
from compress.export.tensorrt import sparsity
from compress.export.tensorrt.builder import MISMATCH, STREAMING
from compress.export.tensorrt.flavours import FLAVOURS, FULL, Flavour

NAME = "tensorrt.json"


class Record(BaseModel):
    """engine: its path in the folder, empty where none was built; onnx_sha256: of the graph that it was built from.

    builder: its name with its version (without where none was built); device: the GPU that TensorRT built on, empty
    for an engine that was built ahead; settings: of the builder, as read back from it; timing_cache: what became of it;
    sparse: layers whose weights are 2:4.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: Literal["built", "checked"]
    builder: str
    sm: int
    profile: str
    compute: str
    engine: str
    onnx_sha256: dict[str, str]
    ranges: dict[str, Any]
    engine_bytes: int
    graph_bytes: int
    module: Literal["tensorrt-rtx", "tensorrt"] = "tensorrt-rtx"
    version: str = ""
    device: str = ""
    settings: dict[str, Any] = {}
    sparse: tuple[str, ...] = ()

    @property
    def flavour(self) -> Flavour:
        """What builds and runs the engine."""
        return FLAVOURS[self.module]

    @property
    def runtime(self) -> str:
        """`TensorRT-RTX 1.7.1 for SM 89`."""
        return f"{self.builder} for SM {self.sm}"

    @property
    def notes(self) -> tuple[str, ...]:
        """For the report, where the engine does not run here."""
        where = "Quality and agreement are those of the same graph in ONNX Runtime on this machine's CPU"
        later = f"`compress verify OUT` on a machine with a GPU of SM {self.sm}"
        if self.level == "built":
            return (
                *self.built,
                f"The engine has not run: {later} runs it. {where}; speed was not measured.",
            )
        sparse = (sparsity.AHEAD.format(count=len(self.sparse)),) if self.sparse else ()
        return (
            f"No engine was built: {FULL.title} builds on the GPU that it builds for. {later} and TensorRT 10.13 to 11 "
            "builds and runs it and completes the report; build_command.txt builds it by hand.",
            f"The graph has not run in TensorRT. {where}; speed was not measured.",
            *sparse,
        )

    @property
    def built(self) -> tuple[str, ...]:
        """What came of the build, for the report."""
        size, beside = f"{self.engine_bytes / 1e6:.1f} MB", f"{self.graph_bytes / 1e6:.1f} MB"
        where = f" on {self.device}" if self.device else ""
        told = [
            f"{self.builder} accepted the graph and built {self.engine}{where}: {size}, of which what exceeds the "
            f"graph's {beside} is code. The graph is not needed there."
        ]
        if self.settings.get("timing_cache") == MISMATCH:
            told.append(f"The timing cache was {MISMATCH}: the build timed all kernels anew.")
        if problem := self.settings.get("timing_cache_problem"):
            told.append(f"For the next build, {problem}.")
        if STREAMING in self.settings.get("builder_flags", ()):
            told.append("Weights may stay in host memory, since they fill most of the GPU's: slower.")
        if self.sparse:
            told.append(sparsity.told(self.sparse, self.settings.get("sparsity", ()), self.builder))
        return tuple(told)

    def write(self, folder: Path) -> None:
        """Into its file, the ranges in the order of the engine's optimization profiles."""
        text = json.dumps(self.model_dump(), indent=1) + "\n"
        (folder / NAME).write_text(text, encoding="utf8")


def read(folder: Path) -> Record:
    """The record of a folder. Raises: InputError."""
    path = folder / NAME
    try:
        return Record.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}). Export the model again.") from error
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        raise InputError(f"{path} cannot be read ({reason}). Export the model again.") from error


def digests(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of files that are there."""
    found = {}
    for name in names:
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
