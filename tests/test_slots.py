"""The slot graph drops the tokens that the torch cache drops, and computes what that computes."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress import hwprofiles, recipe
from compress.errors import UnsupportedError, UsageError
from compress.export.onnx import graphs, slots, target
from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.runtime import PORTABLE, SHARED, SLOTS, Session
from compress.export.onnx.slot_attention import attend
from compress.export.onnx.slot_session import SlotSession
from compress.export.onnx.slot_tokens import Tokens
from compress.export.onnx.slot_update import Update
from compress.kv.cache import KvCache, _attend
from compress.kv.layer import KvLayer
from compress.kv.spec import KvSpec
from compress.kv.stores import RowStore
from compress.models.model import Model
from compress.passes import KvEvict, KvQuant
from compress.pipeline import Pipeline
from compress.plan import make_plan

PROFILE = hwprofiles.load("cpu-x86-avx512-vnni")
SMALL: dict[str, Any] = {"budget": 16, "sinks": 2, "recent": 4, "chunk": 8}
INT8 = {"keys": "int8(token)", "values": "int8(token)"}
SCORERS: list[dict[str, Any]] = [
    {"scorer": "position"},
    {"scorer": "key_norm"},
    {"scorer": "h2o"},
    {"scorer": "h2o", "decay": 0.9},
    {"scorer": "h2o", "by_age": True},
    {"scorer": "tova"},
    {"scorer": "locret", "head_width": 24},
    {"scorer": "kvzap"},
    {"scorer": "kvzap", "head_width": 24, "by_age": True},
]
LENGTH = 104
Write = Callable[..., SlotSession]


@pytest.fixture(scope="module")
def model(two_blocks: Path) -> Model:
    return compress.load(two_blocks)


@pytest.fixture(scope="module")
def in_torch(two_blocks: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(two_blocks, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    """No token twice: two keys of one token have one norm but for rounding, and either may go."""
    return np.random.default_rng(0).permutation(np.arange(256))[: 2 * LENGTH].reshape(2, LENGTH)


@pytest.fixture(scope="module")
def write(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Write:
    graph = target.capture(model, PROFILE)

    def made(*specs: KvSpec) -> SlotSession:
        caches = specs if len(specs) == 2 else specs * 2
        folder, caching = tmp_path_factory.mktemp("slots"), replace(model, kv=caches)
        caching.__dict__["kv_tensors"] = heads_of(*caches)
        target.write(caching, PROFILE, folder, graph)
        session = target.session(folder, 1)
        assert isinstance(session, SlotSession)
        return session

    return made


def heads_of(*specs: KvSpec) -> tuple[dict[str, torch.Tensor], ...]:
    """Random heads for the model of two blocks: 2 key-value heads, hidden states 64 and projections 128 wide."""
    generator, made = torch.Generator().manual_seed(1), []
    for spec in specs:
        inputs, width = 128 if spec.scorer == "locret" else 64, spec.head_width
        shapes = {"head.first": (width, inputs), "head.second": (2, width or inputs)}
        shapes |= {"head.first_bias": (width,), "head.second_bias": (2,)}
        made.append({name: torch.randn(shapes[name], generator=generator) for name in spec.wants})
    return tuple(made)


@torch.no_grad()
def compared(session: SlotSession, model: Any, specs: tuple[KvSpec, ...], ids: np.ndarray) -> float:
    """Both read a prompt in pieces, and the rest token by token. Every slot set must be the same. Returns: the largest
    difference of logits, as a share of the largest logit."""
    cache, torch_cache, widest = session.cache(len(ids), 0), KvCache.attach(model, specs, heads_of(*specs)), 0.0
    pieces = [(at, at + session.chunk) for at in range(0, 24, session.chunk)]
    for start, stop in [*pieces, *((at, at + 1) for at in range(pieces[-1][1], ids.shape[1]))]:
        found = cache.run(ids[:, start:stop], np.ones((len(ids), stop), np.int64))
        expected = model(
            torch.from_numpy(ids[:, start:stop]), past_key_values=torch_cache, use_cache=True
        ).logits.numpy()
        widest = max(widest, float(np.abs(found - expected).max() / np.abs(expected).max()))
        for layer, held in enumerate(torch_cache.layers):
            positions = np.sort(cache.held(layer, "position"), -1)
            np.testing.assert_array_equal(positions[..., -held.position.shape[2] :], np.sort(held.position.numpy(), -1))
    return widest


@pytest.mark.parametrize("settings", SCORERS, ids=str)
def test_floats_are_dropped_and_read_as_in_torch(
    settings: dict[str, Any], write: Write, in_torch: Any, ids: np.ndarray
) -> None:
    specs = (KvSpec(**SMALL, **settings), KvSpec(**{**SMALL, "budget": 11, "chunk": 12}, **settings))
    assert compared(write(*specs), in_torch, specs, ids) < 1e-4


@pytest.mark.parametrize("settings", [{"scorer": "key_norm"}, {"scorer": "h2o"}], ids=str)
def test_codes_are_those_of_the_torch_cache(
    settings: dict[str, Any], write: Write, in_torch: Any, ids: np.ndarray
) -> None:
    """A value between two codes may become either, which later tokens feel; the slots are the same all the same."""
    specs = (KvSpec(**SMALL, **settings, **INT8), KvSpec(**SMALL, **settings, keys="int8(token)"))
    session = write(*specs)
    assert compared(session, in_torch, specs, ids) < 2e-2
    cache, torch_cache = session.cache(2, 0), KvCache.attach(in_torch, specs)
    cache.run(ids[:, :8], np.ones((2, 8), np.int64))
    with torch.no_grad():
        in_torch(torch.from_numpy(ids[:, :8]), past_key_values=torch_cache, use_cache=True)
    places = np.argsort(cache.held(0, "position"), -1)[..., -8:]
    for name, store in zip(("key", "value"), torch_cache.layers[0].stores, strict=True):
        codes = np.take_along_axis(cache.held(0, name), places[..., None], 2).astype(int) + 128
        apart = np.abs(codes - store.held["codes"].numpy())  # type: ignore[attr-defined]
        assert apart.max() <= 1 and apart.mean() < 1e-3
        scales = np.take_along_axis(cache.held(0, f"{name}_scale"), places, 2)
        np.testing.assert_allclose(scales, store.held["scale"][..., 0].numpy(), rtol=1e-3)  # type: ignore[attr-defined]


@pytest.mark.parametrize("scorer", [{"scorer": "locret", "head_width": 24}, {"scorer": "kvzap"}], ids=str)
def test_heads_look_at_what_quantized_projections_put_out(
    scorer: dict[str, Any], model: Model, in_torch: Any, ids: np.ndarray, tmp_path: Path
) -> None:
    """Weights in int4, whose products are joined: against torch with the same weights decoded."""
    made, specs = Pipeline.parse("rtn(format=int4(group=32))").run(model).model, (KvSpec(**SMALL, **scorer),) * 2
    decoded = copy.deepcopy(in_torch)
    for name, spec in made.structure.layers.items():
        decoded.get_submodule(name).weight.data = made.reader.layer(spec).float_weight()
    caching = replace(made, kv=specs)
    caching.__dict__["kv_tensors"] = heads_of(*specs)
    target.write(caching, PROFILE, tmp_path / "out")
    operators = [node.op_type for node in onnx.load(str(tmp_path / "out" / SLOTS), load_external_data=False).graph.node]
    assert "MatMulNBits" in operators and "Sigmoid" in operators
    assert compared(SlotSession(tmp_path / "out", 1, exact=True), decoded, specs, ids[:, :48]) < 1e-4


def test_equal_keys_and_values_get_equal_codes() -> None:
    """The store itself is exact, far past the budget: in a model, codes differ where products are summed in another
    order."""
    spec = KvSpec(**SMALL, scorer="h2o", **INT8)
    run, layer, random = attention_alone(spec), KvLayer(spec), torch.Generator().manual_seed(0)
    held: dict[str, np.ndarray] = {}
    for at in range(80):
        query, key, value = (torch.randn(2, heads, 1, 16, generator=random) for heads in (4, 2, 2))
        found, held = run(query.numpy(), key.numpy(), value.numpy(), np.full((2, 1), at), held)
        expected, _ = _attend(torch.nn.Identity(), query, *layer.update(key, value), None, scaling=0.25)
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
        ours, theirs = (
            np.argsort(held["position"][:, :, :-1], -1)[..., -layer.valid.shape[2] :],
            layer.position.argsort(-1),
        )
        for name, store in zip(("key", "value"), layer.stores, strict=True):
            assert isinstance(store, RowStore)
            codes = store.held["codes"].gather(2, theirs[..., None].expand(-1, -1, -1, 16)).numpy()
            np.testing.assert_array_equal(np.take_along_axis(held[name], ours[..., None], 2).astype(int) + 128, codes)


def attention_alone(spec: KvSpec) -> Callable[..., tuple[np.ndarray, dict[str, np.ndarray]]]:
    """4 heads of 16 on 2 of keys and values, two rows: (query, key, value, positions, state or {}) → output, state."""
    kinds = {name: ([2, heads, 1, 16], np.float32) for name, heads in (("query", 4), ("key", 2), ("value", 2))}
    kinds |= {"positions": ([2, 1], np.int64)}
    state = {name: ([2, *held.shape[1:]], held.dtype.numpy()) for name, held in slots.state(spec, 2, 16, 16).items()}
    values = [
        ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(np.dtype(kind))), shape=ir.Shape(shape))
        for name, (shape, kind) in (*kinds.items(), *((f"held.{name}", each) for name, each in state.items()))
    ]
    graph = ir.Graph(values, [], nodes=[], opset_imports={"": 21}, name="attention")
    builder, node = GraphBuilder(graph), ir.node("Attention", values[:3], {"scale": 0.25})
    out, after = attend(builder, node, spec, dict(zip(state, values[4:], strict=True)), values[3])
    graph.extend(builder.nodes)
    graph.outputs.extend([out, *(after[name] for name in state)])
    made = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"])
    empty = {name: np.full(shape, -1 if name == "position" else 0, kind) for name, (shape, kind) in state.items()}

    def run(*given: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        held = {f"held.{name}": value for name, value in (given[4] or empty).items()}
        found = session.run(None, dict(zip(kinds, given[:4], strict=True)) | held)
        return found[0], dict(zip(state, found[1:], strict=True))

    return run


@pytest.mark.parametrize("settings", [*SCORERS[1:4], SCORERS[5]], ids=str)
def test_padded_rows_and_rows_that_have_ended_change_no_other(
    settings: dict[str, Any], write: Write, ids: np.ndarray
) -> None:
    session = write(KvSpec(**SMALL, **settings))
    runner = target.runner(session, session.folder)
    prompts = [ids[0, :24], ids[1, :16]]  # pieces of 8 begin at the same tokens, alone and padded
    padded = np.stack([prompts[0], np.concatenate([np.zeros(8, np.int64), prompts[1]])])
    mask = np.stack([np.ones(24, np.int64), np.repeat([0, 1], [8, 16])])
    rows = [runner.start(padded, mask)]
    rows += [runner.step(ids[:, 40 + at], np.array([True, at < 5])) for at in range(20)]
    for row, prompt in enumerate(prompts):
        alone = [runner.start(prompt[None], np.ones((1, len(prompt)), np.int64))]
        alone += [runner.step(ids[row : row + 1, 40 + at], np.array([True])) for at in range(20 if row == 0 else 5)]
        for found, expected in zip(rows, alone, strict=False):
            np.testing.assert_allclose(found[row], expected[0], rtol=1e-4, atol=1e-4)


def test_memory_is_that_of_the_slots_however_long_the_text(write: Write, model: Model) -> None:
    session = write(KvSpec(**SMALL, scorer="h2o", **INT8))
    tokens, held = session.cache_use()
    per_slot = 2 * (16 + 2) + 4 + 4  # keys and values of one head in bytes with scales, position, score
    assert (tokens, held) == (model.longest, 2 * 2 * 17 * per_slot)
    cache = session.cache(1, 0)
    before = [buffer.data_ptr() for buffer in cache._buffers.values()]
    cache.run(np.arange(100)[None], np.ones((1, 100), np.int64))
    assert [buffer.data_ptr() for buffer in cache._buffers.values()] == before
    plain = target.session(session.folder, 1, exact=True)
    assert plain.cache_use() == (tokens, 2 * 2 * 2 * 16 * 4 * tokens)


def test_quality_is_of_tokens_that_come_one_by_one_and_plain_logits_are_the_models(
    write: Write, ids: np.ndarray
) -> None:
    session = write(KvSpec(**SMALL, scorer="key_norm"))
    plain = session.plain.logits(ids)
    lossy = session.logits(ids)
    np.testing.assert_allclose(lossy[:, :16], plain[:, :16], rtol=1e-3, atol=1e-3)
    assert np.abs(lossy[:, -1] - plain[:, -1]).max() > 1e-2


def test_the_graph_refers_to_the_weights_of_the_portable_one(write: Write) -> None:
    folder = write(KvSpec(**SMALL, scorer="h2o")).folder
    assert not (folder / SHARED).exists() and not (folder / f"{SLOTS}_data").exists()
    assert not (folder / "genai_config.json").exists()  # which would run the model with a cache that keeps all
    onnx.checker.check_model(str(folder / SLOTS))
    document = onnx.load(str(folder / SLOTS), load_external_data=False)
    held = [one for one in document.graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL]
    assert {entry.value for one in held for entry in one.external_data if entry.key == "location"} == {target.DATA}
    assert max(one.ByteSize() for one in document.graph.initializer if one not in held) < 512
    facts = {entry.key: entry.value for entry in document.metadata_props}
    assert json.loads(facts["compress.slots"])["specs"][0]["scorer"] == "h2o"


def test_a_folder_written_without_caches_has_no_slots(write: Write, model: Model) -> None:
    folder = write(KvSpec(**SMALL, scorer="h2o")).folder
    target.write(model, PROFILE, folder, target.capture(model, PROFILE))
    assert not (folder / SLOTS).exists() and (folder / SHARED).exists() and (folder / "genai_config.json").exists()
    assert type(target.session(folder, 1)) is Session


@pytest.mark.parametrize("store", [{}, INT8], ids=str)
def test_the_plan_knows_the_size(store: dict[str, Any], write: Write, model: Model) -> None:
    spec = KvSpec(**SMALL, scorer="h2o", **store)
    size = sum(path.stat().st_size for path in write(spec).folder.iterdir())
    made = replace(model, kv=(spec, spec))
    assert target.predict_bytes(model.structure.layers.values(), made, PROFILE) == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize("seed", range(6))
def test_of_equal_scores_the_older_goes(seed: int) -> None:
    """Against sorting all by score and position; few scores, so that most are equal; some slots are empty, and some new
    tokens padding, at the left."""
    random = np.random.default_rng(seed)
    slots, new, padding = 24, int(random.integers(1, 40)), int(random.integers(0, 3)) if seed % 2 else 0
    spec = KvSpec(scorer="key_norm", budget=slots, sinks=2, recent=3)
    positions = random.permutation(2**24 - 100)[:slots]
    positions[: seed % 4] = -1
    fresh = np.concatenate([np.full(min(padding, new - 1), -1), np.arange(2**24 - 100, 2**24)])[:new]
    scores = random.integers(0, 1 + seed, slots).astype(np.float32), random.integers(0, 1 + seed, new)
    token, wins, place = chosen(spec, *scores, positions, fresh)
    after = {at: held for at, held in enumerate(positions) if held >= 0}
    for source, into in zip(token[wins], place[wins], strict=True):
        assert after.pop(into, -1) < fresh[source] and into < slots
        after[into] = fresh[source]
    assert set(place[~wins]) <= {slots}
    known = sorted(
        (at < spec.sinks or at > fresh.max() - spec.recent, score, at)
        for score, at in zip(np.concatenate(scores), np.concatenate([positions, fresh]), strict=True)
        if at >= 0
    )
    assert sorted(at for at in after.values() if at >= 0) == sorted(at for *_, at in known[-slots:])


def test_first_and_newest_tokens_come_before_all_others_and_empty_slots_after() -> None:
    spec = KvSpec(scorer="h2o", budget=8, sinks=2, recent=3)
    positions = np.array([-1, 0, 1, 2, 5, 6, 8, 7])
    token, wins, place = chosen(spec, np.full(8, 1e9, np.float32), np.zeros(4), positions, np.array([-1, 9, 10, 11]))
    assert dict(zip(place[wins], token[wins], strict=True)).keys() - {0} == {3, 4}  # the oldest but for the first
    assert set(token[wins]) >= {1, 2, 3}


def chosen(
    spec: KvSpec, scores: np.ndarray, fresh: np.ndarray, positions: np.ndarray, given: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Through the nodes that the slot graph has: of one head the new tokens, whether they are kept, and their slots."""
    slots, new = len(positions) + 1, len(given)
    kinds = {"scores": ([1, 1, slots], np.float32), "fresh": ([1, 1, new], np.float32)}
    kinds |= {"positions": ([1, 1, slots], np.int32), "given": ([1, new], np.int64), "out": ([1, 1, 1, 1], np.float32)}
    inputs = {
        name: ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(np.dtype(kind))), shape=ir.Shape(shape))
        for name, (shape, kind) in kinds.items()
    }
    graph = ir.Graph([*inputs.values()], [], nodes=[], opset_imports={"": 21}, name="choice")
    builder = GraphBuilder(graph)
    update = Update(builder, spec, {"position": inputs["positions"]}, Tokens(builder, inputs["given"], 1))
    graph.outputs.extend(update._choose(inputs["scores"], inputs["fresh"], 1, inputs["out"]))
    graph.extend(builder.nodes)
    made = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    values = [np.append(scores, 0), fresh, np.append(positions, -1), given, 0]
    feeds = {
        name: np.asarray(value, kind).reshape(shape)
        for (name, (shape, kind)), value in zip(kinds.items(), values, strict=True)
    }
    found = onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"]).run(None, feeds)
    return tuple(each[0, 0] for each in found)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (KvSpec(keys="int8(token)"), "fixed number of slots; add kv_evict"),
        (KvSpec(**SMALL, scorer="h2o", values="int4(group=8)"), "int4(group=8) is not stored"),
        (KvSpec(**SMALL, scorer="h2o", keys="int8(token, asymmetric)"), "asymmetric) is not stored"),
        (KvSpec(**SMALL, scorer="snapkv", window=4), "scorer snapkv is not in the slot graph"),
        (KvSpec(**SMALL, scorer="h2o", keys="int8(token)", rotated=True), "rotated vectors are not in the slot graph"),
        (KvSpec(**SMALL, scorer="h2o", pool=3), "does not know pool of a cache"),
    ],
)
def test_what_slots_do_not_hold_is_refused_by_name(spec: KvSpec, told: str) -> None:
    refusal = target.takes_caches((KvSpec(**SMALL, scorer="h2o"), spec), PROFILE)
    assert refusal is not None and refusal.usage and told in refusal.reason


