"""Rotary embeddings: rotated by GroupQueryAttention or by one operator, by the angles that the model computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers

import compress
from compress import hwprofiles
from compress.export.onnx import angles, rotary, target
from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.runtime import PORTABLE, SHARED, Session
from compress.models.model import Model
from helpers.models import ROTARY_SIZES, SPECIAL

PROFILE = hwprofiles.load("cpu-x86-avx512-vnni")
POSITIONS = 64
GROUPED = {**ROTARY_SIZES, **SPECIAL, "max_position_embeddings": POSITIONS}
SIZES = {key: value for key, value in GROUPED.items() if key not in ("num_key_value_heads", "head_dim")}
BASE = {"rope_theta": 1e4, "original_max_position_embeddings": 32}
LLAMA3 = {**BASE, "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TWO_KINDS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16}
QUARTER = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.25}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("LlamaConfig", GROUPED),
    "linear": ("LlamaConfig", {**GROUPED, "rope_parameters": {**BASE, "rope_type": "linear", "factor": 2.0}}),
    "llama3": ("LlamaConfig", {**GROUPED, "rope_parameters": LLAMA3}),
    "yarn": ("LlamaConfig", {**GROUPED, "rope_parameters": {**BASE, "rope_type": "yarn", "factor": 2.0}}),
    "norms before": ("Qwen3Config", GROUPED),
    "two kinds of layers": ("Gemma3TextConfig", {**GROUPED, **TWO_KINDS}),
    "a quarter of a head": ("GPTNeoXConfig", {**SIZES, "hidden_size": 128, "rope_parameters": QUARTER}),
}


def operators(folder: Path, name: str) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(folder / name), load_external_data=False).graph.node)


def ids(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 96, (rows, length))


def apart(found: Any, expected: Any) -> float:
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max())


@pytest.fixture(scope="module", params=list(MODELS))
def exported(request: pytest.FixtureRequest, save_random: Callable[..., Path]) -> tuple[Path, Any]:
    """The folder of a model whose GroupQueryAttention rotates, and transformers' own model."""
    config, settings = MODELS[request.param]
    source = save_random(request.param.replace(" ", "-"), getattr(transformers, config)(**settings))
    target.write(compress.load(source), PROFILE, source / "onnx")
    return source / "onnx", transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


def test_both_graphs_rotate_as_transformers_does_up_to_the_last_position(exported: tuple[Path, Any]) -> None:
    folder, reference = exported
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids(2, POSITIONS))).logits
    for name in (PORTABLE, SHARED):
        session = Session(folder, 1, graph=name)
        assert apart(session.logits(ids(2, POSITIONS)), expected) < 1e-4
        cache = session.cache(2, POSITIONS)
        for start, stop in ((0, 40), *((place, place + 1) for place in range(40, POSITIONS))):
            found = cache.run(ids(2, POSITIONS)[:, start:stop], np.ones((2, stop), np.int64))
        assert apart(found[:, -1], expected[:, -1]) < 1e-4


def test_one_operator_rotates_in_each_graph(exported: tuple[Path, Any]) -> None:
    folder, _ = exported
    document = onnx.load(str(folder / SHARED), load_external_data=False).graph
    attentions = [node for node in document.node if node.op_type == "GroupQueryAttention"]
    assert all({item.name: item.i for item in node.attribute}["do_rotary"] == 1 for node in attentions)
    assert not operators(folder, SHARED).keys() & {"Cos", "Sin", "Neg", "Slice", "RotaryEmbedding", "CumSum"}
    found = operators(folder, PORTABLE)
    assert found["RotaryEmbedding"] == 2 * len(attentions) and found["Neg"] <= 1  # where positions are cut


def test_layers_share_their_tables_which_follow_the_weights_in_the_file(exported: tuple[Path, Any]) -> None:
    folder, reference = exported
    document = onnx.load(str(folder / SHARED), load_external_data=False).graph
    kept = {item.name: item for item in document.initializer if item.name.startswith(angles.NAME)}
    kinds = 2 if reference.config.model_type == "gemma3_text" else 1
    assert len(kept) == 2 * kinds and all(item.data_location == onnx.TensorProto.EXTERNAL for item in kept.values())
    ends = [sum(int(entry.value) for entry in item.external_data if entry.key != "location") for item in kept.values()]
    assert max(ends) == (folder / target.DATA).stat().st_size
    first = {value.name for value in ir.load(folder / PORTABLE).graph.initializers.values()}
    assert not first & set(kept)


