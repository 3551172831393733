"""What TensorRT-RTX builds, format by chip, and pycoder's engines. Needs the extra tensorrt-rtx, no GPU.

    python benchmarks/tensorrt_matrix.py                      # the matrix of one layer, as a table
    python benchmarks/tensorrt_matrix.py --write FILE.json    # the same as tests/data/tensorrt_rtx.json holds it
    python benchmarks/tensorrt_matrix.py --model DIR --data TEXT [--profile nvidia-l4]

The answers are the builder's own: each layer is lowered as for the newest chip, whatever the rules say of this one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import onnx_ir as ir

from compress import hwprofiles
from compress.data import calibrate
from compress.evaluate import verification_ids, verify_export
from compress.export.tensorrt import builder, target
from compress.export.tensorrt.probe import one_layer
from compress.export.tensorrt.rules import EngineChoice, choose
from compress.formats import parse_format
from compress.layer import ActSpec, LayerKind, LayerSpec
from compress.model import load
from compress.pipeline import Pipeline

NEWEST = "nvidia-rtx-5090"
WIDTH = 128
INT8, FP8 = "int8(tensor)", "fp8_e4m3(tensor)"
LINEAR = (
    *(("", ""), ("int8(channel)", ""), ("int8(tensor)", ""), ("int4(group=128)", ""), ("int4(group=32)", "")),
    *(("int4(channel)", ""), ("int3(group=32)", ""), ("fp8_e4m3(channel)", ""), ("fp8_e4m3(tensor)", "")),
    *(("nvfp4", ""), ("fp4_e2m1(group=32)", ""), ("int8(channel)", INT8), ("fp8_e4m3(channel)", FP8)),
)
CONV = (
    *(("", ""), ("int8(channel)", ""), ("int4(channel)", ""), ("fp8_e4m3(channel)", "")),
    *(("int8(channel)", INT8), ("fp8_e4m3(channel)", FP8)),
)
RECIPES = (
    *("", "rtn(format=int8(channel))", "rtn(format=int4(group=128))", "rtn(format=fp8_e4m3(channel))"),
    "rtn(format=int8(channel)), act_quant(format=int8(tensor), static=true)",
    "rtn(format=fp8_e4m3(channel)), act_quant(format=fp8_e4m3(tensor), static=true)",
)


def spec_of(kind: str, weight: str, inputs: str, width: int = WIDTH) -> LayerSpec:
    """A layer `width` wide, or a convolution of 3x3 over as many channels."""
    conv = kind == "conv"
    act = ActSpec(parse_format(inputs), static=True) if inputs else None
    return LayerSpec(
        "layer",
        LayerKind.CONV if conv else LayerKind.LINEAR,
        (width, width * 9 if conv else width),
        ("layer",),
        format=parse_format(weight) if weight else None,
        act=act,
        kernel=(width, 3, 3) if conv else None,
    )


def engine_bytes(spec: LayerSpec, sm: int) -> int | None:
    """Size of the layer's engine, None where the builder refuses it."""
    profile = hwprofiles.load(NEWEST)
    choice = choose(spec, profile)
    assert isinstance(choice, EngineChoice), choice
    document, ranges = one_layer(spec, choice, profile.runtime(target.RUNTIME))
    with tempfile.TemporaryDirectory() as folder:
        graph, engine = Path(folder) / "model.onnx", Path(folder) / "engine"
        ir.save(document, graph)
        answer = builder.compile_engine({"onnx": str(graph), "sm": sm, "ranges": ranges, "engine": str(engine)})
        return engine.stat().st_size if not answer["error"] else None


def rows() -> list[tuple[str, str, str]]:
    """(kind, weight, inputs) of every row."""
    return [("linear", *each) for each in LINEAR] + [("conv", *each) for each in CONV]


def matrix() -> dict[str, list[int]]:
    """The builder's answers: row → SMs that it built."""
    found = {}
    for kind, weight, inputs in rows():
        spec = spec_of(kind, weight, inputs)
        taken = [sm for sm in builder.CAPABILITIES if engine_bytes(spec, sm) is not None]
        found[" | ".join((kind, weight or "float", inputs or "float"))] = taken
        print(f"{kind:7} {weight or 'float':20} {inputs or 'float':18} {taken}", flush=True)
    return found


def model_table(folder: Path, data: Path, name: str) -> None:
    """One engine per format of a model: seconds, bytes, agreement of its graph with the model in memory."""
    model, profile = load(str(folder)), hwprofiles.load(name)
    calibration = calibrate(model, data, samples=32, length=256)
    columns = ("passes", "export s", "graph MB", "engine MB", "relative difference", "same top token")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for text in RECIPES:
        made = Pipeline.parse(text).run(model, calibration).model if text else model
        with tempfile.TemporaryDirectory() as place:
            started = time.monotonic()
            lowered = target.write(made, profile, Path(place))
            seconds = time.monotonic() - started
            found = verify_export(
                made, lowered.folder, profile, verification_ids(made, calibration.windows.ids[:4]), lowered.bounds
            )
            assert found.agrees, (text, found)
            record = json.loads((Path(place) / "tensorrt.json").read_text())
        sizes = f"{record['graph_bytes'] / 1e6:.2f} | {record['engine_bytes'] / 1e6:.2f}"
        told = f"{found.max_relative_difference:.4f} | {found.top1_agreement:.1%}"
        print(f"| {text or 'none'} | {seconds:.0f} | {sizes} | {told} |", flush=True)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--profile", default="nvidia-l4")
    given = parser.parse_args()
    if given.model:
        model_table(given.model, given.data, given.profile)
        return
    found = matrix()
    if given.write:
        built = ",\n".join(f"  {json.dumps(row)}: {sms}" for row, sms in found.items())
        head = json.dumps(f"TensorRT-RTX {builder.load_module().__version__}")
        given.write.write_text(f'{{\n "builder": {head},\n "built": {{\n{built}\n }}\n}}\n')


if __name__ == "__main__":
    sys.exit(main())
