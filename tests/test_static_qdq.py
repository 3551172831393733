"""Static 8-bit inputs in ONNX Runtime: what it fuses, and that the graph computes what the model in memory does."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import compress
from compress import hwprofiles
from compress.engine.image_stream import image_logits
from compress.export.onnx import target
from compress.export.onnx.lowering import Choice, choose
from compress.export.onnx.runtime import Session
from compress.formats import parse_format
from compress.inputs.datasets import Calibration, calibrate
from compress.layer import ActSpec, LayerKind, LayerSpec
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.quality.verification import agreement
from compress.target import Refusal
from helpers.stored import stored_bytes

PROFILE = hwprofiles.load("cpu-x86-avx512-vnni")
RUNTIME = PROFILE.runtime("onnxruntime")
PASSES = "rtn(format=int8(channel)), act_quant(static=true)"


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Model:
    return compress.load(make_llama("static", num_hidden_layers=2, attention_bias=True, intermediate_size=80))


@pytest.fixture(scope="module")
def calibration(model: Model, text_file: Path) -> Calibration:
    return calibrate(model, text_file, samples=8, length=64)


@pytest.fixture(scope="module")
def graph(model: Model) -> bytes:
    return target.capture(model, PROFILE)


def fused(folder: Path, scratch: Path) -> Counter[str]:
    """Operators of the graph as ONNX Runtime runs it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(scratch / "optimized.onnx")
    onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    document = onnx.load(str(scratch / "optimized.onnx"), load_external_data=False)
    return Counter(node.op_type for node in document.graph.node)


@pytest.mark.parametrize(
    "passes",
    [
        PASSES,
        "rtn(format=int8(tensor)), act_quant(static=true, format=int8(tensor))",
        "rtn(format=int7(channel)), act_quant(static=true, observer=minmax)",
        "gptq(format=int8(channel)), act_quant(static=true), bias_correct",
    ],
)
def test_the_graph_computes_what_the_model_in_memory_does(
    model: Model, calibration: Calibration, graph: bytes, tmp_path: Path, passes: str
) -> None:
    made = Pipeline.parse(passes).run(model, calibration).model
    lowered = target.write(made, PROFILE, tmp_path, graph)
    assert lowered.operators == {"Gather": 1, "MatMulIntegerToFloat": 14}
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    found = agreement(Session(tmp_path, 1), made, calibration.windows.ids, lowered.bounds)
    assert found.agrees and found.max_relative_difference < 0.1


def in_standard_operators() -> hwprofiles.Profile:
    """The profile with a kernel for static inputs that is no operator of the runtime's own."""
    formats = [
        entry.model_copy(update={"kernel": "MatMul"}) if entry.use == "weight_and_static_activation" else entry
        for entry in RUNTIME.formats
    ]
    runtime = RUNTIME.model_copy(update={"formats": tuple(formats)})
    return PROFILE.model_copy(update={"runtimes": {"onnxruntime": runtime}})


@pytest.mark.parametrize("profile", [PROFILE, in_standard_operators()], ids=["own", "standard"])
def test_every_layer_becomes_one_integer_product_and_shared_inputs_are_rounded_once(
    model: Model, calibration: Calibration, graph: bytes, tmp_path: Path, profile: hwprofiles.Profile
) -> None:
    made = Pipeline.parse(PASSES).run(model, calibration).model
    lowered = target.write(made, profile, tmp_path, graph)
    assert lowered.operators["MatMulIntegerToFloat" if profile is PROFILE else "QDQ+MatMul"] == 14
    found = fused(tmp_path, tmp_path)
    assert found["MatMulIntegerToFloat"] == 14 and found["DequantizeLinear"] == 0
    assert found["QuantizeLinear"] == 8  # q, k, v share one; gate, up share one
    assert agreement(Session(tmp_path, 1), made, calibration.windows.ids, lowered.bounds).agrees


@pytest.mark.parametrize("profile", [PROFILE, in_standard_operators()], ids=["own", "standard"])
def test_stored_bytes_of_the_plan_are_those_of_the_file(
    model: Model, calibration: Calibration, graph: bytes, tmp_path: Path, profile: hwprofiles.Profile
) -> None:
    made = Pipeline.parse(PASSES).run(model, calibration).model
    target.write(made, profile, tmp_path, graph)
    stored = stored_bytes(tmp_path / "model.onnx")
    for name, spec in made.structure.layers.items():
        choice = choose(spec, profile.runtime("onnxruntime"))
        assert isinstance(choice, Choice) and stored[name] == choice.stored_bytes, name


