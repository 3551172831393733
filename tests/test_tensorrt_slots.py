"""An engine whose cache is slots: its graph, in ONNX Runtime, drops what the torch cache drops; what is built and what
is refused; and the engine's own session on a machine that has the GPU, here a stand-in (tests/stubs/tensorrt)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

import compress
from compress import hwprofiles, recipe
from compress.errors import UnsupportedError
from compress.export.tensorrt import record, slotted, target
from compress.export.tensorrt.engine import EngineSession
from compress.export.tensorrt.runtime import Session
from compress.hwprofiles import Profile
from compress.kv.cache import KvCache
from compress.kv.spec import KvSpec
from compress.models.model import Model
from compress.passes import KvEvict, KvQuant
from compress.pipeline import Pipeline
from compress.plan import make_plan
from helpers.tensorrt_machine import becoming

L4 = hwprofiles.load("nvidia-l4")
SMALL: dict[str, Any] = {"budget": 16, "sinks": 2, "recent": 4, "chunk": 8}
INT8 = {"keys": "int8(token)", "values": "int8(token)"}
H2O = KvSpec(**SMALL, scorer="h2o")
LENGTH = 72


def in_float32(profile: Profile) -> Profile:
    """So that torch, which computes in float32, chooses among the same scores."""
    found = {key: each.model_copy(update={"float_dtype": "float32"}) for key, each in profile.runtimes.items()}
    return profile.model_copy(update={"runtimes": found})


@pytest.fixture(scope="module")
def model(two_blocks: Path) -> Model:
    return compress.load(two_blocks)


@pytest.fixture(scope="module")
def graph(model: Model) -> bytes:
    return target.capture(model, L4)


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    """No token twice: two keys of one token have one norm but for rounding, and either may go."""
    return np.random.default_rng(0).permutation(np.arange(256))[: 2 * LENGTH].reshape(2, LENGTH)


def graph_of(model: Model, spec: KvSpec, profile: Profile, folder: Path, graph: bytes) -> Session:
    """Without an engine, as a baseline is written."""
    target.write_baseline(replace(model, kv=(spec,) * 2), profile, folder, graph)
    session = target.session(folder, 1)
    assert isinstance(session, Session)
    return session


def steps(length: int) -> list[tuple[int, int]]:
    """A prompt in pieces, then token by token."""
    return [(0, 8), (8, 16), (16, 24), *((at, at + 1) for at in range(24, length))]


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({"scorer": "position"}, 1e-4),
        ({"scorer": "key_norm"}, 1e-4),
        ({"scorer": "h2o", "decay": 0.9}, 1e-4),
        ({"scorer": "tova"}, 1e-4),
        ({"scorer": "h2o", **INT8}, 2e-2),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_graph_of_an_engine_drops_what_the_torch_cache_drops(
    settings: dict[str, Any],
    bound: float,
    model: Model,
    graph: bytes,
    ids: np.ndarray,
    two_blocks: Path,
    tmp_path: Path,
) -> None:
    spec = KvSpec(**SMALL, **settings)
    session = graph_of(model, spec, in_float32(L4), tmp_path / "out", graph)
    in_torch = AutoModelForCausalLM.from_pretrained(two_blocks, dtype=torch.float32).eval()
    cache, torch_cache, ones = session.empty_cache(2), KvCache.attach(in_torch, (spec, spec)), np.ones(ids.shape, int)
    for start, stop in steps(LENGTH):
        found = np.concatenate([*slotted.read(session, ids[:, start:stop], ones[:, :stop], cache)], 1)
        expected = in_torch(torch.from_numpy(ids[:, start:stop]), past_key_values=torch_cache).logits.numpy()
        assert np.abs(found - expected).max() < bound * np.abs(expected).max()
        for layer, held in enumerate(torch_cache.layers):
            positions = np.sort(cache[f"slots.{layer}.position"][:, :, :-1], -1)
            np.testing.assert_array_equal(positions[..., -held.position.shape[2] :], np.sort(held.position.numpy(), -1))


def test_slots_take_the_type_of_products_and_there_is_no_float64(model: Model, graph: bytes, tmp_path: Path) -> None:
    """TensorRT's parser makes float32 of float64 without a word, which loses what it was for."""
    session = graph_of(model, H2O, L4, tmp_path / "out", graph)
    kinds = {item.name.split(".", 2)[2]: item.type for item in session._session.get_inputs() if "slots." in item.name}
    assert kinds == {
        "key": "tensor(float16)",
        "value": "tensor(float16)",
        "position": "tensor(int32)",
        "score": "tensor(float)",
    }
    document = onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False)
    casts = [each.i for node in document.graph.node if node.op_type == "Cast" for each in node.attribute]
    assert onnx.TensorProto.DOUBLE not in casts
    assert all(each.data_type != onnx.TensorProto.DOUBLE for each in document.graph.initializer)


