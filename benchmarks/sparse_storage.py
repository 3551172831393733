"""Pruned weights stored without their zeros: bytes of a model's layers, and the time that the folder of `native` takes
to load and to decode a token, beside the same model dense; and what TensorRT-RTX makes of 2:4 weights with its flag.

    python benchmarks/sparse_storage.py MODEL [--budget 60]

One thread. Decoding is timed in pairs, in rounds of shuffled order, with a noise floor (compress.speed.timing); loading
is the median of five. The builder needs the extra tensorrt-rtx, no GPU: engines are compared byte by byte, nothing is
timed. Writes results/sparse_storage.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from digits import rounded

from compress import hwprofiles
from compress.export import find
from compress.export.tensorrt import builder
from compress.export.tensorrt import target as tensorrt
from compress.export.tensorrt.probe import choice_of, one_layer
from compress.formats import parse_format
from compress.layer import ActSpec, LayerKind, LayerSpec
from compress.manifest import versions
from compress.models.model import Model
from compress.opening import load
from compress.pipeline import Pipeline
from compress.profiles import as_profile
from compress.speed.timing import pair
from compress.stats.intervals import speedup

RESULT = Path(__file__).parent / "results" / "sparse_storage.json"
RECIPES = {
    "30 %": "magnitude(sparsity=0.3), pack_sparse",
    "50 %": "magnitude(sparsity=0.5), pack_sparse",
    "70 %": "magnitude(sparsity=0.7), pack_sparse",
    "90 %": "magnitude(sparsity=0.9), pack_sparse",
    "2:4": "magnitude(pattern=2:4), pack_sparse(format=sparse(mask=2:4))",
}
TIMED, LOADS, PAST = "70 %", 5, 128
WIDTH, BATCH = 1024, 256
CHIPS = (80, 86, 89, 120)
LAYERS = (("linear", "", ""), ("linear", "int8(channel)", "int8(tensor)"), ("conv", "", ""))


def bits(model: Model) -> float:
    """Stored bits per weight of the layers inside the blocks."""
    inner = [spec for spec in model.structure.layers.values() if spec.segment >= 0]
    sizes = [spec.source_bytes if spec.format is None else spec.format.stored_bytes(spec.shape) for spec in inner]
    return 8 * sum(sizes) / sum(spec.shape[0] * spec.shape[1] for spec in inner)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def storage(model: Model, scratch: Path, budget_s: float) -> dict[str, Any]:
    """Sizes of every recipe, and the time of one of them beside the dense model."""
    target, profile = find("native"), as_profile(hwprofiles.load("cpu-x86-avx2"), "native")
    found: dict[str, Any] = {"dense": {"bits_per_weight": bits(model)}}
    target.write(model, profile, scratch / "dense")
    found["dense"]["native_bytes"] = folder_bytes(scratch / "dense")
    for name, text in RECIPES.items():
        made = Pipeline.parse(text).run(model).model
        folder = scratch / name.replace(":", "of").replace(" %", "")
        target.write(made, profile, folder)
        found[name] = {"bits_per_weight": bits(made), "native_bytes": folder_bytes(folder)}
        if name == TIMED:
            found["timed"] = {"recipe": text} | timed(target, folder, scratch / "dense", budget_s)
    return found


def timed(target: Any, folder: Path, dense: Path, budget_s: float) -> dict[str, Any]:
    """Loading, and decoding one token after `PAST`."""
    found: dict[str, Any] = {}
    arms = {}
    for name, place in (("dense", dense), ("sparse", folder)):
        sessions = [target.session(place, 1) for _ in range(LOADS)]
        found[f"{name}_load_s"] = statistics.median(session.load_s for session in sessions)
        arms[name] = sessions[-1].call(np.ones((1, 1), np.int64), PAST)
    samples = pair(arms, baseline="dense", seed=0, budget_s=budget_s)
    for arm, seconds in (("decode_speedup", samples.seconds["sparse"]), ("control", samples.control)):
        value, interval = speedup(np.log(samples.seconds["dense"] / seconds))
        found[arm] = [value, interval.low, interval.high]
    return found | {"rounds": samples.rounds}


def spec_of(kind: str, weight: str, inputs: str) -> LayerSpec:
    conv = kind == "conv"
    return LayerSpec(
        "layer",
        LayerKind(kind),
        (WIDTH, WIDTH * 9 if conv else WIDTH),
        ("layer",),
        format=parse_format(weight) if weight else None,
        act=ActSpec(parse_format(inputs), static=True) if inputs else None,
        kernel=(WIDTH, 3, 3) if conv else None,
    )


def two_of_four(document: ir.Model) -> None:
    """Zeros in the weight, two of every four along both of its first axes, whichever is summed up."""
    for value in document.graph.initializers.values():
        assert value.const_value is not None
        weight = value.const_value.numpy().copy()
        if weight.ndim >= 2 and min(weight.shape[:2]) == WIDTH:
            rows, columns = np.indices(weight.shape[:2])
            weight[(rows + columns) % 4 >= 2] = 0
            value.const_value = ir.tensor(weight, dtype=value.dtype, name=value.name)


def engines(scratch: Path) -> list[dict[str, Any]]:
    """A layer's engine with and without the flag: bytes, whether they are the same, and what the builder says."""
    profile, found = hwprofiles.load("nvidia-rtx-5090"), []
    for kind, weight, inputs in LAYERS:
        spec = spec_of(kind, weight, inputs)
        document, _ = one_layer(spec, choice_of(spec, profile), profile.runtime(tensorrt.RUNTIME))
        two_of_four(document)
        shape = [BATCH, *list(document.graph.inputs[0].shape or ())[1:]]
        document.graph.inputs[0].shape = ir.Shape(shape)
        graph = scratch / "model.onnx"
        ir.save(document, graph)
        for sm in CHIPS:
            made, said = [], []
            for sparse in (False, True):
                request = {"onnx": str(graph), "sm": sm, "ranges": {}, "engine": str(scratch / "engine")}
                answer = builder.compile_engine(request | {"sparse_weights": sparse})
                assert not answer["error"], answer
                made.append((scratch / "engine").read_bytes())
                said = answer["settings"].get("sparsity", [])
            row = {"layer": f"{kind} {weight or 'float16'}", "sm": sm, "bytes": len(made[0])}
            found.append(row | {"same_with_flag": made[0] == made[1], "builder_said": said})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--budget", type=float, default=60.0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found: dict[str, Any] = {"machine": hwprofiles.machine_summary(), "versions": versions()}
        found["model"] = Path(asked.model).name
        found["storage"] = storage(load(asked.model), Path(scratch), asked.budget)
        if importlib.util.find_spec("tensorrt_rtx") is not None:
            found["tensorrt_rtx"] = engines(Path(scratch))
    RESULT.write_text(json.dumps(rounded(found), indent=1) + "\n", encoding="utf8")
    print(json.dumps(rounded(found), indent=1))


if __name__ == "__main__":
    main()
