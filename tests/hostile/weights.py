"""Checkpoints: safetensors headers that lie, indexes that lead out of the folder, pickles."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import Attack, Place

NAME = "model.layers.0.mlp.up_proj.weight"
Header = dict[str, Any]


def packed(header: Header | bytes, values: bytes) -> bytes:
    """A safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


def unpacked(path: Path) -> tuple[Header, bytes]:
    """Header and values of one."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def header(change: Callable[[Header], object]) -> Callable[[Place], list[Any]]:
    """A checkpoint whose header was changed and its values were not."""

    def make(place: Place) -> list[Any]:
        folder = place.copied_model()
        path = folder / "model.safetensors"
        found, values = unpacked(path)
        change(found)
        path.write_bytes(packed(found, values))
        return place.run(folder)

    return make


def raw(text: Callable[[bytes], bytes]) -> Callable[[Place], list[Any]]:
    """A checkpoint whose header is other text."""

    def make(place: Place) -> list[Any]:
        folder = place.copied_model()
        path = folder / "model.safetensors"
        found, values = unpacked(path)
        path.write_bytes(packed(text(json.dumps(found).encode()), values))
        return place.run(folder)

    return make


def length(size: int) -> Callable[[Place], list[Any]]:
    """A header that says to be of another length."""

    def make(place: Place) -> list[Any]:
        folder = place.copied_model()
        path = folder / "model.safetensors"
        path.write_bytes(size.to_bytes(8, "little") + path.read_bytes()[8:])
        return place.run(folder)

    return make


def index(content: str, also: Callable[[Path], object] = lambda folder: None) -> Callable[[Place], list[Any]]:
    """A checkpoint with an index."""

    def make(place: Place) -> list[Any]:
        folder = place.copied_model()
        (folder / "model.safetensors").rename(place.folder / "secret.safetensors")
        (folder / "model.safetensors.index.json").write_text(content)
        also(folder)
        return place.run(folder)

    return make


def instead(name: str, write: Callable[[Path], object]) -> Callable[[Place], list[Any]]:
    """A checkpoint with something else in place of its weights."""

    def make(place: Place) -> list[Any]:
        folder = place.copied_model()
        (folder / "model.safetensors").unlink()
        write(folder / name)
        return place.run(folder)

    return make


def _duplicate(text: bytes) -> bytes:
    entry = json.dumps(json.loads(text)[NAME])
    return text.rstrip()[:-1] + f', "{NAME}": {entry}}}'.encode()


def _swap(found: Header) -> None:
    """Two tensors on one range."""
    other = next(key for key in found if key.endswith("gate_proj.weight"))
    found[NAME]["data_offsets"] = found[other]["data_offsets"]


def _hole(found: Header) -> None:
    found.pop(NAME)


PICKLE = b"cos\nsystem\n(S'touch ran'\ntR."
BROKEN = "truncated or malformed"

ATTACKS = (
    Attack("a header longer than the file", length(2**63), 5, BROKEN),
    Attack("a header of 2**64 - 1 bytes", length(2**64 - 1), 5, BROKEN),
    Attack("a header of no bytes", length(0), 5, BROKEN),
    Attack("a header that ends inside itself", length(20), 5, BROKEN),
    Attack("a header that is no JSON", raw(lambda text: b"{" * len(text)), 5, BROKEN),
    Attack("a header nested deeply", raw(lambda _: b"[" * 100_000), 5, BROKEN),
    Attack("a header with a key twice", raw(_duplicate), 5, "twice"),
    Attack("a header that is no UTF-8", raw(lambda text: text.replace(b"F32", b"\xff32", 1)), 5, BROKEN),
    Attack("two tensors on one range", header(_swap), 5, BROKEN),
    Attack("a range that no tensor has", header(_hole), 5, BROKEN),
    Attack("offsets outside the file", header(lambda h: h[NAME].update(data_offsets=[0, 10**12])), 5, BROKEN),
    Attack("offsets beyond 64 bits", header(lambda h: h[NAME].update(data_offsets=[0, 10**30])), 5, BROKEN),
    Attack("offsets that run backwards", header(lambda h: h[NAME]["data_offsets"].reverse()), 5, BROKEN),
    Attack("negative offsets", header(lambda h: h[NAME].update(data_offsets=[-8, 0])), 5, BROKEN),
    Attack("a negative shape", header(lambda h: h[NAME].update(shape=[-96, -64])), 5, BROKEN),
    Attack("a shape of 1e18 elements", header(lambda h: h[NAME].update(shape=[10**9, 10**9])), 5, BROKEN),
    Attack("a shape whose size overflows", header(lambda h: h[NAME].update(shape=[2**63, 2**63, 4])), 5, BROKEN),
    Attack("a shape of floats", header(lambda h: h[NAME].update(shape=[96.0, 64.0])), 5, BROKEN),
    Attack("another dtype of other size", header(lambda h: h[NAME].update(dtype="F16")), 5, BROKEN),
    Attack("an unknown dtype", header(lambda h: h[NAME].update(dtype="X32")), 5, BROKEN),
    Attack("weights in whole numbers", header(lambda h: h[NAME].update(dtype="I32")), 4, "whole numbers"),
    Attack("a tensor named as a path", header(lambda h: h.update({"../../x": h.pop(NAME)})), 5, "lacks 1 parameter"),
    Attack("an index that leads out", index('{"weight_map": {"a": "../secret.safetensors"}}'), 5, "not a file beside"),
    Attack("an index of the root", index('{"weight_map": {"a": "/etc/passwd"}}'), 5, "not a file beside"),
    Attack("an index into a folder", index('{"weight_map": {"a": "x/y.safetensors"}}'), 5, "not a file beside"),
    Attack("an index of a parent", index('{"weight_map": {"a": ".."}}'), 5, "not a file beside"),
    Attack("an index with a NUL", index('{"weight_map": {"a": "a\\u0000b"}}'), 5, "not a file beside"),
    Attack(
        "an index of an endless name", index('{"weight_map": {"a": "' + "a" * 5000 + '"}}'), 5, "not a checkpoint index"
    ),
    Attack("an index of no names", index('{"weight_map": {"a": [1], "b": {}}}'), 5, "not a checkpoint index"),
    Attack("an index without files", index('{"weight_map": {}}'), 5, "names no file"),
    Attack("an index nested deeply", index("[" * 100_000), 5, "not a checkpoint index"),
    Attack("an index of a number too long", index("9" * 5000), 5, "not a checkpoint index"),
    Attack(
        "an index of a text file",
        index('{"weight_map": {"a": "config.json"}}'),
        5,
        BROKEN,
    ),
    Attack(
        "an index of a device",
        index('{"weight_map": {"a": "a"}}', lambda folder: (folder / "a").symlink_to("/dev/zero")),
        5,
        "not a file beside",
    ),
    Attack("weights that are a pipe", instead("model.safetensors", os.mkfifo), 5, "no *.safetensors"),
    Attack("weights that are a folder", instead("model.safetensors", Path.mkdir), 5, "no *.safetensors"),
    Attack("a part that is a pipe", instead("part.safetensors", os.mkfifo), 5, "no *.safetensors"),
    Attack(
        "weights that link to a device", instead("model.safetensors", lambda p: p.symlink_to("/dev/zero")), 5, "no *."
    ),
    Attack("a pickle", instead("pytorch_model.bin", lambda path: path.write_bytes(PICKLE)), 5, "A pickle can run code"),
    Attack("a pickle in safetensors", instead("model.safetensors", lambda path: path.write_bytes(PICKLE)), 5, BROKEN),
    Attack("a checkpoint of torch", instead("model.pt", lambda path: path.write_bytes(PICKLE)), 5, "A pickle can run"),
)