def test_refusals_come_before_any_work(model: Model) -> None:
    with pytest.raises(UsageError, match=r"residual of float tokens.*--target native"):
        make_plan(model, recipe.of_passes("kv_quant(residual=32)"), PROFILE)
    spared, static = "kv_quant(sensitive=1, fallback=nf4)", "kv_quant(keys=int8(head), values=int8(head), static=minmax"
    with pytest.raises(
        UsageError, match=r"nf4.* is not stored by a graph"
    ):  # by the layer that data may say is so stored
        make_plan(model, recipe.of_passes(spared), PROFILE)
    checkpoint = PROFILE.model_copy(update={"target": "checkpoint"})
    with pytest.raises(UsageError, match="some are in float"):
        make_plan(model, recipe.of_passes(f"{static}, sensitive=1)"), checkpoint)
    make_plan(model, recipe.of_passes(f"{static})"), checkpoint)
    with pytest.raises(UnsupportedError, match="keeps a cache of its own"):
        make_plan(model, recipe.of_passes("kv_evict(budget=64)"), PROFILE.model_copy(update={"target": "openvino"}))
    gpu = slots.refusal((KvSpec(**SMALL, scorer="h2o"),), hwprofiles.load("nvidia-l4").runtime("onnxruntime"))
    assert gpu is not None and not gpu.usage