RESIDUAL = """
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)
        self.first = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.second = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))

    def forward(self, x):
        x = F.relu(self.stem(x))
        for first, second in zip(self.first, self.second):
            x = F.relu(second(F.relu(first(x))) + x)
        return self.head(x.mean((2, 3)))


def net():
    torch.manual_seed(0)
    return Net()


def sample_inputs(batch=2):
    return (torch.randn(batch, 3, 12, 12),)
"""


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("code") / "residual.py"
    path.write_text(RESIDUAL)
    return f"{path}:net"


def test_a_residual_network_runs_in_integers_from_the_first_convolution_to_the_pooling(
    residual: str, images_file: Path, tmp_path: Path
) -> None:
    model = compress.load(residual)
    made = Pipeline.parse(PASSES).run(model, calibrate(model, images_file, samples=64)).model
    lowered = target.write(made, PROFILE, tmp_path)
    assert lowered.operators == {"MatMulIntegerToFloat": 1, "QDQ+Conv": 5}
    found = fused(tmp_path, tmp_path)
    assert found["QLinearConv"] == 5 and found["QLinearAdd"] == 1 and found["MatMulIntegerToFloat"] == 1
    assert found["Conv"] == found["FusedConv"] == found["Gemm"] == 0


@pytest.mark.parametrize("form", ["int8(tensor, asymmetric)", "int8(tensor)"])
def test_convolutions_compute_what_the_model_in_memory_does(
    cnn: str, images_file: Path, tmp_path: Path, form: str
) -> None:
    model = compress.load(cnn)
    text = f"rtn(format=int8(channel)), act_quant(static=true, format={form})"
    data = calibrate(model, images_file, samples=64)
    made = Pipeline.parse(text).run(model, data).model
    target.write(made, PROFILE, tmp_path)
    document = onnx.load(str(tmp_path / "model.onnx"), load_external_data=False)
    made_by = {name: node for node in document.graph.node for name in node.output}
    read_by: dict[str, list[str]] = {}
    for node in document.graph.node:
        for name in node.input:
            read_by.setdefault(name, []).append(node.op_type)
    convolutions = [node for node in document.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 5
    for node in convolutions:
        assert [made_by[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
        assert set(read_by[node.output[0]]) <= {"QuantizeLinear", "Relu"}
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for images, expected in zip(data.batches(), image_logits(made, data.batches()), strict=True):
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        # outputs of convolutions are rounded too, which the model in memory does not do
        assert np.abs(logits - expected.numpy()).max() < 0.12 * float(expected.abs().max())
    assert fused(tmp_path, tmp_path)["QLinearConv"] == 5


def spec(form: str, act: str, kind: LayerKind = LayerKind.LINEAR) -> LayerSpec:
    grid = ActSpec(parse_format(act), static=True)
    return LayerSpec("layer", kind, (32, 64), ("layer",), format=parse_format(form), act=grid)


@pytest.mark.parametrize(
    ("one", "told"),
    [
        (spec("int8(group=32)", "int8(tensor)"), "int8(channel)"),
        (spec("int8(channel, asymmetric)", "int8(tensor)"), "symmetric"),
        (spec("int8(channel)", "int4(tensor)"), "int8(tensor)"),
        (spec("int8(channel)", "fp8_e4m3(tensor)"), "int8(tensor)"),
        (replace(spec("int8(channel)", "int8(tensor)"), format=None), "its weight is not quantized"),
    ],
)
def test_what_has_no_integer_kernel_is_refused_with_what_has(one: LayerSpec, told: str) -> None:
    answer = choose(one, RUNTIME)
    assert isinstance(answer, Refusal) and told in answer.reason


def test_seven_bit_weights_are_the_fast_ones_where_sums_of_16_bits_saturate() -> None:
    runtime = hwprofiles.load("cpu-x86-avx2").runtime("onnxruntime")
    seven, eight = (choose(spec(f"int{bits}(channel)", "int8(tensor)"), runtime) for bits in (7, 8))
    assert isinstance(seven, Choice) and isinstance(eight, Choice)
    assert (seven.kernel, eight.kernel) == ("fast", "works") and "7-bit" in eight.note


def test_a_norm_is_not_fused_with_the_addition_before_it(save_random: Callable[..., Path], tmp_path: Path) -> None:
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = compress.load(
        save_random("bert-norms", transformers.BertConfig(**sizes, num_attention_heads=2), "AutoModel")
    )
    target.write(model, PROFILE, tmp_path)
    found = fused(tmp_path, tmp_path)
    assert found["LayerNormalization"] == 5 and found["SkipLayerNormalization"] == 0
    assert agreement(Session(tmp_path, 1), model, torch.randint(0, 64, (8, 64)), target_bounds(model)).agrees


def target_bounds(model: Model) -> compress.records.Bounds:
    choices = [choose(one, RUNTIME) for one in model.structure.layers.values()]
    return next(choice.bounds for choice in choices if isinstance(choice, Choice))
