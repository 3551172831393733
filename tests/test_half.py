"""Half precision for GPUs through ONNX Runtime: what becomes float16, what stays float32, and what both compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import load_file, save_file
from transformers import BertConfig

import compress
from compress import hwprofiles
from compress.errors import UnsupportedError
from compress.export.onnx import half, target
from compress.export.onnx.runtime import PORTABLE, SHARED, Session
from compress.hwprofiles import Profile
from compress.models.model import Model
from compress.profiles import as_profile
from compress.quality.verification import read_inputs, verify_export
from compress.target import Refusal

PROFILE = as_profile(hwprofiles.load("nvidia-l4"), "onnx")
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def computing_in(dtype: str) -> Profile:
    runtime = PROFILE.runtime("onnxruntime").model_copy(update={"float_dtype": dtype})
    return PROFILE.model_copy(update={"runtimes": {"onnxruntime": runtime}})


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    found = compress.Pipeline.parse("rtn(format=int4(group=32))").run(compress.load(llama)).model
    assert isinstance(found, Model)
    return found


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three blocks in 4 bits, with a tied head of float, for an L4. Do not write into it."""
    return target.write(model, PROFILE, tmp_path_factory.mktemp("half") / "onnx").folder


def typed(path: Path) -> tuple[onnx.ModelProto, dict[str, int]]:
    """A graph without its weights, and the type of each value that says one."""
    document = onnx.load(str(path), load_external_data=False)
    found = {each.name: each.data_type for each in document.graph.initializer}
    for value in (*document.graph.input, *document.graph.output, *document.graph.value_info):
        found[value.name] = value.type.tensor_type.elem_type
    return document, found


@pytest.mark.parametrize("name", [PORTABLE, SHARED])
def test_the_cache_is_half_and_ids_and_logits_are_as_they_were(folder: Path, name: str) -> None:
    document, _ = typed(folder / name)
    kinds = {each.name: each.type.tensor_type.elem_type for each in (*document.graph.input, *document.graph.output)}
    assert kinds.pop("logits") == FLOAT
    assert {kinds.pop("input_ids"), kinds.pop("attention_mask")} == {TensorProto.INT64}
    assert len(kinds) == 12 and set(kinds.values()) == {HALF}


@pytest.mark.parametrize("name", [PORTABLE, SHARED])
def test_products_and_attention_are_half_and_norms_and_softmax_are_not(folder: Path, name: str) -> None:
    document, kinds = typed(folder / name)
    floats = {FLOAT, HALF}
    read: dict[str, set[int]] = {}
    for node in document.graph.node:
        read.setdefault(node.op_type, set()).update({kinds[each] for each in node.input if each} & floats)
    for operator in ("MatMul", "MatMulNBits", "GroupQueryAttention", "Gather", "Sigmoid"):
        assert read.get(operator, {HALF}) == {HALF}, operator
    for operator in ("Pow", "ReduceMean", "Sqrt", "Div", "Softmax", "Cos", "Sin"):
        assert read.get(operator, {FLOAT}) == {FLOAT}, operator
    sums = [node for node in document.graph.node if node.op_type == "Add"]
    assert sums and all({kinds[each] for each in node.input} & floats <= {FLOAT} for node in sums)  # residuals too
    assert ("GroupQueryAttention" in read) == (name == SHARED)


def test_both_graphs_compute_what_the_model_in_memory_does(model: Model, folder: Path) -> None:
    found = verify_export(model, folder, PROFILE, tokens(4, 128), half.BOUNDS)
    assert found.agrees and found.level == "checked" and found.runtime == "onnxruntime CUDA"
    assert 0 < found.max_relative_difference < 0.02
    assert any(f"{SHARED} and {PORTABLE}" in note for note in found.notes)


def test_tokens_decoded_through_the_half_cache_are_those_of_the_whole_text(folder: Path) -> None:
    for name in (PORTABLE, SHARED):
        session = Session(folder, 1, graph=name)
        prompt = tokens(1, 12)[0].tolist()
        first = session.greedy(prompt, 6)
        whole = session.logits(np.asarray([[*prompt, *first[:-1]]], np.int64))[0]
        assert set(session.cache_types.values()) == {np.float16} and whole.dtype == np.float32
        assert first == whole[len(prompt) - 1 :].argmax(-1).tolist()