@pytest.mark.parametrize(
    ("changes", "told"), [({"softcap": 30.0}, "a soft cap"), ({"before": 7}, "a window"), ({}, "outside its attention")]
)
def test_attention_that_the_torch_cache_does_not_do_is_refused(changes: dict[str, Any], told: str) -> None:
    """The last: something else reads the growing cache, which is not there any more."""
    names = {"input_ids": ("batch", "n"), "attention_mask": ("batch", "all")}
    names |= {f"past_key_values.0.{part}": ("batch", 1, "past", 8) for part in ("key", "value")}
    given = [
        ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name, shape in names.items()
    ]
    states = [ir.Value(name=name, shape=ir.Shape(["batch", 1, "n", 8])) for name in "qkv"]
    attributes = {"scale": 1.0, "softcap": 0.0, "before": -1, "after": 0, **changes}
    attend = ir.node("Attention", [*states, *given[2:]], attributes, domain="compress", num_outputs=3, name="attend")
    other = ir.node("Shape", [given[2]])
    graph = ir.Graph([*given, *states], attend.outputs, nodes=[attend, other], opset_imports={"": 21}, name="one")
    lowering = slots.Slots((KvSpec(**SMALL, scorer="h2o"),))
    with pytest.raises(UnsupportedError, match=told):
        lowering.open(graph)
        lowering.close(ir.Model(graph, ir_version=10))


