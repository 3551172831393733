"""Engines that TensorRT-RTX really builds, without a GPU: every format on every chip, and three models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from transformers import BertConfig, MixtralConfig

import compress
from compress import hwprofiles
from compress.__main__ import main
from compress.artifact import open_artifact
from compress.errors import UnsupportedError
from compress.export.onnx.files import GRAPH
from compress.export.tensorrt import builder, record, target
from compress.export.tensorrt.probe import choice_of, one_layer
from compress.export.tensorrt.rules import EngineChoice
from compress.formats import parse_format
from compress.inputs.datasets import calibrate
from compress.layer import ActSpec, LayerKind, LayerSpec
from compress.report import load as load_report

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra tensorrt-rtx)")

ANSWERS = json.loads((Path(__file__).parent / "data" / "tensorrt_rtx.json").read_text())["built"]
NEWEST = hwprofiles.load("nvidia-rtx-5090")


def spec(row: str, width: int) -> LayerSpec:
    kind, weight, inputs = ("" if each == "float" else each for each in row.split(" | "))
    return LayerSpec(
        "layer",
        LayerKind(kind),
        (width, width * 9 if kind == "conv" else width),
        ("layer",),
        format=parse_format(weight) if weight else None,
        act=ActSpec(parse_format(inputs), static=True) if inputs else None,
        kernel=(width, 3, 3) if kind == "conv" else None,
    )


def compiled(one: LayerSpec, sm: int, folder: Path) -> dict[str, Any]:
    """The builder's answer to a layer, lowered as for the newest chip; `engine` holds what was built."""
    document, ranges = one_layer(one, choice_of(one, NEWEST), NEWEST.runtime(target.RUNTIME))
    ir.save(document, folder / GRAPH)
    engine = folder / "engine"
    engine.unlink(missing_ok=True)
    request = {"onnx": str(folder / GRAPH), "sm": sm, "ranges": ranges, "engine": str(engine)}
    return builder.compile_engine(request)


@pytest.mark.parametrize("sm", builder.CAPABILITIES)
def test_the_builder_answers_as_the_table_says(sm: int, tmp_path: Path) -> None:
    found = {row: not compiled(spec(row, 128), sm, tmp_path)["error"] for row in ANSWERS}
    assert found == {row: sm in built for row, built in ANSWERS.items()}


@pytest.mark.parametrize("row", ["linear | int8(channel) | int8(tensor)", "linear | int4(group=128) | float"])
def test_an_engine_grows_by_the_bits_of_its_weights(row: str, tmp_path: Path) -> None:
    sizes, stored = [], []
    for width in (256, 768):
        one = spec(row, width)
        assert not compiled(one, 89, tmp_path)["error"]
        choice = target.plan_layer(one, NEWEST)
        assert isinstance(choice, EngineChoice)
        sizes.append((tmp_path / "engine").stat().st_size)
        stored.append(choice.stored_bytes)
    assert sizes[1] - sizes[0] == pytest.approx(stored[1] - stored[0], rel=0.02)


def test_a_graph_that_the_parser_does_not_know_is_an_error_with_its_reason(tmp_path: Path) -> None:
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 4]))
    node = ir.node("NoSuchOperator", [value], name="strange")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([value], [node.outputs[0]], nodes=[node], opset_imports={"": 21}, name="graph")
    ir.save(ir.Model(graph, ir_version=10), tmp_path / GRAPH)
    with pytest.raises(UnsupportedError, match=r"does not build model\.onnx for SM 89: .*NoSuchOperator"):
        builder.build(tmp_path / GRAPH, 89, {}, tmp_path / "engine", tmp_path / "build.log")
    assert "NoSuchOperator" in (tmp_path / "build.log").read_text()


