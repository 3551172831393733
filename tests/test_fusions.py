"""What the onnx target rewrites for ONNX Runtime's fusions, and that the graph computes what it did."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers

import compress
from compress import hwprofiles
from compress.export.onnx import fusions, target
from compress.export.onnx.runtime import Session
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.quality.verification import agreement
from compress.records import Bounds

PROFILE = hwprofiles.load("cpu-x86-avx512-vnni")
EXACT = Bounds()


def another_provider() -> hwprofiles.Profile:
    """The profile of a runtime for which nothing is rewritten."""
    runtime = PROFILE.runtime("onnxruntime").model_copy(update={"provider": "CUDAExecutionProvider"})
    return PROFILE.model_copy(update={"runtimes": {"onnxruntime": runtime}})


def optimized(folder: Path) -> Counter[str]:
    """Operators as ONNX Runtime runs them, with those inside branches."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return stored(folder / "optimized.onnx")


def stored(path: Path) -> Counter[str]:
    """Operators of a file, with those inside branches."""

    def walk(graph: onnx.GraphProto) -> Counter[str]:
        found = Counter(node.op_type for node in graph.node)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    found += walk(attribute.g)
        return found

    return walk(onnx.load(str(path), load_external_data=False).graph)


@pytest.fixture(scope="module")
def model(save_random: Callable[..., Path]) -> Model:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.BertConfig(**sizes, num_attention_heads=2)
    return compress.load(save_random("bert-fused", config, "AutoModel"))


@pytest.fixture(scope="module")
def captured(model: Model) -> bytes:
    return target.capture(model, PROFILE)