def test_whole_rows_are_the_models_logits_and_slots_agree_with_them_while_there_is_room(
    model: Model, graph: bytes, ids: np.ndarray, tmp_path: Path
) -> None:
    session = graph_of(model, replace(H2O, **INT8), in_float32(L4), tmp_path / "out", graph)
    exact = target.session(tmp_path / "out", 1, exact=True)
    floats = graph_of(model, H2O, in_float32(L4), tmp_path / "float", graph)
    np.testing.assert_allclose(exact.logits(ids), floats.plain.logits(ids), rtol=1e-3, atol=1e-4)
    assert np.abs(session.logits(ids)[:, -1] - exact.logits(ids)[:, -1]).max() > 1e-2
    assert target.compare_graphs(session, exact, ids, 1e-4, 128)[0]
    assert target.compare_graphs(floats, exact, ids, 1e-4, 128)[0]
    assert not target.compare_graphs(floats, exact, ids, 0.0, 128)[0]


@pytest.mark.parametrize(
    ("spec", "profile", "told"),
    [
        (H2O, hwprofiles.load("nvidia-h100-sxm"), "not for SM 90 of nvidia-h100-sxm"),
        (KvSpec(keys="int8(token)"), L4, "fixed number of slots; add kv_evict"),
        (replace(H2O, values="int4(group=8)"), L4, "int4(group=8) is not stored"),
        (replace(H2O, budget=5000, chunk=4000), L4, "chunk=4000 is more than TensorRT chooses among at once"),
    ],
)
def test_what_an_engine_does_not_hold_is_refused_by_name(spec: KvSpec, profile: Profile, told: str) -> None:
    refusal = target.takes_caches((H2O, spec), profile)
    assert refusal is not None and told in refusal.reason
    assert target.takes_caches((H2O, replace(H2O, **INT8, chunk=4000)), L4) is None


def test_the_refusal_comes_before_any_work(model: Model) -> None:
    with pytest.raises(UnsupportedError, match=r"slots were built by TensorRT-RTX only.*--target native"):
        make_plan(model, recipe.of_passes("kv_evict(budget=64)"), hwprofiles.load("nvidia-h100-sxm"))


def test_the_session_of_an_engine_reads_in_chunks_and_hands_slots_on(
    model: Model, graph: bytes, ids: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in runs the graph, so both must give the same; no engine with slots ran on a GPU yet."""
    profile = hwprofiles.load("nvidia-h100-sxm")
    here = graph_of(model, H2O, profile, tmp_path / "graph", graph)
    becoming(monkeypatch, tmp_path / "cache")()
    target.write(replace(model, kv=(H2O, H2O)), profile, tmp_path / "out", graph)
    session = target.session(tmp_path / "out", 1)
    assert isinstance(session, EngineSession) and session.slots == slotted.Slots(8, 16, False)
    np.testing.assert_array_equal(session.logits(ids), here.logits(ids))
    prompt = ids[0, :20].tolist()
    assert session.greedy(prompt, 30) == here.greedy(prompt, 30)
    runners = [target.runner(each, tmp_path) for each in (session, here)]
    mask = np.stack([np.ones(24, np.int64), np.repeat([0, 1], [8, 16])])
    for runner in runners:
        runner.start(ids[:, :24], mask)
    for at in range(20):
        first, second = (runner.step(ids[:, 40 + at], np.array([True, at < 5])) for runner in runners)
        np.testing.assert_array_equal(first, second)
    assert target.compare_graphs(session, target.session(tmp_path / "out", 1, exact=True), ids, 0.05, 128)[0]
    assert session.plain.level == "ran" and session.plain.logits(ids).shape == (2, LENGTH, 256)
    session.call(ids[:1, :1], 40)()


def test_a_timed_prompt_that_is_longer_than_a_chunk_is_read_in_pieces(
    model: Model, graph: bytes, ids: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    becoming(monkeypatch, tmp_path / "cache")()
    target.write(replace(model, kv=(H2O, H2O)), hwprofiles.load("nvidia-h100-sxm"), tmp_path / "out", graph)
    session = target.session(tmp_path / "out", 1)
    assert isinstance(session, EngineSession)
    run, seen = session.run, list[Any]()

    def watched(feeds: Any) -> Any:
        found = run(feeds)
        seen.append(found["logits"])
        return found

    once, first = session.call(ids[:1, :20], 0), session.greedy(ids[0, :20].tolist(), 1)[0]
    monkeypatch.setattr(session, "run", watched)
    for _ in "12":  # a repeated call does the same work
        seen.clear()
        once()
        assert [each.shape[1] for each in seen] == [8, 8, 4] and int(seen[-1][0, -1].argmax()) == first


def test_an_engine_with_slots_is_built_verified_and_generates(model: Model, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra tensorrt-rtx)")
    result = Pipeline(KvQuant(), KvEvict(budget=24, by="h2o", sinks=2, recent=4, chunk=16)).run(model)
    artifact = compress.export(result, profile=L4, out=tmp_path / "out")
    kept = record.read(artifact.deployable)
    assert kept.level == "built" and kept.ranges["prefill"]["position_ids"][2][1] == 16
    assert kept.engine_bytes == pytest.approx(
        target.predict_deployed_bytes(result.model.structure.layers.values(), result.model, L4), rel=0.3
    )
    found = compress.verify(artifact.folder)
    assert (found.level, found.agrees) == ("built", True) and any("slots against whole rows" in n for n in found.notes)
