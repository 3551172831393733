"""Products in bfloat16 in the tensorrt target: which chips have it, what the graphs compute, and that the builder takes
them. ONNX Runtime has no bfloat16 kernels on the CPU, so its copy of a graph holds the same numbers in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

import compress
from compress import hwprofiles
from compress.artifact import verify
from compress.export.onnx.files import GRAPH
from compress.export.tensorrt import builder, target
from compress.export.tensorrt.probe import one_layer, random_layer
from compress.export.tensorrt.rules import EngineChoice, choose
from compress.export.tensorrt.runtime import readable
from compress.formats import parse_format
from compress.hwprofiles import Profile
from compress.layer import ActSpec, LayerKind, LayerSpec
from compress.target import Refusal

FORMATS = [("float", ""), ("int8(channel)", ""), ("int4(group=32)", ""), ("fp8_e4m3(channel)", ""), ("nvfp4", "")]
STATIC = [("int8(channel)", "int8(tensor)"), ("fp8_e4m3(channel)", "fp8_e4m3(tensor)")]


def in_bfloat16(name: str) -> Profile:
    machine = hwprofiles.load(name)
    found = {key: each.model_copy(update={"float_dtype": "bfloat16"}) for key, each in machine.runtimes.items()}
    return machine.model_copy(update={"runtimes": found})


NEWEST = in_bfloat16("nvidia-rtx-5090")


def spec(weight: str, inputs: str) -> LayerSpec:
    form = None if weight == "float" else parse_format(weight)
    act = ActSpec(parse_format(inputs), static=True) if inputs else None
    return LayerSpec("layer", LayerKind.LINEAR, (64, 128), ("layer",), format=form, act=act)


def saved(one: LayerSpec, folder: Path) -> dict[str, Any]:
    """Write the graph of a random layer. Returns: the ranges of its input."""
    choice = choose(one, NEWEST)
    assert isinstance(choice, EngineChoice) and choice.compute == "bfloat16"
    document, ranges = one_layer(one, choice, NEWEST.runtime("tensorrt-rtx"))
    ir.save(document, folder / GRAPH)
    return ranges


@pytest.mark.parametrize(("weight", "inputs"), [*FORMATS, *STATIC])
def test_each_graph_computes_in_bfloat16_what_the_layer_does(weight: str, inputs: str, tmp_path: Path) -> None:
    import onnxruntime

    one = spec(weight, inputs)
    saved(one, tmp_path)
    product = next(node for node in ir.load(tmp_path / GRAPH).graph if node.op_type == "MatMul")
    assert product.outputs[0].dtype is ir.DataType.BFLOAT16
    values = torch.randn((4, 128), generator=torch.Generator().manual_seed(1))
    layer = random_layer(one)
    expected = (layer.act.round(values) if layer.act else values) @ layer.float_weight().T
    session = onnxruntime.InferenceSession(readable(tmp_path), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"values": values.numpy()})[0])
    error = float((found - expected).norm() / expected.norm())
    assert 1e-4 < error < (0.03 if inputs else 6e-3)  # that it is not float32's 1e-7 shows that it was rounded
    assert np.array_equal(found.bfloat16().float(), found)


@pytest.mark.parametrize("sm", [75, 80, 89])
def test_the_builder_takes_bfloat16_where_the_rules_do(sm: int, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra tensorrt-rtx)")
    ranges = saved(spec("int4(group=32)", ""), tmp_path)
    request = {"onnx": str(tmp_path / GRAPH), "sm": sm, "ranges": ranges, "engine": str(tmp_path / "engine")}
    machine = in_bfloat16({75: "nvidia-t4", 80: "nvidia-a100-80gb", 89: "nvidia-l4"}[sm])
    answer = target.plan_layer(spec("int8(channel)", ""), machine)
    assert isinstance(answer, Refusal) == bool(builder.compile_engine(request)["error"]) == (sm == 75)
    if isinstance(answer, Refusal):
        assert "SM 75 does not multiply; take float16" in answer.reason


def test_a_decoder_in_bfloat16_keeps_its_cache_so_and_agrees(llama: Path, tmp_path: Path) -> None:
    made = compress.Pipeline.parse("rtn(format=int4(group=32))").run(compress.load(llama))
    out = tmp_path / "out"
    compress.export(made, profile=in_bfloat16("nvidia-h100-sxm"), out=out)
    graph = ir.load(out / "tensorrt" / GRAPH).graph
    cache = [value for value in (*graph.inputs, *graph.outputs) if str(value.name).endswith((".key", ".value"))]
    assert len(cache) == 12 and all(value.dtype is ir.DataType.BFLOAT16 for value in cache)
    found = verify(out)
    assert found.agrees and 1e-4 < found.max_relative_difference < 0.2 and len(found.greedy_tokens) > 10
