"""Ways to spoil a finished artifact or report, each a function of its folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress import manifest
from helpers.reports import report_of
from hostile import PROFILE, Place
from hostile.configs import EVIL
from hostile.weights import packed, unpacked

DEEP = "[" * 100_000
BLOCK = "model/block-0000.safetensors"
Command = Callable[[Place], list[Any]]


def seal(folder: Path) -> None:
    """Make the manifest tell the files as they are."""
    path = folder / manifest.NAME
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "files": manifest.describe_files(folder)}))


def spoiled(verb: str, change: Callable[[Path], object], *more: object) -> Command:
    """A verb on an artifact that was changed, and whose manifest was made to fit."""

    def make(place: Place) -> list[Any]:
        folder = place.copied_artifact()
        change(folder)
        seal(folder)
        return given(place, verb, folder, more)

    return make


def given(place: Place, verb: str, folder: Path, more: tuple[object, ...] = ()) -> list[Any]:
    """The command of a verb."""
    own: dict[str, list[Any]] = {
        "export": ["-o", place.out, "-q", "--profile", PROFILE, "--target", "checkpoint"],
        "generate": ["--prompt", "x", "-n", 2],
    }
    return [verb, folder, *own.get(verb, []), *more]


def facts(verb: str, change: Callable[[dict[str, Any]], object], *more: object) -> Command:
    """A verb on an artifact with another manifest."""

    def make(place: Place) -> list[Any]:
        folder = place.copied_artifact()
        found = json.loads((folder / manifest.NAME).read_text())
        new = change(found)
        (folder / manifest.NAME).write_text(new if isinstance(new, str) else json.dumps(found))
        return given(place, verb, folder, more)

    return make


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change a file of JSON."""

    def spoil(folder: Path) -> None:
        path = folder / name
        found = json.loads(path.read_text())
        new = change(found)
        path.write_text(new if isinstance(new, str) else json.dumps(found))
        (folder / "evil.py").write_text(EVIL)

    return spoil


def header(change: Callable[[list[dict[str, Any]]], object]) -> Callable[[Path], object]:
    """Change what a file of the store says of its layers."""

    def spoil(folder: Path) -> None:
        found, values = unpacked(folder / BLOCK)
        inner = json.loads(found["__metadata__"]["compress"])
        new = change(inner["layers"])
        found["__metadata__"]["compress"] = new if isinstance(new, str) else json.dumps(inner)
        (folder / BLOCK).write_bytes(packed(found, values))

    return spoil


def tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change the names and shapes of the tensors of a file of the store."""

    def spoil(folder: Path) -> None:
        found, values = unpacked(folder / BLOCK)
        change(found)
        (folder / BLOCK).write_bytes(packed(found, values))

    return spoil


def renamed(found: dict[str, Any]) -> None:
    name = next(key for key in found if key.endswith("codes") or ".weight." in key)
    found["other"] = found.pop(name)


def flattened(found: dict[str, Any]) -> None:
    entry = next(value for key, value in found.items() if ".weight." in key)
    entry["shape"] = [entry["shape"][0] * entry["shape"][1], *entry["shape"][2:]]


def of_graph(folder: Path) -> None:
    """Make the graph what is loaded."""
    shutil.rmtree(folder / "checkpoint")
    path = folder / manifest.NAME
    facts = json.loads(path.read_text())
    facts["profile"]["target"] = "onnx"
    path.write_text(json.dumps(facts))


def external(location: str) -> Callable[[Path], object]:
    """The graph takes a weight from another file."""

    def spoil(folder: Path) -> None:
        import onnx

        (folder.parent / "secret").write_bytes(b"\0" * (1 << 20))
        path = folder / "onnx" / "model.onnx"
        model = onnx.load(path, load_external_data=False)
        tensor = max(model.graph.initializer, key=lambda each: len(each.raw_data))
        size = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", str(size))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
        path.write_bytes(model.SerializeToString())
        of_graph(folder)

    return spoil


def report(content: str, *more: str) -> Command:
    """`compress report` of a file."""
    return lambda place: ["report", place.write("report.json", content), *more]


def changed_report(change: Callable[[dict[str, Any]], object], *more: str) -> Command:
    """`compress report` of a report that was changed."""

    def make(place: Place) -> list[Any]:
        found = json.loads(report_of().model_dump_json())
        change(found)
        return ["report", place.write("report.json", json.dumps(found)), *more]

    return make


def link(name: str, target: str) -> Callable[[Path], object]:
    """A link in place of a file."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return spoil


def pipe(folder: Path) -> None:
    """A pipe in place of the graph: whoever reads it waits for ever."""
    (folder / "onnx" / "model.onnx").unlink()
    os.mkfifo(folder / "onnx" / "model.onnx")
