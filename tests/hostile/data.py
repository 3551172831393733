"""What --data may be: archives that swell, arrays that lie about their shape, texts that no parser survives."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import onnx_graphs
from hostile import Attack, Place


def graph(place: Place, data: object) -> list[Any]:
    """A run of an ONNX classifier of 12 x 12 images on data."""
    path = onnx_graphs.save(onnx_graphs.classifier(), place.folder / "model.onnx")
    return place.run(path, data=data, passes="rtn(format=int8(channel))")


def arrays(content: bytes, name: str = "a.npz") -> Callable[[Place], list[Any]]:
    """A classifier of images on an .npz."""
    return lambda place: graph(place, place.write(name, content))


def picture(write: Callable[[Path], object]) -> Callable[[Place], list[Any]]:
    """A classifier of images on a folder with one file."""

    def make(place: Place) -> list[Any]:
        folder = place.folder / "images" / "class"
        folder.mkdir(parents=True)
        write(folder / "a.png")
        return graph(place, folder.parent)

    return make


def png(width: int, height: int) -> bytes:
    """A PNG whose header says a size, and which holds no more than its header."""
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x00\x00\x00\x00"
    parts = [head, b"IDAT" + zlib.compress(b"\0" * 64), b"IEND"]
    packed = [(len(part) - 4).to_bytes(4, "big") + part + zlib.crc32(part).to_bytes(4, "big") for part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


SCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 12\n%%EndComments\n(ran) (w) file pop\nshowpage\n"
SMALL = (("compress.inputs.documents:MOST_BYTES", 1 << 20),)


def file(name: str, content: str | bytes) -> Callable[[Place], list[Any]]:
    """A run on a file of data."""
    return lambda place: place.run(data=place.write(name, content))


def npy(header: str) -> bytes:
    """An .npy that declares something and holds 64 bytes."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\0" * 64


