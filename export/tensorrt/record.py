"""tensorrt.json: what a folder of this target holds, and for what it was made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from compress.errors import InputError

NAME = "tensorrt.json"


class Record(BaseModel):
    """engine: its path in the folder, empty where none was built; onnx_sha256: of the graph that it was built from."""

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

    @property
    def runtime(self) -> str:
        """`TensorRT-RTX 1.7.1 for SM 89`."""
        return f"{self.builder} for SM {self.sm}"

    @property
    def notes(self) -> tuple[str, ...]:
        """For the report."""
        where = "Quality and agreement are those of the same graph in ONNX Runtime on this machine's CPU"
        if self.level == "built":
            size, beside = f"{self.engine_bytes / 1e6:.1f} MB", f"{self.graph_bytes / 1e6:.1f} MB"
            return (
                f"{self.builder} accepted the graph and built {self.engine}: {size}, of which what exceeds the graph's "
                f"{beside} is code. The graph is not needed there.",
                f"The engine has not run: that takes a GPU of SM {self.sm}. {where}; speed was not measured.",
            )
        return (
            f"No engine was built: TensorRT-RTX does not build for SM {self.sm}. build_command.txt does, on that chip.",
            f"The graph has not run in TensorRT. {where}; speed was not measured.",
        )

    def write(self, folder: Path) -> None:
        """Into its file."""
        text = json.dumps(self.model_dump(), indent=1, sort_keys=True) + "\n"
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
