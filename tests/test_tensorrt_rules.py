"""The tensorrt target without TensorRT: what it refuses, what its graphs compute, and what it writes beside them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch.nn import functional as F

import compress
from compress import hwprofiles
from compress.__main__ import main
from compress.artifact import open_artifact, profile, verify
from compress.errors import InputError, UnsupportedError
from compress.export.onnx.files import DATA, GRAPH
from compress.export.tensorrt import lowering, record, shapes, target
from compress.export.tensorrt.probe import one_layer, random_layer
from compress.export.tensorrt.rules import EngineChoice, choose
from compress.export.tensorrt.runtime import readable
from compress.formats import parse_format
from compress.hwprofiles import Profile
from compress.inputs.datasets import calibrate
from compress.layer import ActSpec, Layer, LayerKind, LayerSpec
from compress.profiles import as_profile
from compress.quality.verification import read_inputs, verify_export
from compress.target import Refusal

ANSWERS = json.loads((Path(__file__).parent / "data" / "tensorrt_rtx.json").read_text())["built"]
CHIPS = {75: "nvidia-t4", 80: "nvidia-a100-80gb", 86: "nvidia-a10", 89: "nvidia-l4", 120: "nvidia-rtx-5090"}
NEWEST = hwprofiles.load("nvidia-rtx-5090")


def spec(weight: str, inputs: str = "", kind: str = "linear", columns: int = 128) -> LayerSpec:
    static = inputs.startswith("static ")
    act = ActSpec(parse_format(inputs.removeprefix("static ")), static=static) if inputs else None
    kernel = (columns, 3, 3) if kind == "conv" else None
    shape = (128, columns * 9 if kernel else columns)
    form = parse_format(weight) if weight else None
    return LayerSpec("block.layer", LayerKind(kind), shape, ("block.layer",), format=form, act=act, kernel=kernel)


def of_row(row: str) -> LayerSpec:
    kind, weight, inputs = row.split(" | ")
    return spec(weight.replace("float", "", 1) if weight == "float" else weight,
                "" if inputs == "float" else f"static {inputs}", kind)  # fmt: skip


@pytest.mark.parametrize("sm", CHIPS)
def test_the_rules_refuse_what_the_builder_refused_and_nothing_else(sm: int) -> None:
    machine = hwprofiles.load(CHIPS[sm])
    assert machine.gpu is not None and machine.gpu.sm == sm
    for row, built in ANSWERS.items():
        answer = target.plan_layer(of_row(row), machine)
        assert isinstance(answer, Refusal) == (sm not in built), (row, answer)


@pytest.mark.parametrize(
    ("one", "told"),
    [
        (spec("int4(group=32, asymmetric)"), "symmetric grids, without zero points"),
        (spec("int4(group=32, signed)"), "symmetric grids"),
        (spec("nf4(block=64)"), "no such type"),
        (spec("fp8_e5m2(channel)"), "takes fp8_e4m3"),
        (spec("fp8_e4m3(group=32)"), "one scale per output row"),
        (spec("int8(group=32)"), "use int8(channel)"),
        (spec("int4(group=48)", columns=96), "blocks of 16, 32, 64"),
        (spec("int4(group=64)", columns=96), "no whole number of blocks"),
        (spec("fp4_e2m1(channel)"), "scales per block"),
        (spec("int4(group=64)", kind="embedding", columns=96), "no whole number of blocks"),
        (spec("int4(group=32)", "static fp8_e4m3(tensor)"), "no product of INT4 weights and FP8 inputs"),
        (spec("int4(channel)", "fp8_e4m3(token)"), "no product of INT4 weights and FP8 inputs"),
        (spec("nvfp4", "nvfp4"), "act_quant(format=nvfp4, static=true)"),
        (spec("nvfp4", "static fp8_e4m3(tensor)"), "beside nvfp4 they are static nvfp4"),
        (spec("fp8_e4m3(channel)", "static nvfp4"), "static fp8_e4m3(tensor), symmetric"),
        (spec("nvfp4", "static nvfp4", kind="conv"), "a convolution with inputs in nvfp4"),
        (spec("int4(group=32)", kind="conv"), "matrix products only"),
        (spec("int8(channel)", "int8(token)"), "act_quant(format=int8(tensor), static=true)"),
        (spec("int8(channel)", "static int8(tensor, asymmetric)"), "static int8(tensor), symmetric"),
        (spec("fp8_e4m3(channel)", "static int8(tensor)"), "static fp8_e4m3(tensor), symmetric"),
        (spec("int4(group=32)", "static int8(tensor)"), "int8(channel)"),
        (spec("", "int8(tensor)"), "its weight is not quantized"),
    ],
)
def test_what_no_chip_takes_is_refused_with_what_to_do(one: LayerSpec, told: str) -> None:
    answer = target.plan_layer(one, NEWEST)
    assert isinstance(answer, Refusal) and told in answer.reason


def test_a_profile_of_another_machine_or_type_is_refused() -> None:
    cpu = as_profile("cpu-x86-avx2", "tensorrt")
    answer = target.plan_layer(spec("int8(channel)"), cpu)
    assert isinstance(answer, Refusal) and "nvidia-l4" in answer.reason
    runtime = NEWEST.runtime("tensorrt-rtx").model_copy(update={"float_dtype": "tf32"})
    other = NEWEST.model_copy(update={"runtimes": {"tensorrt-rtx": runtime}})
    answer = target.plan_layer(spec("int8(channel)"), other)
    assert isinstance(answer, Refusal) and "float16 or bfloat16 or float32" in answer.reason


def computed(one: LayerSpec, machine: Profile, values: np.ndarray[Any, Any], folder: Path) -> np.ndarray[Any, Any]:
    """What the graph of a random layer puts out in ONNX Runtime."""
    import onnxruntime

    choice = choose(one, machine)
    assert isinstance(choice, EngineChoice)
    document, _ = one_layer(one, choice, machine.runtime("tensorrt-rtx"))
    ir.save(document, folder / GRAPH)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(readable(folder), options, providers=["CPUExecutionProvider"])
    found: np.ndarray[Any, Any] = session.run(None, {"values": values})[0]
    return found


def in_memory(layer: Layer, values: torch.Tensor) -> torch.Tensor:
    """The layer's own decoder and input grid, float32."""
    if layer.kind is LayerKind.EMBEDDING:
        return layer.float_weight()[values]
    values = layer.act.round(values) if layer.act else values
    weight = layer.float_weight()
    if layer.kind is LayerKind.CONV:
        return F.conv2d(values, weight.reshape(weight.shape[0], -1, 3, 3), padding=1)
    return values @ weight.T


