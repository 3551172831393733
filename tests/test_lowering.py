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
from compress.errors import CompressError, InputError, UnsupportedError, UsageError
from compress.export.onnx import fusions, target
from compress.export.onnx.lowering import Choice, choose
from compress.export.onnx.runtime import Session
from compress.formats import parse_format
from compress.layer import ActSpec, LayerKind, LayerSpec
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.quality.evaluate import stream_logits
from compress.quality.verification import agreement, verification_ids, verify_export
from compress.records import Bounds
from compress.target import Refusal
from helpers.stored import stored_bytes

PROFILE = hwprofiles.load("cpu-x86-avx512-vnni")
RUNTIME = PROFILE.runtime("onnxruntime")
EMBED = "targets=[kind:embedding, kind:head]"


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., Path]) -> Model:
    """Biases, and widths that blocks of 32 do not always divide."""
    return compress.load(make_llama("lowering", num_hidden_layers=2, attention_bias=True, intermediate_size=80))


@pytest.fixture(scope="module")
def graph(model: Model) -> bytes:
    return target.capture(model, PROFILE)


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


def test_stored_bytes_of_the_plan_are_those_of_the_file(
    model: Model, graph: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusions, "REWRITES", ())  # joined products would not say whose tensors they hold
    for passes in (
        "rtn(format=int4(group=32))",
        "rtn(format=int3(channel, asymmetric))",
        "rtn(format=int8(channel)), act_quant",
    ):
        made = Pipeline.parse(passes).run(model).model
        folder = tmp_path / str(abs(hash(passes)))
        target.write(made, PROFILE, folder, graph)
        stored = stored_bytes(folder / "model.onnx")
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
    assert config["type"] == "llama" and config["decoder"]["filename"] == "model_gqa.onnx"
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


def test_a_refusal_is_a_wrong_setting_where_another_would_do_and_unsupported_where_not(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Pipeline.parse("rtn(format=int4(group=48))").run(model).model
    with pytest.raises(UsageError, match=r"Layer .* cannot be exported for profile cpu-x86-avx512-vnni: .*48"):
        target.write(made, PROFILE, tmp_path)
    formats = [entry for entry in RUNTIME.formats if 4 not in entry.bits]
    without = PROFILE.model_copy(update={"runtimes": {"onnxruntime": RUNTIME.model_copy(update={"formats": formats})}})
    made = Pipeline.parse("rtn(format=int4(group=32))").run(model).model
    with pytest.raises(UnsupportedError, match="no weight_only kernel for 4 bit"):
        target.write(made, without, tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_malformed_side_file_is_an_input_error(make_llama: Callable[..., Path], tmp_path: Path, content: str) -> None:
    source = make_llama("malformed", num_hidden_layers=1)
    (source / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=r"generation_config\.json"):
        target.write(compress.load(source), PROFILE, tmp_path)


def test_a_format_without_a_fast_kernel_is_named(model: Model) -> None:
    found = choose(spec("int3(group=32)"), RUNTIME)
    assert isinstance(found, Choice)
    assert (found.kernel, found.stored_bits) == ("works", 4) and "4-bit" in found.note
    assert replace(found, note="").operator == "MatMulNBits"


def test_fewer_than_512_positions_are_not_enough(model: Model, graph: bytes, tmp_path: Path) -> None:
    target.write(model, PROFILE, tmp_path, graph)
    with pytest.raises(UsageError, match="448 positions are too few"):
        agreement(Session(tmp_path, 1), model, windows(7), Bounds())


def test_windows_that_hold_too_few_tokens_are_filled_up_with_drawn_ones(model: Model) -> None:
    few = windows(2, 48)
    found = verification_ids(model, few)
    assert found.shape == (11, 48) and torch.equal(found[:2], few)
    assert torch.equal(verification_ids(model, few), found) and torch.equal(verification_ids(model, found), found)
    assert int(found.max()) < model.vocabulary
    assert verification_ids(model, windows(20, 200)).shape == (4, 128)  # the model has 128 positions


def test_a_model_with_few_positions_is_verified_within_them(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    short = compress.load(make_llama("short", num_hidden_layers=1, max_position_embeddings=32))
    lowered = target.write(short, PROFILE, tmp_path)
    found = verify_export(short, tmp_path, PROFILE, windows(2, 32), lowered.bounds)
    assert found.agrees and found.positions == 512
    assert len(found.greedy_tokens) == 16


def test_other_top_tokens_of_the_exact_graph_are_found_though_all_differences_are_small(
    model: Model, graph: bytes, tmp_path: Path
) -> None:
    target.write(model, PROFILE, tmp_path, graph)
    session = Session(tmp_path, 1)

    class Swapped:
        """The two largest logits pulled together until they change places, where the margin lets it."""

        name = "swapped"

        def logits(self, ids: np.ndarray) -> np.ndarray:
            values = session.logits(ids).copy()
            order = np.argsort(values, -1)[..., -2:]
            pair = np.take_along_axis(values, order, -1)
            reach = 0.1 * float(np.abs(values).max())
            middle = pair.mean(-1, keepdims=True)
            near = (pair[..., 1:] - pair[..., :1]) < 1.8 * reach
            np.put_along_axis(values, order, np.where(near, middle + [[[0.01, -0.01]]] * np.ones_like(pair), pair), -1)
            return values

    bounds = Bounds(shipped=0.1, exact=0.1)
    found = agreement(session, model, windows(), bounds, Swapped())
    assert found.exact_relative_difference is not None and found.exact_relative_difference < 0.1
    assert found.exact_top1_agreement is not None and found.exact_top1_agreement < 0.999
    assert not found.agrees
    assert agreement(session, model, windows(), bounds, session).agrees


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
