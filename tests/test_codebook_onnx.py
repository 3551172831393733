"""Codebooks in standard operators of ONNX: what graphs compute, what ONNX Runtime keeps of them, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import yaml

import compress
from compress import hwprofiles
from compress.__main__ import main
from compress.export import find
from compress.export.onnx import codebook, target
from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.lowering import Choice, Source, choose
from compress.formats import parse_format
from compress.formats.base import QuantTensor
from compress.formats.codebook import Codebook
from compress.hwprofiles import files as profile_files
from compress.layer import ActSpec, Layer, LayerKind, LayerSpec
from compress.pipeline import Pipeline
from compress.quality.verification import verify_export
from compress.target import Refusal
from helpers.layouts import layer_of

PROFILE = hwprofiles.load("cpu-x86-avx512-vnni")
RUNTIME = PROFILE.runtime("onnxruntime")
# rows that no vector divides; codes of 4, 8 and 16 bits; tables and, of too many entries or along the outputs, none
FORMS = (
    *("codebook(vector=6, entries=8, stages=1)", "codebook(vector=2, entries=8, stages=3, groups=7)"),
    *("codebook(vector=3, entries=8, stages=2, groups=2, scale=column)", "codebook(vector=1, entries=2, scale=none)"),
    *("codebook(vector=2, entries=256, stages=2)", "codebook(vector=7, entries=1024, stages=1, groups=3)"),
    *("codebook(vector=2, entries=32, stages=2, scale=column)", "codebook(vector=3, entries=16, stages=2, out)"),
    *("codebook(vector=4, entries=64, stages=1, out, groups=3)", "codebook(vector=5, entries=512, stages=3, out)"),
    *(
        "codebook(vector=5, entries=2, stages=2, out, groups=2, scale=row)",
        "codebook(vector=13, entries=4, stages=1, out, scale=none)",
    ),
    *("codebook(vector=3, entries=8, outliers=0.1, outlier_vector=3, bias=row)", "codebook(vector=2, permuted)"),
    "codebook(vector=4, entries=64, stages=1, out, groups=2, outliers=0.03, bias=column, permuted)",
)


def form_of(text: str) -> Codebook:
    form = parse_format(text)
    assert isinstance(form, Codebook)
    return form


def spec_of(layer: Layer, **more: object) -> LayerSpec:
    assert isinstance(layer.weight, QuantTensor)
    found = LayerSpec("m", layer.kind, layer.weight.shape, ("m",), format=layer.weight.format)
    return replace(found, **more)  # type: ignore[arg-type]


def graph_of(layer: Layer, spec: LayerSpec) -> ir.Model:
    """x (batch, length, in) → y of one layer."""
    choice = choose(spec, RUNTIME)
    assert isinstance(choice, Choice) and choice.lowering == codebook.__name__
    x = ir.Value(name="x", shape=ir.Shape(["batch", "length", spec.shape[1]]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], name="layer", opset_imports={"": RUNTIME.opset})
    builder = GraphBuilder(graph, "m")
    y = codebook.linear(builder, Source(spec, choice, lambda: layer), x)
    graph.extend(builder.nodes)
    y.shape = ir.Shape(["batch", "length", spec.shape[0]])
    graph.outputs.append(y)
    return ir.Model(graph, ir_version=RUNTIME.ir_version)


def session_of(model: ir.Model, optimized: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("text", FORMS)
def test_a_few_tokens_and_many_are_multiplied_by_the_weight_that_the_codes_stand_for(text: str) -> None:
    layer = layer_of(form_of(text))
    layer = replace(layer, bias=torch.randn(layer.weight.shape[0], generator=torch.Generator().manual_seed(3)))
    session = session_of(graph_of(layer, spec_of(layer, has_bias=True)))
    for shape in ((1, 1), (2, 4), (3, 3), (1, 40)):
        x = torch.randn(*shape, layer.weight.shape[1], generator=torch.Generator().manual_seed(1))
        assert layer.bias is not None
        expected = x @ layer.float_weight().T + layer.bias
        found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("text", ["codebook(vector=2, entries=8)", "codebook(vector=3, entries=16, out)"])
def test_no_tokens_make_no_outputs_as_with_a_float_weight(text: str) -> None:
    layer = layer_of(form_of(text))
    found = session_of(graph_of(layer, spec_of(layer))).run(None, {"x": np.zeros((0, 3, 42), np.float32)})[0]
    assert found.shape == (0, 3, 13)


def kept_in(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """Stored tensors, those of graphs inside too."""
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [*graph.initializer, *(each for found in inner for each in kept_in(found))]


@pytest.mark.parametrize("text", ["codebook(vector=4, entries=16, stages=2)", "codebook(vector=4, entries=256, out)"])
def test_the_runtime_keeps_codes_and_never_a_dense_weight_whatever_it_optimizes(text: str, tmp_path: Path) -> None:
    rows, columns = 64, 96
    layer = layer_of(form_of(text), rows, columns)
    session_of(graph_of(layer, spec_of(layer)), tmp_path / "kept.onnx")
    kept = kept_in(onnx.load(tmp_path / "kept.onnx").graph)
    sizes = {each.name: int(np.prod(each.dims)) for each in kept}
    assert isinstance(layer.weight, QuantTensor)
    codes = next(each for each in kept if each.name == "m.weight.codes")
    assert codes.data_type == onnx.TensorProto.UINT8
    assert sizes.pop("m.weight.codes") == layer.weight.tensors["codes"].numel()
    assert max(sizes.values()) < rows * columns // 2  # codebooks in both of their layouts
    assert not any(each.op_type == "Constant" for each in onnx.load(tmp_path / "kept.onnx").graph.node)


def test_without_a_scan_the_same_codes_become_a_dense_weight(tmp_path: Path) -> None:
    """The test above can fail: what depends on constants alone is computed when the graph is loaded."""
    x = ir.Value(name="x", shape=ir.Shape(["batch", 96]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], name="plain", opset_imports={"": RUNTIME.opset})
    builder = GraphBuilder(graph)
    stored = builder.initializer("codes", lambda: torch.ones(24, 64, dtype=torch.uint8), torch.uint8, (24, 64))
    codes = builder.node("Cast", [stored], {"to": ir.DataType.INT32.value}, dtype=ir.DataType.INT32)
    entries = builder.node("Gather", [builder.constant(np.ones((16, 4)), np.float32), codes])
    weight = builder.node("Reshape", [entries, builder.constant([96, 64])])
    graph.outputs.append(builder.node("MatMul", [x, weight]))
    graph.extend(builder.nodes)
    session_of(ir.Model(graph, ir_version=RUNTIME.ir_version), tmp_path / "kept.onnx")
    assert any(int(np.prod(each.dims)) == 64 * 96 for each in kept_in(onnx.load(tmp_path / "kept.onnx").graph))


def test_a_large_layer_is_decoded_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its codes are those that the file is said to hold, rows of the last block that are filled up among them."""
    monkeypatch.setattr(codebook, "BLOCK", 500)
    for text in ("codebook(vector=2, entries=8, stages=2)", "codebook(vector=3, entries=32, stages=1, out, groups=2)"):
        layer = layer_of(form_of(text), 53, 42)
        spec = spec_of(layer)
        model = graph_of(layer, spec)
        held = {name: value.const_value for name, value in model.graph.initializers.items()}
        assert held["m.weight.codes"] is not None and held["m.weight.codes"].shape[0] > 3
        weights = sum(each.nbytes for name, each in held.items() if name.startswith("m.weight.") and each is not None)
        choice = choose(spec, RUNTIME)
        assert isinstance(choice, Choice) and choice.stored_bytes == weights
        session = session_of(model)
        for tokens in (1, 20):
            x = torch.randn(1, tokens, 42, generator=torch.Generator().manual_seed(1))
            found = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
            torch.testing.assert_close(found, x @ layer.float_weight().T, rtol=1e-5, atol=1e-4)