def npz(**members: bytes) -> bytes:
    """An .npz of such."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as stream:
        for name, content in {**members, "labels": saved(np.zeros(8, np.int64))}.items():
            stream.writestr(f"{name}.npy", content)
    return made.getvalue()


def declared(shape: str, kind: str = "<i8") -> bytes:
    """An .npz whose array declares a shape."""
    return npz(images=npy(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"))


def pickled() -> bytes:
    """An .npz with an object in it."""
    made = io.BytesIO()
    np.savez(made, images=np.array([{"a": 1}], dtype=object), labels=np.zeros(1, np.int64))
    return made.getvalue()


def saved(array: NDArray[Any]) -> bytes:
    """A sound .npy."""
    made = io.BytesIO()
    np.save(made, array)
    return made.getvalue()


def flagged(content: bytes, bits: int, method: int | None = None) -> bytes:
    """A zip whose members say to be encrypted, or packed by another method."""
    changed = bytearray(content)
    for mark, flags, kind in ((b"PK\x03\x04", 6, 8), (b"PK\x01\x02", 8, 10)):
        at = changed.find(mark)
        changed[at + flags] |= bits
        if method is not None:
            changed[at + kind : at + kind + 2] = method.to_bytes(2, "little")
    return bytes(changed)


ZEROS = b"a" * (4 << 20)
NPZ, IMAGE = "cannot be read as .npz", "cannot be read as an image"

ATTACKS = (
    Attack("a bomb in gzip", file("a.txt.gz", gzip.compress(ZEROS)), 5, "more than", SMALL),
    Attack("a bomb in xz", file("a.txt.xz", lzma.compress(ZEROS, preset=0)), 5, "more than", SMALL),
    Attack("a bomb in gzip members", file("a.txt.gz", gzip.compress(ZEROS[: 1 << 19]) * 8), 5, "more than", SMALL),
    Attack("a bomb of rows", file("a.jsonl.gz", gzip.compress(b'{"ids": []}\n' * (1 << 18))), 5, "more than", SMALL),
    Attack("a text too large", file("a.txt", ZEROS), 5, "more than", SMALL),
    Attack("half an xz", file("a.txt.xz", lzma.compress(b"x" * 999, preset=0)[:-30]), 5, "cannot be read"),
    Attack("half a gzip", file("a.txt.gz", gzip.compress(b"x" * 999)[:-12]), 5, "cannot be read"),
    Attack("lists nested deeply", file("a.json", "[" * 100_000), 5, "cannot be read"),
    Attack("rows nested deeply", file("a.jsonl", '{"ids": ' + "[" * 100_000), 5, "is not JSON"),
    Attack("an id too long", file("a.json", f"[[{'9' * 5000}]]"), 5, "cannot be read"),
    Attack("an id beyond 64 bits", file("a.json", f"[[{10**30}]]"), 5, "vocabulary"),
    Attack("ids that are no numbers", file("a.json", "[[NaN, Infinity]]"), 5, "lists of token ids"),
    Attack("ids that are switches", file("a.json", "[[true]]"), 5, "lists of token ids"),
    Attack("half a character", file("a.jsonl", json.dumps({"text": "\ud800 half " * 99})), 5, "half a character"),
    Attack("a text that is no UTF-8", file("a.txt", b"\xff" * 999), 5, "UTF-8"),
    Attack("a row that drives the terminal", file("a.jsonl", '"\x1b[2J\x1b]0;owned\x07"'), 5, "line 1"),
    Attack("a name that drives the terminal", file("\x1b[2J.parquet", "x"), 2, "x1b[2J"),
    Attack("data that are a device", lambda place: place.run(data="/dev/zero"), 2, "No such data file"),
    Attack("an array of 1e18 values", arrays(declared("(1000000000, 1000000000)")), 5, NPZ),
    Attack("an array whose size overflows", arrays(declared("(9223372036854775807, 9223372036854775807)")), 5, NPZ),
    Attack("an array of a negative size", arrays(declared("(-1, 8)")), 5, NPZ),
    Attack("an array that says less than it has", arrays(declared("(1,)")), 5, NPZ),
    Attack("an array of objects", arrays(declared("(8,)", "|O")), 5, NPZ),
    Attack("an array that is pickled", arrays(pickled()), 5, NPZ),
    Attack("an array whose header runs code", arrays(npz(images=npy("__import__('os').abort()"))), 5, NPZ),
    Attack("an array whose header is nested deeply", arrays(npz(images=npy("(" * 5000))), 5, NPZ),
    Attack("an array that is no array", arrays(npz(images=b"x" * 64)), 5, NPZ),
    Attack("an array that is encrypted", arrays(flagged(declared("(8,)"), 1)), 5, NPZ),
    Attack("an array packed unlike any", arrays(flagged(declared("(8,)"), 0, 99)), 5, NPZ),
    Attack("a pickle for arrays", arrays(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR."), 5, NPZ),
    Attack(
        "one array of 1e18 values",
        arrays(npy("{'descr': '|u1', 'fortran_order': False, 'shape': (10**18,), }")),
        5,
        NPZ,
    ),
    Attack(
        "arrays that swell",
        arrays(npz(images=saved(np.ones((8, 12, 12, 3), np.uint8)))),
        6,
        "unpacks to",
        (("compress.inputs.npz:SHARE", 0),),
    ),
    Attack("a picture of 1e10 pixels", picture(lambda path: path.write_bytes(png(100_000, 100_000))), 5, IMAGE),
    Attack("a picture that ends early", picture(lambda path: path.write_bytes(png(64, 64))), 5, IMAGE),
    Attack("a picture that is a strip", picture(lambda path: path.write_bytes(png(10_000_000, 1))), 5, IMAGE),
    Attack("a picture that is a program", picture(lambda path: path.write_bytes(SCRIPT)), 5, IMAGE),
    Attack("a picture that is a pipe", picture(os.mkfifo), 5, "holds no images"),
)