@pytest.mark.parametrize("row", [row for row, built in ANSWERS.items() if built])
@pytest.mark.parametrize("float_dtype", ["float16", "float32"])
def test_each_graph_computes_what_the_layer_does(row: str, float_dtype: str, tmp_path: Path) -> None:
    one = of_row(row)
    runtime = NEWEST.runtime("tensorrt-rtx").model_copy(update={"float_dtype": float_dtype})
    machine = NEWEST.model_copy(update={"runtimes": {"tensorrt-rtx": runtime}})
    shape = (2, 128, 8, 8) if one.kernel else (2, 128)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if one.kind is LayerKind.EMBEDDING:
        values = torch.arange(0, 128, 5)
    expected = in_memory(random_layer(one), values)
    found = torch.from_numpy(computed(one, machine, values.numpy(), tmp_path))
    # rounded inputs may land on the next point of their grid where float16 moved them across the middle
    tolerance = 2e-5 if float_dtype == "float32" else 2e-2 if one.act else 3e-3
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < tolerance


def test_scales_too_small_for_float16_are_kept_in_float32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = spec("fp8_e4m3(channel)")
    small = random_layer(one)
    assert not isinstance(small.weight, torch.Tensor)
    small.weight.tensors["scale"] *= 1e-6
    monkeypatch.setattr("compress.export.tensorrt.probe.random_layer", lambda spec: small)
    values = torch.randn((4, 128), generator=torch.Generator().manual_seed(1)) * 1000
    expected = in_memory(small, values)
    found = torch.from_numpy(computed(one, NEWEST, values.numpy(), tmp_path))
    assert float((found - expected).norm() / expected.norm()) < 3e-3
    assert float(small.weight.tensors["scale"].min()) < lowering.SMALLEST


def test_ranges_of_shapes_fit_each_other_at_every_end(llama: Path) -> None:
    found = shapes.ranges(compress.load(llama), NEWEST)
    assert set(found) == {"prefill", "decode"}
    for inputs in found.values():
        for place in range(3):
            rows, new = inputs["input_ids"][place]
            past = inputs["past_key_values.0.key"][place]
            assert past[0] == rows and inputs["attention_mask"][place] == [rows, past[2] + new]
            assert past[2] + new <= 128
    assert found["decode"]["input_ids"] == ([1, 1], [1, 1], [8, 1])
    assert found["prefill"]["input_ids"][2] == [8, 128]