def test_layers_that_hold_a_codebook_in_common_store_it_once() -> None:
    layer = layer_of(form_of("codebook(vector=4, entries=16, share=2)"), 16, 32)
    graph = ir.Graph([], [], nodes=[], name="two", opset_imports={"": RUNTIME.opset})
    builder = GraphBuilder(graph)
    for name in ("a", "b"):
        one = replace(layer, name=name)
        spec = spec_of(one, name=name)
        choice = choose(spec, RUNTIME)
        assert isinstance(choice, Choice)
        x = ir.Value(name=f"x{name}", shape=ir.Shape([1, 32]), type=ir.TensorType(ir.DataType.FLOAT))
        graph.inputs.append(x)
        codebook.linear(builder.at(name), Source(spec, choice, lambda one=one: one), x)
    names = list(graph.initializers)
    assert {"a.weight.codes", "b.weight.codes"} <= set(names) and sum(
        each.startswith("codebook.") for each in names
    ) == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kind": LayerKind.EMBEDDING}, "rows of an embedding are not looked up in codes; use int8 or int4"),
        ({"kind": LayerKind.CONV, "kernel": (8, 2, 4)}, "only integer grids are stored"),
        ({"act": ActSpec(parse_format("int8(tensor, asymmetric)"))}, "DynamicQuantizeMatMul takes int8"),
    ],
)
def test_what_is_no_product_of_float_inputs_is_refused(changes: dict[str, object], told: str) -> None:
    found = choose(spec_of(layer_of(form_of("codebook(vector=2, entries=16)")), **changes), RUNTIME)
    assert isinstance(found, Refusal) and told in found.reason