def test_weights_are_stored_once_in_half_also_from_a_float32_source(model: Model, folder: Path) -> None:
    document, _ = typed(folder / PORTABLE)
    apart = {
        each.name: each.data_type for each in document.graph.initializer if each.data_location == TensorProto.EXTERNAL
    }
    assert apart and set(apart.values()) <= {HALF, TensorProto.UINT8}
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size == pytest.approx(target.predict_bytes(model.structure.layers.values(), model, PROFILE), rel=0.1)
    second, _ = typed(folder / SHARED)
    stored = {each.name: {pair.key: pair.value for pair in each.external_data} for each in document.graph.initializer}
    for each in second.graph.initializer:
        if each.name in apart:
            there = {pair.key: pair.value for pair in each.external_data}
            assert (there["location"], there["offset"]) == (stored[each.name]["location"], stored[each.name]["offset"])


def test_a_profile_that_says_float32_is_exported_in_it_without_the_shared_cache(model: Model, tmp_path: Path) -> None:
    profile = computing_in("float32")
    target.write(model, profile, tmp_path)
    document, _ = typed(tmp_path / PORTABLE)
    assert {each.type.tensor_type.elem_type for each in document.graph.input} == {TensorProto.INT64, FLOAT}
    assert not (tmp_path / SHARED).exists()
    assert any("does not compute in float32" in note for note in Session(tmp_path, 1).notes)


def test_a_type_that_cannot_be_checked_here_is_refused(model: Model, tmp_path: Path) -> None:
    profile = computing_in("bfloat16")
    spec = next(iter(model.structure.layers.values()))
    answer = target.plan_layer(spec, profile)
    assert isinstance(answer, Refusal) and "bfloat16" in answer.reason and "float32 or float16" in answer.reason
    with pytest.raises(compress.errors.UsageError, match=r"cannot be exported for profile nvidia-l4: .*bfloat16"):
        target.write(model, profile, tmp_path)


def test_a_weight_beyond_the_range_of_half_precision_is_named(copy: Path, tmp_path: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 7e4
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 70000, .*float32"):
        target.write(compress.load(copy), PROFILE, tmp_path)


def test_an_encoder_agrees_and_its_hidden_states_stay_float32(save_random: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = BertConfig(**sizes, num_hidden_layers=1, max_position_embeddings=64)
    encoder = compress.load(save_random("half-bert", config, "AutoModel"))
    lowered = target.write(encoder, PROFILE, tmp_path)
    document, kinds = typed(tmp_path / PORTABLE)
    assert {kinds[node.input[1]] for node in document.graph.node if node.op_type == "MatMul"} == {HALF}
    assert {kinds[node.input[0]] for node in document.graph.node if node.op_type == "LayerNormalization"} == {FLOAT}
    assert document.graph.output[0].type.tensor_type.elem_type == FLOAT
    found = verify_export(encoder, tmp_path, PROFILE, tokens(8, 64), lowered.bounds)
    assert found.agrees and found.max_relative_difference < 0.02


def test_a_convolutional_network_agrees(cnn: str, tmp_path: Path) -> None:
    network = compress.load(cnn)
    lowered = target.write(network, PROFILE, tmp_path)
    document, kinds = typed(tmp_path / PORTABLE)
    assert {kinds[node.input[1]] for node in document.graph.node if node.op_type == "Conv"} == {HALF}
    found = verify_export(network, tmp_path, PROFILE, read_inputs(network, []), lowered.bounds)
    assert found.agrees and found.max_relative_difference < 0.02


def test_a_given_graph_of_unknown_types_stays_in_float32_and_says_why(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("images", FLOAT, [1, 4])
    out = onnx.helper.make_tensor_value_info("logits", FLOAT, [1, 4])
    nodes = [onnx.helper.make_node("Relu", ["images"], ["inner"], name="first")]
    nodes.append(onnx.helper.make_node("Relu", ["inner"], ["logits"], name="second"))
    document = ir.from_proto(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [value], [out])))
    half.halve(document, ())
    assert document.metadata_props == {"compress.float32": "the type of what Relu first puts out is not known"}
    assert [node.op_type for node in document.graph] == ["Relu", "Relu"]