def test_angles_are_computed_where_tables_would_be_too_long(
    save_random: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_random("long", transformers.LlamaConfig(**GROUPED))
    model = compress.load(source)
    graph = target.capture(model, PROFILE)
    assert angles.predict_bytes(model.config, POSITIONS) == angles.table_bytes(POSITIONS, 16)
    monkeypatch.setattr(angles, "LIMIT", angles.table_bytes(POSITIONS, 16) - 1)
    assert angles.predict_bytes(model.config, POSITIONS) == 0
    target.write(model, PROFILE, tmp_path, graph)
    assert operators(tmp_path, SHARED)["RotaryEmbedding"] == 4 and operators(tmp_path, SHARED)["Cos"] == 1
    first, second = Session(tmp_path, 1), Session(tmp_path, 1, graph=SHARED)
    longer = ids(2, 2 * POSITIONS)  # nothing limits computed angles
    assert apart(second.logits(longer), first.logits(longer)) < 1e-4


def rotations(changes: dict[str, Any], config: str, folder: Path) -> tuple[ir.Graph, list[rotary.Rotation]]:
    """A captured graph, and what is found in it."""
    made = getattr(transformers, config)(**{**GROUPED, **changes})
    made.architectures = [config.replace("Config", "ForCausalLM")]
    made.save_pretrained(folder)
    model: Model = compress.load(folder, weights=False)
    graph = ir.from_proto(onnx.load_from_string(target.capture(model, PROFILE))).graph
    places = [value for node in graph if node.op_type == "Attention" for value in node.inputs[:2]]
    return graph, [found for value in places if (found := rotary.find(value)) is not None]


def test_pairs_of_neighbours_are_left_as_they_are(tmp_path: Path) -> None:
    assert rotations({}, "CohereConfig", tmp_path)[1] == []


def test_a_table_holds_the_angles_of_every_position(tmp_path: Path) -> None:
    graph, found = rotations({}, "LlamaConfig", tmp_path)
    assert len(found) == 4
    tables = angles.tables(graph, found[0], POSITIONS)
    assert tables is not None
    expected = np.arange(POSITIONS)[:, None] / 1e4 ** (np.arange(0, 16, 2) / 16)
    assert np.abs(tables[0] - np.cos(expected)).max() < 1e-5 and np.abs(tables[1] - np.sin(expected)).max() < 1e-5


@pytest.mark.parametrize("what", ["the length of the row", "a weight"])
def test_angles_of_more_than_a_position_make_no_table(tmp_path: Path, what: str) -> None:
    graph, found = rotations({}, "LlamaConfig", tmp_path)
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    if what == "a weight":
        factor = next(value for value in graph.inputs if str(value.name).startswith("parameter::"))
        whole = ir.node("ReduceSum", [factor], {"keepdims": 0}, name="whole")
    else:
        count = ir.node("Size", [mask], name="count")
        whole = ir.node("Cast", [count.outputs[0]], {"to": ir.DataType.FLOAT.value}, name="whole")
        count.outputs[0].name = "count"
        graph.insert_before(graph[0], count)
    whole.outputs[0].name = "whole"
    cosine = found[0].cos.producer()
    assert cosine is not None
    scaled = ir.node("Mul", [found[0].cos, whole.outputs[0]], name="scaled")
    scaled.outputs[0].name = "scaled"
    graph.insert_after(cosine, [whole, scaled])
    assert angles.tables(graph, found[0]._replace(cos=scaled.outputs[0]), POSITIONS) is None
    assert angles.tables(graph, found[0], POSITIONS) is not None


def test_halves_with_angles_of_their_own_are_not_for_the_operator(tmp_path: Path) -> None:
    graph, found = rotations({}, "LlamaConfig", tmp_path)
    cosine = found[0].cos.producer()
    assert cosine is not None
    shift = GraphBuilder(graph).constant(np.arange(16), np.float32)
    shifted = ir.node("Add", [found[0].cos, shift], name="shifted")
    shifted.outputs[0].name = "shifted"
    graph.insert_after(cosine, shifted)
    other = found[0]._replace(cos=shifted.outputs[0])
    assert angles.tables(graph, other, POSITIONS) is None
    assert angles.same_halves(graph, found[0]) and not angles.same_halves(graph, other)