def test_an_artifact_with_slots_is_verified_and_generates(model: Model, tmp_path: Path) -> None:
    result = Pipeline(KvQuant(), KvEvict(budget=24, by="h2o", sinks=2, recent=4, chunk=16)).run(model)
    artifact = compress.export(result, profile=PROFILE, out=tmp_path / "out")
    found = compress.verify(artifact.folder)
    assert found.agrees and any(SLOTS in note and PORTABLE in note for note in found.notes)
    engine = compress.load(artifact.folder)
    first = engine.generate([[1, 2, 3], [5] * 40], max_new_tokens=40)
    assert [len(row.tokens) for row in first.rows] == [40, 40]
    assert engine.placement.file.endswith(SLOTS)
    again = engine.generate([[1, 2, 3], [5] * 40], max_new_tokens=40)
    assert [row.tokens for row in first.rows] == [row.tokens for row in again.rows]


def test_floats_are_compared_with_the_portable_graph_while_slots_are_free(write: Write, ids: np.ndarray) -> None:
    session = write(KvSpec(**SMALL, scorer="h2o"))
    exact = target.session(session.folder, 1, exact=True)
    assert graphs.compare_graphs(session, exact, ids, 1e-4, 128)[0]
    assert not graphs.compare_graphs(session, exact, ids, 0.0, 128)[0]


def test_layers_have_budgets_of_their_own(write: Write, in_torch: Any, ids: np.ndarray, model: Model) -> None:
    for by in ("key_norm", "h2o"):
        specs = Pipeline(KvEvict(by=by, layers="pyramid", **SMALL)).run(model).model.kv
        assert [spec.budget for spec in specs] == [25, 7]
        assert compared(write(*specs), in_torch, specs, ids) < 1e-4


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"scorer": "snapkv", "window": 4},
            "snapkv is not in the slot graph, which has streaming, key_norm",
        ),
        ({"scorer": "expected", "interval": 4}, "the scorer expected is not in the slot graph"),
        ({"scorer": "h2o", "heads": "adaptive"}, "as many slots for each head"),
    ],
    ids=str,
)
def test_what_is_not_in_the_graph_is_told(settings: dict[str, Any], told: str) -> None:
    refused = target.takes_caches([KvSpec(**SMALL, **settings)] * 2, PROFILE)
    assert refused is not None and told in refused.reason