@pytest.fixture(scope="module")
def encoder(model: Model, captured: bytes, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    folder = tmp_path_factory.mktemp("encoder")
    target.write(model, PROFILE, folder, captured)
    return model, folder


@pytest.fixture(scope="module")
def plain(model: Model, captured: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder's graph as it is where nothing is rewritten."""
    folder = tmp_path_factory.mktemp("plain")
    target.write(model, another_provider(), folder, captured)
    return folder


def hidden(folder: Path, mask: list[list[int]]) -> np.ndarray:
    """The first output for fixed ids."""
    masks = np.asarray(mask, np.int64)
    ids = np.random.default_rng(0).integers(0, 64, masks.shape)
    found: np.ndarray = Session(folder, 1).session.run(None, {"input_ids": ids, "attention_mask": masks})[0]
    return found


def test_an_encoder_attends_in_one_operator_with_its_biases_inside(encoder: tuple[Model, Path]) -> None:
    model, folder = encoder
    onnx.checker.check_model(str(folder / "model.onnx"))
    found = optimized(folder)
    assert found["If"] == 1 and found["MultiHeadAttention"] == 2 and found["Softmax"] == found["Transpose"] == 0
    assert found["MatMul"] == 6 and found["Concat"] <= 2  # those of shapes: the biases were joined on loading
    assert agreement(Session(folder, 1), model, torch.randint(0, 64, (8, 64)), EXACT).agrees


@pytest.mark.parametrize(
    "mask",
    [[[1] * 9] * 3, [[1] * 9, [1] * 5 + [0] * 4, [0] * 2 + [1] * 7], [[1] * 8 + [0]] * 3],
    ids=["none", "both sides", "all rows"],
)
def test_padding_is_seen_by_nobody_whichever_branch_a_batch_takes(
    encoder: tuple[Model, Path], plain: Path, mask: list[list[int]]
) -> None:
    folder = encoder[1]
    assert stored(plain / "model.onnx")["MultiHeadAttention"] == 0
    seen = np.asarray(mask, bool)
    found, expected = hidden(folder, mask)[seen], hidden(plain, mask)[seen]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    if not seen.all():
        everything = hidden(folder, np.ones_like(np.asarray(mask)).tolist())[seen]
        assert np.abs(found - everything).max() > 1e-3 * np.abs(expected).max()


def test_a_window_goes_into_the_operator_as_a_bias(
    encoder: tuple[Model, Path], captured: bytes, tmp_path: Path
) -> None:
    """Set at the placeholder: encoders with windows rotate their queries, which this lowering leaves alone."""
    document = onnx.load_from_string(captured)
    for node in document.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Attention" and attribute.name in ("before", "after"):
                attribute.i = 2
    graph, mask = document.SerializeToString(), [[1] * 9, [1] * 6 + [0] * 3]
    target.write(encoder[0], PROFILE, tmp_path / "fused", graph)
    target.write(encoder[0], another_provider(), tmp_path / "plain", graph)
    assert optimized(tmp_path / "fused")["MultiHeadAttention"] == 1
    seen = np.asarray(mask, bool)
    found, expected = hidden(tmp_path / "fused", mask)[seen], hidden(tmp_path / "plain", mask)[seen]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert np.abs(found - hidden(encoder[1], mask)[seen]).max() > 1e-3 * np.abs(expected).max()


GELUS = {
    "erf divided": "a = Mul (half, y) b = Div (y, root) c = Erf (b) d = Add (c, one) z = Mul (a, d)",
    "erf multiplied": "b = Mul (inverse, y) c = Erf (b) d = Add (one, c) a = Mul (y, half) z = Mul (d, a)",
    "tanh": """a = Mul (y, half) b = Pow (y, three) c = Mul (b, small) d = Add (y, c) e = Mul (d, scale) f = Tanh (e)
               g = Add (f, one) z = Mul (a, g)""",
    "operator": "z = Gelu (y)",
}
CONSTANTS = {"half": 0.5, "root": 2**0.5, "inverse": 0.5**0.5, "one": 1.0, "three": 3.0, "small": 0.044715}
CONSTANTS |= {"scale": 0.7978845608}


def formula(text: str, **changes: float) -> onnx.ModelProto:
    """y = x + bias and then a formula of it, z being the output."""
    values = ", ".join(f"float {name} = {{{value}}}" for name, value in (CONSTANTS | changes).items())
    bias = "float[8] bias = {0.1, -0.2, 0.3, 1, -1, 0.5, 0, 2}"
    head = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
    signature = "g (float[n, 3, 8] x) => (float[n, 3, 8] z)"
    return onnx.parser.parse_model(f"{head} {signature} <{bias}, {values}> {{ y = Add (x, bias) {text} }}")


def rewritten(document: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Operators once fused and loaded; the folder's graph computes what the document does."""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(document))
    fusions.fuse(model, PROFILE.runtime("onnxruntime"))
    ir.save(model, folder / "model.onnx")
    values = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    plain = onnxruntime.SessionOptions()
    plain.log_severity_level, plain.graph_optimization_level = 3, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected = onnxruntime.InferenceSession(document.SerializeToString(), plain).run(None, {"x": values})[0]
    found = onnxruntime.InferenceSession(str(folder / "model.onnx")).run(None, {"x": values})[0]
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()
    return optimized(folder)


@pytest.mark.parametrize("text", GELUS)
def test_every_way_to_write_gelu_becomes_the_operator_whose_bias_is_added_apart(tmp_path: Path, text: str) -> None:
    assert rewritten(formula(GELUS[text]), tmp_path) == {"Sum": 1, "Gelu": 1}


def test_other_functions_and_constants_are_not_taken_for_gelu(tmp_path: Path) -> None:
    assert rewritten(formula("a = Sigmoid (y) z = Mul (y, a)"), tmp_path) == {"Add": 1, "QuickGelu": 1}
    for text, change in (("tanh", {"small": 0.045}), ("erf multiplied", {"half": 0.49}), ("tanh", {"three": 2.0})):
        assert rewritten(formula(GELUS[text], **change), tmp_path)["Gelu"] == 0


RMS = "b = Pow (y, two) c = ReduceMean <keepdims = 1> (b, last) d = Add (c, small) e = Sqrt (d) f = Reciprocal (e) "


def normed(text: str, axis: int = -1) -> onnx.ModelProto:
    """y = x + bias and then what is told, with the axis of means."""
    document = formula(text, two=2.0)
    document.graph.initializer.append(onnx.numpy_helper.from_array(np.array([axis]), "last"))
    return document


@pytest.mark.parametrize("end", ["g = Mul (y, f) z = Mul (g, bias)", "g = Mul (f, y) z = Mul (bias, g)"])
def test_an_rms_norm_becomes_one_operator(tmp_path: Path, end: str) -> None:
    assert rewritten(normed(RMS + end), tmp_path) == {"Add": 1, "SimplifiedLayerNormalization": 1}


def test_a_norm_without_gains_gets_ones_and_other_roots_are_left(tmp_path: Path) -> None:
    one = {"Add": 1, "SimplifiedLayerNormalization": 1}
    assert rewritten(normed(RMS + "z = Mul (y, f)"), tmp_path) == one
    assert rewritten(normed(RMS + "g = Mul (y, f) z = Tanh (g)"), tmp_path) == {**one, "Tanh": 1}
    assert rewritten(normed(RMS + "g = Mul (y, f) z = Mul (g, y)"), tmp_path) == {**one, "Mul": 1}
    for text, axis in ((RMS + "z = Mul (x, f)", -1), (RMS + "z = Mul (y, f)", 1)):
        assert rewritten(normed(text, axis), tmp_path)["Reciprocal"] == 1


def test_gains_that_are_cast_and_shifted_are_gains_too(save_random: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 16}
    config = transformers.Gemma2Config(
        **sizes, num_attention_heads=2, num_key_value_heads=2, query_pre_attn_scalar=16, dtype="float16"
    )
    model = compress.load(save_random("gemma2-norms", config))
    target.write(model, PROFILE, tmp_path)
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    found = optimized(tmp_path)
    assert found["SimplifiedLayerNormalization"] == 5 and found["Pow"] == found["Reciprocal"] == 0
    assert agreement(Session(tmp_path, 1), model, torch.randint(0, 64, (8, 64)), EXACT).agrees


def test_an_int8_encoder_is_rewritten_as_its_baseline_is(
    encoder: tuple[Model, Path], captured: bytes, tmp_path: Path
) -> None:
    model, folder = encoder
    made = Pipeline.parse("rtn(bits=8, group_size=32)").run(model, None).model
    lowered = target.write(made, PROFILE, tmp_path, captured)
    for operator in ("If", "Gelu", "Sum", "LayerNormalization", "MultiHeadAttention"):
        assert stored(tmp_path / "model.onnx")[operator] == stored(folder / "model.onnx")[operator]
    assert agreement(Session(tmp_path, 1), made, torch.randint(0, 64, (8, 64)), lowered.bounds).agrees
