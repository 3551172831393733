"""The onnx target: each lowering against the in-memory layer, refusals, and files that other tools read."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import compress
from compress import hwprofiles
from compress.errors import CompressError
from compress.evaluate import agreement, stream_logits
from compress.export.onnx import target
from compress.export.onnx.lowering import Choice, Refusal, choose
from compress.export.onnx.runtime import Session
from compress.formats import parse_format
from compress.layer import ActSpec, LayerKind, LayerSpec
from compress.model import Model
from compress.pipeline import Pipeline
from compress.records import Bounds

PROFILE = hwprofiles.load("cpu-x86-avx512-vnni")
RUNTIME = PROFILE.runtime("onnxruntime")
EMBED = "targets=[kind:embedding, kind:head]"


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Model:
    """Biases, and widths that blocks of 32 do not always divide."""
    return compress.load(make_llama("lowering", num_hidden_layers=2, attention_bias=True, intermediate_size=80))


@pytest.fixture(scope="module")
def graph(model: Model) -> bytes:
    return target.capture(model, RUNTIME.opset)


def windows(count: int = 8, length: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("passes", "operators"),
    [
        ("", {"Gather": 1, "MatMul": 14}),
        ("rtn(format=int4(group=32))", {"Gather": 1, "MatMulNBits": 14}),
        ("rtn(format=int4(group=16, asymmetric))", {"Gather": 1, "MatMulNBits": 14}),
        ("rtn(format=int4(group=32, signed))", {"Gather": 1, "MatMulNBits": 14}),
        ("rtn(format=int8(channel))", {"Gather": 1, "MatMulNBits": 14}),
        ("rtn(format=int3(group=32))", {"Gather": 1, "MatMulNBits": 14}),
        ("rtn(format=int6(group=64, asymmetric))", {"Gather": 1, "MatMulNBits": 14}),
        ("rtn(format=int2(group=32))", {"Gather": 1, "MatMulNBits": 14}),
        (f"rtn(format=int8(group=32), {EMBED})", {"GatherBlockQuantized+MatMulNBits": 1, "MatMul": 14}),
        (f"rtn(format=int4(group=32, asymmetric), {EMBED})", {"GatherBlockQuantized+MatMulNBits": 1, "MatMul": 14}),
        (f"rtn(format=int5(group=64), {EMBED})", {"GatherBlockQuantized+MatMulNBits": 1, "MatMul": 14}),
        ("rtn(format=int8(channel)), act_quant", {"Gather": 1, "DynamicQuantizeMatMul": 14}),
        ("rtn(format=int7(channel)), act_quant", {"Gather": 1, "DynamicQuantizeMatMul": 14}),
        (
            "rtn(format=int8(tensor)), act_quant(ignore=[*.q_proj])",
            {"Gather": 1, "DynamicQuantizeMatMul": 12, "MatMulNBits": 2},
        ),
    ],
)
def test_the_graph_computes_what_the_model_in_memory_does(
    model: Model, graph: bytes, tmp_path: Path, passes: str, operators: dict[str, int]
) -> None:
    made = Pipeline.parse(passes).run(model).model if passes else model
    lowered = target.write(made, PROFILE, tmp_path, graph)
    assert lowered.operators == operators
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    session, exact_kernels = Session(tmp_path, 1), Session(tmp_path, 1, exact=True)
    found = agreement(session, made, windows(), lowered.bounds, exact_kernels)
    assert found.agrees, found
    assert found.positions >= 512
    assert found.exact_relative_difference is not None
    assert "act_quant" in passes or found.exact_relative_difference < 1e-4
    exact = not passes or all(choose(spec, RUNTIME).bounds.shipped == 0 for spec in made.structure.layers.values())
    assert not exact or found.max_relative_difference < 1e-3


def test_stored_bytes_of_the_plan_are_those_of_the_file(model: Model, graph: bytes, tmp_path: Path) -> None:
    for passes in (
        "rtn(format=int4(group=32))",
        "rtn(format=int3(channel, asymmetric))",
        "rtn(format=int8(channel)), act_quant",
    ):
        made = Pipeline.parse(passes).run(model).model
        folder = tmp_path / str(abs(hash(passes)))
        target.write(made, PROFILE, folder, graph)
        document = onnx.load(str(folder / "model.onnx"), load_external_data=False)
        stored: dict[str, int] = {}
        for tensor in document.graph.initializer:
            layer = tensor.name.rsplit(".weight", 1)[0].rsplit(".bias", 1)[0]
            itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            stored[layer] = stored.get(layer, 0) + int(np.prod(tensor.dims)) * itemsize
        for name, spec in made.structure.layers.items():
            choice = choose(spec, RUNTIME)
            assert isinstance(choice, Choice)
            assert stored[name] == choice.stored_bytes, (passes, name)


def test_a_tied_embedding_and_head_are_stored_once(model: Model, graph: bytes, tmp_path: Path) -> None:
    made = Pipeline.parse(f"rtn(format=int8(group=32), {EMBED})").run(model).model
    target.write(made, PROFILE, tmp_path, graph)
    document = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False)
    assert sum("embed_tokens" in tensor.name or "lm_head" in tensor.name for tensor in document.graph.initializer) == 2
    assert {node.op_type for node in document.graph.node} >= {"GatherBlockQuantized", "MatMulNBits"}


def test_half_precision_weights_are_stored_as_they_are_and_computed_in_float32(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    for dtype in ("float16", "bfloat16"):
        half = compress.load(make_llama(f"half-{dtype}", dtype=dtype, num_hidden_layers=1))
        target.write(half, PROFILE, tmp_path / dtype)
        session = Session(tmp_path / dtype, 1)
        expected = next(stream_logits(half, windows(1)))
        found = session.logits(windows(1).numpy())[0]
        assert found.dtype == np.float32
        assert np.abs(found - expected.numpy()).max() < 1e-3 * np.abs(expected.numpy()).max()
        assert (tmp_path / dtype / "model.onnx_data").stat().st_size < 1.2 * half.source_bytes


def test_the_same_model_gives_the_same_graph_bytes(model: Model, tmp_path: Path) -> None:
    for turn in ("a", "b"):
        target.write(model, PROFILE, tmp_path / turn)
    for name in ("model.onnx", "model.onnx_data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_inputs_and_outputs_have_the_names_that_other_runtimes_look_for(
    model: Model, graph: bytes, tmp_path: Path
) -> None:
    target.write(model, PROFILE, tmp_path, graph)
    session = Session(tmp_path, 1).session
    past = [f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")]
    present = [f"present.{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert [item.name for item in session.get_inputs()] == ["input_ids", "attention_mask", *past]
    assert [item.name for item in session.get_outputs()] == ["logits", *present]
    config = json.loads((tmp_path / "genai_config.json").read_text())["model"]
    assert config["type"] == "llama" and config["decoder"]["filename"] == "model.onnx"
    assert (config["decoder"]["head_size"], config["decoder"]["num_key_value_heads"]) == (16, 2)


def spec(form: str | None, act: str | None = None, kind: LayerKind = LayerKind.LINEAR, columns: int = 64) -> LayerSpec:
    return LayerSpec(
        "layer",
        kind,
        (32, columns),
        ("layer",),
        format=parse_format(form) if form else None,
        act=ActSpec(parse_format(act)) if act else None,
    )


@pytest.mark.parametrize(
    ("one", "told"),
    [
        (spec("int4(group=48)"), "16, 32, 64, 128, 256"),
        (spec("int2(group=16)"), "32, 64, 128"),
        (spec("int8(group=32)", "int8(tensor, asymmetric)"), "int8(channel)"),
        (spec("int8(channel, asymmetric)", "int8(tensor, asymmetric)"), "int8(channel)"),
        (spec("int8(channel)", "int8(token)"), "int8(tensor, asymmetric) only"),
        (spec(None, "int8(tensor, asymmetric)"), "its weight is not quantized"),
        (spec("int4(group=32)", kind=LayerKind.EMBEDDING, columns=80), "16"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_what_could(one: LayerSpec, told: str) -> None:
    answer = choose(one, RUNTIME)
    assert isinstance(answer, Refusal)
    assert told in answer.reason


def test_a_refusal_at_export_names_the_layer_and_the_profile(model: Model, tmp_path: Path) -> None:
    made = Pipeline.parse("rtn(format=int4(group=48))").run(model).model
    with pytest.raises(CompressError, match=r"model\.layers\.0\.self_attn\.q_proj.*cpu-x86-avx512-vnni"):
        target.write(made, PROFILE, tmp_path)


def test_a_format_without_a_fast_kernel_is_named(model: Model) -> None:
    found = choose(spec("int3(group=32)"), RUNTIME)
    assert isinstance(found, Choice)
    assert (found.kernel, found.stored_bits) == ("works", 4) and "4-bit" in found.note
    assert replace(found, note="").operator == "MatMulNBits"


def test_a_runner_that_disagrees_or_puts_out_nan_is_found(model: Model, graph: bytes, tmp_path: Path) -> None:
    target.write(model, PROFILE, tmp_path, graph)
    session = Session(tmp_path, 1)

    class Wrong:
        name = "wrong"

        def __init__(self, change: Callable[[np.ndarray], np.ndarray]) -> None:
            self.change = change

        def logits(self, ids: np.ndarray) -> np.ndarray:
            return self.change(session.logits(ids).copy())

    def with_nan(values: np.ndarray) -> np.ndarray:
        values[0, 5, 3] = np.nan
        return values

    assert agreement(session, model, windows(), Bounds()).agrees
    for change in (lambda values: values * 1.01, lambda values: np.roll(values, 1, -1), with_nan):
        assert not agreement(Wrong(change), model, windows(), Bounds()).agrees
        assert not agreement(session, model, windows(), Bounds(), Wrong(change)).agrees