def test_a_run_for_a_gpu_that_is_not_here_ends_with_an_engine_and_an_honest_report(
    llama: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    made = ["--passes", "rtn(format=int4(group=32))", "-p", "nvidia-l4", "-d", str(text_file), "-o", str(out)]
    options = ["--samples", "4", "--quality-samples", "4", "--length", "64", "-q", "--json"]
    assert main(["run", str(llama), *made, *options]) == 0
    report = load_report(out / "report.json")
    assert json.loads(capsys.readouterr().out)["speed"] is None and report.speed is None
    assert report.verification is not None and report.verification.level == "built" and report.verification.agrees
    assert "speed not measured" in report.verdict and "not run there" in report.verdict
    assert report.artifact_quality is not None and "the engine's graph" in report.artifact_quality.where
    found = record.read(out / "tensorrt")
    engine = out / "tensorrt" / found.engine
    assert found.engine.startswith("engines/tensorrt-rtx-") and found.engine.endswith("-sm89/engine")
    assert report.artifact_bytes == found.engine_bytes == engine.stat().st_size
    assert "not self-consistent" not in engine.with_name("build.log").read_text()
    assert report.plan is not None
    assert report.plan.predicted_artifact_bytes == pytest.approx(report.artifact_bytes, rel=0.2)
    assert main(["verify", str(out)]) == 0
    assert "built in TensorRT-RTX" in capsys.readouterr().out
    assert main(["generate", str(out), "--prompt", "the"]) == 4


def test_a_convolutional_network_becomes_an_engine_with_rounded_inputs(
    cnn: str, images_file: Path, tmp_path: Path
) -> None:
    model = compress.load(cnn)
    calibration = calibrate(model, images_file, samples=32)
    passes = "rtn(format=int8(channel)), act_quant(format=int8(tensor), static=true)"
    made = compress.Pipeline.parse(passes).run(model, calibration)
    done = compress.export(made, profile="nvidia-t4", out=tmp_path / "out")
    found = record.read(done.deployable)
    assert (found.level, found.sm) == ("built", 75) and list(found.ranges) == ["whole"]
    operators = {node.op_type for node in ir.load(done.deployable / GRAPH).graph}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= operators


def test_a_mixture_of_experts_in_nvfp4_with_a_quantized_embedding_becomes_an_engine(
    save_random: Any, tmp_path: Path
) -> None:
    sizes = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "max_position_embeddings": 64}
    model = compress.load(save_random("engine-mixtral", MixtralConfig(**sizes, **heads)))
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(torch.randint(0, 2048, (8, 32), generator=torch.Generator().manual_seed(0)).tolist()))
    passes = (
        "rtn(format=nvfp4), rtn(format=int8(channel), targets=[kind:embedding]), "
        "act_quant(format=nvfp4, static=true, targets=[*self_attn*])"
    )
    made = compress.Pipeline.parse(passes).run(model, calibrate(model, ids, samples=8, length=32)).model
    lowered = target.write(made, NEWEST, tmp_path / "out")
    assert lowered.operators == {"DQ FP4 MatMul": 4, "DQ INT8 Gather": 1, "MatMul": 1, "Q/DQ FP4 MatMul": 4}
    found = record.read(tmp_path / "out")
    assert found.level == "built" and found.engine_bytes == pytest.approx(
        target.predict_deployed_bytes(made.structure.layers.values(), made, NEWEST), rel=0.4
    )
    notes = {str(target.plan_layer(each, NEWEST).note) for each in made.structure.layers.values()}
    assert any("every expert computes every token" in note for note in notes)


def test_an_encoder_in_fp8_becomes_an_engine_and_its_store_goes_to_another_chip(
    save_random: Any, tmp_path: Path
) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = BertConfig(**sizes, num_hidden_layers=1, max_position_embeddings=64)
    model = compress.load(save_random("tiny-bert", config, "AutoModel"))
    made = compress.Pipeline.parse("rtn(format=fp8_e4m3(channel))").run(model)
    first = compress.export(made, profile="nvidia-l4", out=tmp_path / "l4")
    assert record.read(first.deployable).level == "built"
    second = compress.export(tmp_path / "l4", profile="nvidia-rtx-5090", out=tmp_path / "5090")
    assert record.read(second.deployable).sm == 120 and open_artifact(tmp_path / "5090").profile.id == "nvidia-rtx-5090"