def test_graphs_in_float16_and_for_gpus_are_refused_and_told_what_runs_there() -> None:
    spec = spec_of(layer_of(form_of("codebook(vector=2, entries=16)")))
    found = choose(spec, RUNTIME.model_copy(update={"float_dtype": "float16"}))
    assert isinstance(found, Refusal) and "float32 only" in found.reason and "int4" in found.reason
    gpu = choose(spec, hwprofiles.load("nvidia-l4").runtime("onnxruntime"))
    assert isinstance(gpu, Refusal) and not gpu.usage and "4 bit" in gpu.reason


def test_tensorrt_refuses_codes_and_names_what_it_takes() -> None:
    profile = hwprofiles.load("nvidia-l4")
    found = find("tensorrt").plan_layer(spec_of(layer_of(form_of("codebook(vector=2, entries=16)"))), profile)
    assert isinstance(found, Refusal) and "int4(group=128)" in found.reason and "fp8_e4m3(channel)" in found.reason


@pytest.mark.parametrize(
    "text",
    [
        *("codebook(vector=4, entries=16, stages=2)", "codebook(vector=4, entries=256, stages=1, out)"),
        "codebook(vector=8, entries=128, stages=1, groups=2, scale=none)",
    ],
)
def test_a_model_computes_what_it_does_in_memory(text: str, one_block: Path, tmp_path: Path) -> None:
    made = Pipeline.parse(f"rtn(format={text})").run(compress.load(one_block)).model
    lowered = target.write(made, PROFILE, tmp_path / "onnx")
    ids = torch.randint(3, made.vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    found = verify_export(made, lowered.folder, PROFILE, ids, lowered.bounds)
    assert found.agrees and found.exact_relative_difference is not None and found.exact_relative_difference < 1e-5
    assert found.max_relative_difference == found.exact_relative_difference


def test_a_run_of_vptq_writes_what_verify_and_generate_take_with_the_operators_named(
    one_block: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = {**profile_files.contents(profile_files.FOLDER / "cpu-x86-avx2.yaml"), "grid": {"decode": [[1, 16]]}}
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump({**quick, "id": "quick"}))
    out, passes = tmp_path / "out", "vptq(format=codebook(vector=4, entries=16, stages=2), share=block, refit=0)"
    given = ["run", one_block, "--passes", passes, "-d", text_file, "-o", out, "-p", tmp_path / "quick.yaml"]
    options = ["-t", "onnx", "--samples", 4, "--quality-samples", 4, "--length", 64, "--budget", 0.1, "--json"]
    assert main([str(word) for word in (*given, *options)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verification"]["level"] == "ran" and report["verification"]["agrees"]
    assert report["operators"] == {"Gather": 1, "GatherElements+ReduceSum": 7}
    text = compress.load(out, threads=1).generate("the river", max_new_tokens=4).text
    assert main(["generate", str(out), "--prompt", "the river", "-n", "4"]) == 0
    assert capsys.readouterr().out.strip() == f"the river{text}".strip()
