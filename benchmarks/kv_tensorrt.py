"""Caches that drop tokens as slots of a TensorRT-RTX engine: what the builder takes, by scorer, store and chip.

    python benchmarks/kv_tensorrt.py [--blocks 1]

Needs the extra tensorrt-rtx, no GPU; nothing runs. A Llama of random weights (4 heads of 16 on 2 key-value heads),
products in float16, 64 slots, prompts 16 tokens at a time: one engine with a profile of shapes for prompts and one for
decoding. Taken or refused, the answers are the builder's own. `float64 becomes`: what its parser makes of that type;
`most of TopK`: what a layer that chooses so many is answered. Writes results/kv_tensorrt.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from digits import rounded
from heads import random_heads
from transformers import LlamaConfig, LlamaForCausalLM

import compress
from compress import hwprofiles
from compress.export.onnx.files import GRAPH
from compress.export.onnx.graph import GraphBuilder
from compress.export.tensorrt import builder, shapes, slotted, target
from compress.kv.spec import KvSpec
from compress.manifest import versions
from compress.models.cache_tensors import write_tensors
from compress.models.model import Model

RESULT = Path(__file__).parent / "results" / "kv_tensorrt.json"
PROFILE = hwprofiles.load("nvidia-l4")
INT8 = {"keys": "int8(token)", "values": "int8(token)"}
SCORERS: tuple[dict[str, Any], ...] = (
    {"scorer": "position"},
    {"scorer": "key_norm"},
    {"scorer": "h2o"},
    {"scorer": "h2o", "decay": 0.99, "by_age": True},
    {"scorer": "tova"},
    {"scorer": "locret", "head_width": 64},
    {"scorer": "kvzap"},
)
EVERYWHERE, ENDS = ("h2o", "locret"), (75, 120)
"""Scorers that are built for all chips; the others for an old and a new one."""
STORES: tuple[dict[str, str], ...] = ({}, INT8)


def model_of(folder: Path, blocks: int) -> Model:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=256, num_hidden_layers=blocks, max_position_embeddings=20_000, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return compress.load(folder)


def answers(model: Model, graph: bytes, spec: KvSpec, folder: Path, sms: tuple[int, ...]) -> dict[str, Any]:
    """By SM the engine's bytes, or the builder's reason."""
    made = replace(model, kv=(spec,) * len(model.attentions))
    write_tensors(model.path, random_heads(made))
    target.write_baseline(made, PROFILE, folder, graph)
    ranges, found = shapes.as_json(shapes.ranges(made, PROFILE)), {}
    for sm in sms:
        engine = folder / "engine"
        request = {"onnx": str(folder / GRAPH), "sm": sm, "ranges": ranges, "engine": str(engine)}
        answer = builder.compile_engine(request)
        found[str(sm)] = answer["error"] or engine.stat().st_size
    return found


def made_of_float64(folder: Path) -> list[str]:
    """The types that a network has where its graph says float64."""
    trt = builder.load_module()
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]))
    wide = ir.node("Cast", [value], {"to": ir.DataType.DOUBLE.value}, name="wide")
    out = ir.node("Mul", [wide.outputs[0], wide.outputs[0]], name="product")
    out.outputs[0].name, out.outputs[0].type = "y", ir.TensorType(ir.DataType.DOUBLE)
    graph = ir.Graph([value], out.outputs, nodes=[wide, out], opset_imports={"": 21}, name="graph")
    ir.save(ir.Model(graph, ir_version=10), folder / "wide.onnx")
    logger = builder.make_logger(trt, [])
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(folder / "wide.onnx")):
        return [parser.get_error(place).desc() for place in range(parser.num_errors)]
    layers = [network.get_layer(place) for place in range(network.num_layers)]
    return sorted({each.get_output(0).dtype.name for each in layers})


def choosing(count: int, folder: Path) -> str:
    """The builder's reason against a layer that chooses so many of 5000; empty where it builds it."""
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 5000]))
    graph = ir.Graph([value], [], nodes=[], opset_imports={"": 21}, name="graph")
    place = GraphBuilder(graph)
    found = place.node("TopK", [value, place.constant([count])], {"axis": -1}, outputs=2)
    graph.extend(place.nodes)
    found.shape = ir.Shape([1, count])
    graph.outputs.append(found)
    ir.save(ir.Model(graph, ir_version=10), folder / "top.onnx")
    request = {"onnx": str(folder / "top.onnx"), "sm": 89, "ranges": {}, "engine": str(folder / "engine")}
    return str(builder.compile_engine(request)["error"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=1)
    given = parser.parse_args()
    small = {"budget": 64, "sinks": 4, "recent": 16, "chunk": 16}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        model = model_of(scratch / "model", given.blocks)
        graph = target.capture(model, PROFILE)
        specs = [KvSpec(**small, **each, **store) for each in SCORERS for store in STORES]
        for place, spec in enumerate(specs):
            sms = builder.CAPABILITIES if spec.scorer in EVERYWHERE and not spec.by_age else ENDS
            begun = time.process_time()
            found = answers(model, graph, spec, scratch / str(place), sms)
            rows.append({"cache": spec.as_data(), "engine bytes or refusal by SM": found})
            print(json.dumps(rounded({**rows[-1], "cpu_s": time.process_time() - begun})), flush=True)
        wide = made_of_float64(scratch)
        most = {str(count): choosing(count, scratch) for count in (slotted.MOST_CHUNK, slotted.MOST_CHUNK + 1)}
    told = {"machine": hwprofiles.machine_summary(), "load_average": os.getloadavg()[0], "versions": versions()}
    told |= {"builder": f"TensorRT-RTX {builder.load_module().__version__}", "profile": PROFILE.id}
    told |= {"blocks": given.blocks, "float64 becomes": wide, "most of TopK": most, "rows": rows}
    RESULT.write_text(json.dumps(rounded(told), indent=1) + "\n")


if __name__ == "__main__":
    main()
