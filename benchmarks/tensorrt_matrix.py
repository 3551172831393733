"""What TensorRT-RTX builds, format by chip. Needs the extra tensorrt-rtx, no GPU. Whole models: tensorrt_sizes.py.

    python benchmarks/tensorrt_matrix.py                      # the matrix of one layer, as a table
    python benchmarks/tensorrt_matrix.py --write FILE.json    # the same as tests/data/tensorrt_rtx.json holds it

The answers are the builder's own: each layer is lowered as for the newest chip, whatever the rules say of this one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import onnx_ir as ir

from compress import hwprofiles
from compress.export.tensorrt import builder, target
from compress.export.tensorrt.probe import choice_of, one_layer
from compress.formats import parse_format
from compress.layer import ActSpec, LayerKind, LayerSpec

NEWEST = "nvidia-rtx-5090"
WIDTH = 128
INT8, FP8 = "int8(tensor)", "fp8_e4m3(tensor)"
LINEAR = (
    *(("", ""), ("int8(channel)", ""), ("int8(tensor)", ""), ("int4(group=128)", ""), ("int4(group=32)", "")),
    *(("int4(channel)", ""), ("int3(group=32)", ""), ("fp8_e4m3(channel)", ""), ("fp8_e4m3(tensor)", "")),
    *(("nvfp4", ""), ("fp4_e2m1(group=32)", ""), ("int8(channel)", INT8), ("fp8_e4m3(channel)", FP8)),
    *(("nvfp4", "nvfp4"), ("int4(group=32)", FP8)),
)
EMBEDDING = (
    *(("", ""), ("int8(channel)", ""), ("int4(channel)", ""), ("int4(group=32)", ""), ("fp8_e4m3(channel)", "")),
    ("nvfp4", ""),
)
CONV = (
    *(("", ""), ("int8(channel)", ""), ("int4(channel)", ""), ("fp8_e4m3(channel)", "")),
    *(("int8(channel)", INT8), ("fp8_e4m3(channel)", FP8)),
)


def spec_of(kind: str, weight: str, inputs: str, width: int = WIDTH) -> LayerSpec:
    """A layer `width` wide, or a convolution of 3x3 over as many channels."""
    conv = kind == "conv"
    act = ActSpec(parse_format(inputs), static=True) if inputs else None
    return LayerSpec(
        "layer",
        LayerKind(kind),
        (width, width * 9 if conv else width),
        ("layer",),
        format=parse_format(weight) if weight else None,
        act=act,
        kernel=(width, 3, 3) if conv else None,
    )


def engine_bytes(spec: LayerSpec, sm: int) -> int | None:
    """Size of the layer's engine, None where the builder refuses it."""
    profile = hwprofiles.load(NEWEST)
    document, ranges = one_layer(spec, choice_of(spec, profile), profile.runtime(target.RUNTIME))
    with tempfile.TemporaryDirectory() as folder:
        graph, engine = Path(folder) / "model.onnx", Path(folder) / "engine"
        ir.save(document, graph)
        answer = builder.compile_engine({"onnx": str(graph), "sm": sm, "ranges": ranges, "engine": str(engine)})
        return engine.stat().st_size if not answer["error"] else None


def rows() -> list[tuple[str, str, str]]:
    """(kind, weight, inputs) of every row."""
    kinds = {"linear": LINEAR, "conv": CONV, "embedding": EMBEDDING}
    return [(kind, *each) for kind, those in kinds.items() for each in those]


def matrix() -> dict[str, list[int]]:
    """The builder's answers: row → SMs that it built."""
    found = {}
    for kind, weight, inputs in rows():
        spec = spec_of(kind, weight, inputs)
        taken = [sm for sm in builder.CAPABILITIES if engine_bytes(spec, sm) is not None]
        found[" | ".join((kind, weight or "float", inputs or "float"))] = taken
        print(f"{kind:7} {weight or 'float':20} {inputs or 'float':18} {taken}", flush=True)
    return found


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    found = matrix()
    if given.write:
        built = ",\n".join(f"  {json.dumps(row)}: {sms}" for row, sms in found.items())
        head = json.dumps(f"TensorRT-RTX {builder.load_module().__version__}")
        given.write.write_text(f'{{\n "builder": {head},\n "built": {{\n{built}\n }}\n}}\n')


if __name__ == "__main__":
    sys.exit(main())
