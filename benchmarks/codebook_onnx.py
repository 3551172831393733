"""One 4096 × 4096 layer at 2 bits in ONNX Runtime's standard operators (export/onnx/codebook.py) against float32 MatMul
and INT4 (MatMulNBits, blocks of 32, accuracy level 4): time at 1, 4 and 128 tokens, paired in one run, and memory.

    python benchmarks/codebook_onnx.py [--budget 20]

One thread, in processor time: other work on the machine counts little. One layer again and again: its codes stay in
the last cache, float32 weights do not. Memory is that of a process which holds one layer: resident beyond what it had
before it loaded the file, after calls of one token, and of 128. Writes results/codebook_onnx.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from digits import rounded
from numpy.typing import NDArray
from paired import rounds

from compress import hwprofiles
from compress.export.onnx.graph import MICROSOFT, GraphBuilder
from compress.export.onnx.lowering import Choice, Source, choose
from compress.formats import parse_format
from compress.formats.codebook import Codebook
from compress.layer import Layer, LayerKind, LayerSpec
from compress.manifest import versions
from compress.stats.intervals import speedup

RESULT = Path(__file__).parent / "results" / "codebook_onnx.json"
RUNTIME = hwprofiles.load("cpu-x86-avx512-vnni").runtime("onnxruntime")
SIZE, BLOCK, TOKENS = 4096, 32, (1, 4, 128)
# a measurement at least, and rounds
FLOAT, INT4 = "float32 MatMul", "INT4 MatMulNBits"
# 2.00 bits a weight each, codebooks and scales aside; the last is VPTQ's own layout
FORMS = (
    "codebook(vector=8, entries=256, stages=2)",
    "codebook(vector=4, entries=256, stages=1)",
    "codebook(vector=8, entries=256, stages=2, out)",
    "codebook(vector=6, entries=4096, stages=1, out)",
)


def layer_of(text: str) -> tuple[Layer, Codebook]:
    """Random codes and entries."""
    made, form = torch.Generator().manual_seed(0), parse_format(text)
    assert isinstance(form, Codebook)
    rows, units = form.units((SIZE, SIZE))
    codes = torch.randint(0, form.entries, (rows, units * form.stages), generator=made)
    book = torch.randn(1, form.stages, form.entries, form.vector, generator=made)
    scale = torch.rand((SIZE, 1) if form.scale == "row" else (1, SIZE), generator=made).half().float() + 0.5
    kept = codes.to(torch.uint8 if form.bits <= 8 else torch.int32)
    weight = form.pack(kept, form.params(book, scale.half().float(), SIZE), (SIZE, SIZE))
    return Layer("layer", LayerKind.LINEAR, weight), form


def saved(folder: Path, name: str, make: Callable[[GraphBuilder, ir.Value], ir.Value]) -> Path:
    """A graph x (tokens, SIZE) → y with its weights beside it, as the target writes them."""
    x = ir.Value(name="x", shape=ir.Shape(["tokens", SIZE]), type=ir.TensorType(ir.DataType.FLOAT))
    opsets = {"": RUNTIME.opset, MICROSOFT: 1}
    graph = ir.Graph([x], [], nodes=[], name="layer", opset_imports=opsets)
    builder = GraphBuilder(graph, "layer")
    y = make(builder, x)
    graph.extend(builder.nodes)
    y.shape = ir.Shape(["tokens", SIZE])
    graph.outputs.append(y)
    path = folder / f"{name}.onnx"
    ir.save(ir.Model(graph, ir_version=RUNTIME.ir_version), path, external_data=f"{name}.data")
    return path


def codebook_file(folder: Path, text: str) -> Path:
    layer, form = layer_of(text)
    spec = LayerSpec("layer", LayerKind.LINEAR, (SIZE, SIZE), ("layer",), format=form)
    choice = choose(spec, RUNTIME)
    assert isinstance(choice, Choice)
    source = Source(spec, choice, lambda: layer)
    lowers = choice.lowers.linear
    assert lowers is not None
    return saved(folder, f"codebook{FORMS.index(text)}", lambda graph, x: lowers(graph, source, x))


def float_file(folder: Path, weight: torch.Tensor) -> Path:
    def make(graph: GraphBuilder, x: ir.Value) -> ir.Value:
        return graph.node("MatMul", [x, graph.initializer("w", lambda: weight.T, torch.float32, (SIZE, SIZE))])

    return saved(folder, "float32", make)


def int4_file(folder: Path, weight: torch.Tensor) -> Path:
    """Rounded to nearest, symmetric, zero at 8."""
    blocks = weight.reshape(SIZE, -1, BLOCK)
    scale = blocks.abs().amax(2, keepdim=True) / 7
    codes = ((blocks / scale).round() + 8).clamp(0, 15).to(torch.uint8)
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    settings = {"K": SIZE, "N": SIZE, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}

    def make(graph: GraphBuilder, x: ir.Value) -> ir.Value:
        stored = graph.initializer("w", lambda: packed, torch.uint8, packed.shape)
        scales = graph.initializer("s", lambda: scale[..., 0], torch.float32, scale.shape[:2])
        return graph.node("MatMulNBits", [x, stored, scales], settings, domain=MICROSOFT)

    return saved(folder, "int4", make)


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def inputs(tokens: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((tokens, SIZE), np.float32)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held(path: Path) -> dict[str, float]:
    """Megabytes of a layer, in this process."""
    before = resident()
    loaded, told = session(path), {}
    for tokens, key in ((1, "resident_mb"), (128, "resident_after_128_tokens_mb")):
        for _ in range(3):
            loaded.run(None, {"x": inputs(tokens)})
        told[key] = (resident() - before) / 1e6
    return told


def memory(path: Path) -> dict[str, float]:
    """The same, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--held", str(path)], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(files: dict[str, Path], tokens: int, budget_s: float) -> list[dict[str, Any]]:
    """A row per arm. The answers are checked before."""
    x, sessions = inputs(tokens), {name: session(path) for name, path in files.items()}
    for text in FORMS:
        exact = x @ layer_of(text)[0].float_weight().T.numpy()
        assert np.abs(sessions[text].run(None, {"x": x})[0] - exact).max() < 1e-4 * np.abs(exact).max()
    spent = rounds({name: lambda one=one: one.run(None, {"x": x}) for name, one in sessions.items()}, budget_s)
    rows = []
    for name, seconds in spent.items():
        row: dict[str, Any] = {"arm": name, "tokens": tokens, "rounds": len(seconds), "ms": np.median(seconds) * 1e3}
        for rival in (FLOAT, INT4):
            value, interval = speedup(np.log(spent[rival] / seconds))
            row[f"times {rival}"] = [value, interval.low, interval.high]
        rows.append(row)
        print(json.dumps(rounded(row)), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds per table")
    parser.add_argument("--held", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.held:
        print(json.dumps(held(given.held)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder, weight = Path(scratch), layer_of(FORMS[0])[0].float_weight()
        files = {FLOAT: float_file(folder, weight), INT4: int4_file(folder, weight)}
        files |= {text: codebook_file(folder, text) for text in FORMS}
        del weight
        sizes = {name: {"file_mb": path.with_suffix(".data").stat().st_size / 1e6} for name, path in files.items()}
        kept = {name: sizes[name] | memory(path) for name, path in files.items()}
        print(json.dumps(rounded(kept), indent=1), flush=True)
        rows = [row for count in TOKENS for row in measure(files, count, given.budget)]
    told = {"machine": hwprofiles.machine_summary(), "load_average": os.getloadavg()[0], "versions": versions()}
    content = {**told, "layer": [SIZE, SIZE], "memory": kept, "rows": rows}
    RESULT.write_text(json.dumps(rounded(content), indent=1) + "\n")


if __name__ == "__main__":
    main()