@pytest.fixture(scope="module")
def checked(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for a chip that TensorRT-RTX does not build for."""
    made = compress.Pipeline.parse("rtn(format=int4(group=32))").run(compress.load(llama))
    out = tmp_path_factory.mktemp("checked") / "out"
    compress.export(made, profile="nvidia-h100-sxm", out=out)
    return out


def test_a_chip_that_is_not_built_for_gets_the_graph_and_the_command(checked: Path) -> None:
    folder = checked / "tensorrt"
    made = record.read(folder)
    assert (made.level, made.sm, made.engine) == ("checked", 90, "") and not (folder / "engines").exists()
    command = (folder / "build_command.txt").read_text()
    assert command.startswith("trtexec") and "--stronglyTyped" in command and str(folder) not in command
    assert "input_ids:1x1,attention_mask:1x129" not in command and "--profile=1" in command
    assert made.onnx_sha256 == record.digests(folder, (GRAPH, DATA)) and len(made.onnx_sha256) == 2
    found = verify(checked)
    assert found.agrees and found.level == "checked" and found.runtime == "TensorRT for SM 90"
    assert any("speed was not measured" in note for note in found.notes)


def test_a_graph_in_half_precision_keeps_its_cache_so_and_its_norms_in_float(checked: Path) -> None:
    graph = ir.load(checked / "tensorrt" / GRAPH).graph
    cache = [value for value in (*graph.inputs, *graph.outputs) if str(value.name).endswith((".key", ".value"))]
    assert len(cache) == 12 and all(value.dtype is ir.DataType.FLOAT16 for value in cache)
    assert graph.outputs[0].dtype is ir.DataType.FLOAT
    kinds = {node.op_type: {value.dtype for value in node.inputs if value is not None} for node in graph}
    assert kinds["MatMul"] == {ir.DataType.FLOAT16} and ir.DataType.FLOAT16 not in kinds["Softmax"]
    assert not [node for node in graph if node.domain]


def test_speed_is_refused_where_the_engine_does_not_run(checked: Path) -> None:
    with pytest.raises(UnsupportedError, match="NVIDIA H100 SXM: its speed can be measured there only"):
        profile(checked)
    with pytest.raises(UnsupportedError, match="cannot be timed on this machine"):
        open_artifact(checked).session().call(np.ones((1, 1), np.int64), 4)
    with pytest.raises(UnsupportedError, match="cannot be timed on this machine"):
        target.probe_command(checked / "tensorrt", 1, 4, 4)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / record.NAME).write_text('{"level": "ran"}')
    with pytest.raises(InputError, match=r"tensorrt\.json cannot be read.*Export the model again"):
        record.read(tmp_path)


def test_a_missing_extra_is_exit_code_4_before_anything_is_done(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    made = ["--passes", "rtn(format=int8(channel))", "-p", "nvidia-l4"]
    given = ["run", str(llama), *made, "-d", str(text_file), "-o", str(tmp_path / "out"), "--json"]
    assert main(given) == 4
    error = json.loads(capsys.readouterr().out)["error"]
    assert "pip install 'compress[tensorrt-rtx]'" in error["message"]
    assert not (tmp_path / "out").exists()
    assert main(["plan", str(llama), *made, "--json"]) == 0
    operators = {row["operator"] for row in json.loads(capsys.readouterr().out)["layers"]}
    assert operators == {"DQ INT8 MatMul", "Gather"}


def test_a_plan_refuses_before_any_build_and_names_the_layer(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", str(llama), "--passes", "rtn(format=fp8_e4m3(channel))", "-p", "nvidia-a10"]
    assert main(given) == 4
    told = " ".join(capsys.readouterr().out.split())
    assert "first model.layers.0.self_attn.q_proj" in told and "no weight_only kernel for 8 bit float" in told


def test_the_extra_is_asked_for_only_where_an_engine_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    target.require_tools(hwprofiles.load("nvidia-b200"))
    with pytest.raises(UnsupportedError, match="tensorrt-rtx"):
        target.require_tools(hwprofiles.load("nvidia-rtx-4090"))


def test_the_benchmark_asks_for_the_rows_of_the_table() -> None:
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "tensorrt_matrix.py"
    if not path.is_file():
        pytest.skip("the benchmarks are not here")
    found = importlib.util.spec_from_file_location("tensorrt_matrix", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    rows = [" | ".join((kind, weight or "float", inputs or "float")) for kind, weight, inputs in module.rows()]
    assert rows == list(ANSWERS)


def test_rounded_inputs_behind_a_relu_are_checked_as_the_graph_says(
    cnn: str, images_file: Path, tmp_path: Path
) -> None:
    model = compress.load(cnn)
    passes = "rtn(format=fp8_e4m3(channel)), act_quant(format=fp8_e4m3(tensor), static=true)"
    made = compress.Pipeline.parse(passes).run(model, calibrate(model, images_file, samples=32)).model
    machine = hwprofiles.load("nvidia-h100-sxm")
    lowered = target.write(made, machine, tmp_path)
    found = verify_export(made, tmp_path, machine, read_inputs(made, []), lowered.bounds)
    # onnxruntime itself would drop the Relu: 0.8
    assert found.agrees and found.max_relative_difference < 0.3
