"""Graphs whose cache keeps all tokens in codes compute what the torch cache does, and take the bytes of codes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import compress
from compress import hwprofiles
from compress.errors import UnsupportedError
from compress.export.onnx import cache_codes, graphs, growing, growing_check, target
from compress.export.onnx.growing_session import GrowingSession
from compress.export.onnx.runtime import PORTABLE, ROUNDED, SHARED, Session
from compress.inputs.datasets import calibrate
from compress.kv.cache import KvCache
from compress.kv.spec import KvSpec
from compress.models.model import Model
from compress.passes import KvQuant
from compress.pipeline import Pipeline

PROFILE = hwprofiles.load("cpu-x86-avx512-vnni")
INT8 = KvSpec(keys="int8(token)", values="int8(token)")
MIXED = (KvSpec(keys="int4(group=8)", values="int8(group=4)"), KvSpec(values="int4(token)"))
STATIC = {by: KvSpec(keys=f"int8({by})", values=f"int8({by})", static=True) for by in ("channel", "head", "tensor")}
INT4 = KvSpec(keys="int4(channel)", values="int4(channel)", static=True)
APART = KvSpec(keys="int8(channel)", values="int8(tensor)", static=True)
SHAPES = {"channel": (2, 16), "head": (2, 1), "tensor": (1, 1)}
LENGTH = 40
Write = Callable[..., GrowingSession]


@pytest.fixture(scope="module")
def model(two_blocks: Path) -> Model:
    return compress.load(two_blocks)


@pytest.fixture(scope="module")
def in_torch(two_blocks: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(two_blocks, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, LENGTH))


def scales_of(spec: KvSpec, seed: int) -> dict[str, torch.Tensor]:
    """Made by hand, some so small that codes are clipped."""
    made, bits = torch.Generator().manual_seed(seed), 4 if "int4" in spec.keys + spec.values else 8
    by = {"key_scale": spec.keys[5:-1], "value_scale": spec.values[5:-1]}
    return {name: (torch.rand(SHAPES[by[name]], generator=made) + 0.3) / 2 ** (bits - 1) for name in spec.wants}


def with_caches(model: Model, *specs: KvSpec) -> Model:
    made = replace(model, kv=specs if len(specs) == 2 else specs * 2)
    vars(made)["kv_tensors"] = tuple(scales_of(spec, seed) for seed, spec in enumerate(made.kv))
    return made


@pytest.fixture(scope="module")
def write(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Write:
    graph, made = target.capture(model, PROFILE), {}

    def written(*specs: KvSpec) -> GrowingSession:
        if specs not in made:
            made[specs] = tmp_path_factory.mktemp("growing")
            target.write(with_caches(model, *specs), PROFILE, made[specs], graph)
        session = target.session(made[specs], 1)
        assert isinstance(session, GrowingSession)
        return session

    return written


@torch.no_grad()
def compared(session: Session, model: Any, made: Model, ids: np.ndarray) -> float:
    """Both read a prompt in two calls, and the rest token by token. Returns: the largest difference of logits, as a
    share of the largest logit."""
    cache, torch_cache, widest = session.cache(len(ids), 0), KvCache.attach(model, made.kv, made.kv_tensors), 0.0
    for start, stop in [(0, 5), (5, 16), *((at, at + 1) for at in range(16, ids.shape[1]))]:
        found = cache.run(ids[:, start:stop], np.ones((len(ids), stop), np.int64))
        given = torch.from_numpy(ids[:, start:stop])
        expected = model(given, past_key_values=torch_cache, use_cache=True).logits.numpy()
        widest = max(widest, float(np.abs(found - expected).max() / np.abs(expected).max()))
    return widest


@pytest.mark.parametrize(
    ("specs", "bound"),
    [((INT8,), 2e-3), (MIXED, 3e-2), ((STATIC["channel"], KvSpec()), 2e-3), ((INT4,), 3e-2)],
    ids=["int8", "mixed", "static", "int4"],
)
def test_logits_are_those_of_the_torch_cache(
    specs: tuple[KvSpec, ...], bound: float, write: Write, model: Model, in_torch: Any, ids: np.ndarray
) -> None:
    """A value between two codes may become either, which later tokens feel: of 4 bits, more than of 8."""
    session = GrowingSession(write(*specs).folder, 1, graph=ROUNDED)
    assert compared(session, in_torch, with_caches(model, *specs), ids) < bound


class StoredFirst(DynamicCache):
    """A slow twin of GroupQueryAttention's cache: rounded before it is attended to."""

    def __init__(self, scales: Any, bits: int) -> None:
        super().__init__()
        self.scales, self.half = scales, 2 ** (bits - 1)

    def update(self, key: Any, value: Any, layer: int, *args: Any, **settings: Any) -> Any:
        rounded = []
        for name, states in (("key", key), ("value", value)):
            scale = self.scales[layer][f"{name}_scale"][None, :, None]
            rounded.append(torch.round(states / scale).clamp(-self.half, self.half - 1) * scale)
        return super().update(*rounded, layer, *args, **settings)


@pytest.mark.parametrize("spec", [STATIC["channel"], STATIC["tensor"], INT4, APART], ids=str)
def test_group_query_attention_reads_every_token_as_it_is_stored(
    spec: KvSpec, write: Write, model: Model, in_torch: Any, ids: np.ndarray
) -> None:
    session, bits = write(spec), 4 if spec is INT4 else 8
    assert session.graph == SHARED
    in_torch.set_attn_implementation("eager")
    with torch.no_grad():
        twin = StoredFirst(with_caches(model, spec).kv_tensors, bits)
        expected = in_torch(torch.from_numpy(ids), past_key_values=twin).logits.numpy()
    at_once, cache = session.logits(ids), session.cache(2, 0)
    steps = [cache.run(ids[:, at : at + 1], np.ones((2, at + 1), np.int64)) for at in range(LENGTH)]
    for found in (at_once, np.concatenate(steps, 1)):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("by", ["head", "channel"])
def test_codes_and_scales_are_the_bytes_of_the_torch_store(
    by: str, write: Write, model: Model, in_torch: Any, ids: np.ndarray
) -> None:
    """Of the first layer, whose keys and values hang on no cache."""
    spec = STATIC[by] if by == "head" else MIXED[0]
    session = GrowingSession(write(spec).folder, 1, graph=ROUNDED)
    cache, made = session.cache(2, 0), with_caches(model, spec)
    cache.run(ids, np.ones(ids.shape, np.int64))
    held = KvCache.attach(in_torch, made.kv, made.kv_tensors)
    with torch.no_grad():
        in_torch(torch.from_numpy(ids), past_key_values=held, use_cache=True)
    for name, store in zip(("key", "value"), held.layers[0].stores, strict=True):
        found: Any = cache.held(f"past_key_values.0.{name}")  # type: ignore[attr-defined]
        codes: Any = store.held["codes"].numpy()  # type: ignore[attr-defined]
        if found.dtype == np.int8:
            found = found.astype(np.int16) + 128
        assert (found != codes).mean() < 1e-3
        if not spec.static:
            own = cache.held(f"past_key_values.0.{name}_scale")  # type: ignore[attr-defined]
            np.testing.assert_allclose(own, store.held["scale"].numpy(), rtol=1e-3)  # type: ignore[attr-defined]


def test_memory_is_that_of_codes_and_scales(write: Write, model: Model) -> None:
    tokens = model.longest
    floats = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, channels, bytes
    assert write(INT8).cache_use() == (tokens, tokens * (floats // 4 + 2 * 2 * 2 * 2))  # a float16 scale per vector
    assert write(STATIC["channel"]).cache_use() == (tokens, tokens * floats // 4)
    assert write(INT4).cache_use() == (tokens, tokens * floats // 8)
    assert write(INT8).plain.cache_use() == (tokens, tokens * floats)


def test_quality_is_of_tokens_that_come_one_by_one(write: Write, ids: np.ndarray) -> None:
    session = write(INT8)
    cache = session.cache(2, 0)
    steps = [cache.run(ids[:, at : at + 1], np.ones((2, at + 1), np.int64)) for at in range(LENGTH)]
    np.testing.assert_array_equal(session.logits(ids), np.concatenate(steps, 1))
    assert np.abs(session.logits(ids) - session.plain.logits(ids)).max() > 1e-4


@pytest.mark.parametrize("spec", [INT8, INT4], ids=str)
def test_padded_rows_and_rows_that_have_ended_change_no_other(spec: KvSpec, write: Write, ids: np.ndarray) -> None:
    session = write(spec)
    runner, prompts = target.runner(session, session.folder), [ids[0, :12], ids[1, :7]]
    padded = np.stack([prompts[0], np.concatenate([np.zeros(5, np.int64), prompts[1]])])
    mask = np.stack([np.ones(12, np.int64), np.repeat([0, 1], [5, 7])])
    rows = [runner.start(padded, mask)]
    rows += [runner.step(ids[:, 20 + at], np.array([True, at < 5])) for at in range(10)]
    for row, prompt in enumerate(prompts):
        alone = [runner.start(prompt[None], np.ones((1, len(prompt)), np.int64))]
        alone += [runner.step(ids[row : row + 1, 20 + at], np.array([True])) for at in range(10 if row == 0 else 5)]
        for found, expected in zip(rows, alone, strict=False):
            np.testing.assert_allclose(found[row], expected[0], rtol=1e-3, atol=1e-3)


def test_files_say_what_each_is_for(write: Write) -> None:
    """The portable graph stays as it was, for other tools; all graphs share one file of weights."""
    folder = write(INT8).folder
    assert not (folder / SHARED).exists() and not (folder / "genai_config.json").exists()
    assert any("scales come with each token" in note for note in Session(folder, 1).notes)
    for name in (PORTABLE, ROUNDED):
        onnx.checker.check_model(str(folder / name))
    document = onnx.load(str(folder / ROUNDED), load_external_data=False)
    held = [one for one in document.graph.initializer if one.data_location == onnx.TensorProto.EXTERNAL]
    assert {entry.value for one in held for entry in one.external_data if entry.key == "location"} == {target.DATA}
    assert set(Session(folder, 1).cache_types.values()) == {np.float32}
    static = write(INT4).folder
    decoder = json.loads((static / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder["filename"] == SHARED and decoder["head_size"] == 16 // 2  # it allocates bytes
    assert not (write(STATIC["channel"], KvSpec()).folder / "genai_config.json").exists()  # it knows one type
    assert write(STATIC["channel"], KvSpec()).graph == SHARED


def test_a_folder_written_again_without_caches_has_no_codes(write: Write, model: Model, tmp_path: Path) -> None:
    graph = target.capture(model, PROFILE)
    target.write(with_caches(model, INT8), PROFILE, tmp_path, graph)
    target.write(model, PROFILE, tmp_path, graph)
    assert not (tmp_path / ROUNDED).exists() and (tmp_path / SHARED).exists()
    assert type(target.session(tmp_path, 1)) is Session


@pytest.mark.parametrize("spec", [INT8, STATIC["channel"], INT4], ids=str)
def test_the_plan_knows_the_size(spec: KvSpec, write: Write, model: Model) -> None:
    size = sum(path.stat().st_size for path in write(spec).folder.iterdir())
    made = with_caches(model, spec)
    assert target.predict_bytes(model.structure.layers.values(), made, PROFILE) == pytest.approx(size, rel=0.06)


@pytest.mark.parametrize("specs", [(INT8,), (INT4,), (STATIC["channel"], KvSpec())], ids=str)
def test_codes_are_compared_with_the_portable_graph_on_their_values(
    specs: tuple[KvSpec, ...], write: Write, ids: np.ndarray
) -> None:
    session = write(*specs)
    exact = target.session(session.folder, 1, exact=True)
    assert exact.graph == PORTABLE
    agrees, notes = graphs.compare_graphs(session, exact, ids, 1e-4, 128)
    assert agrees and len(notes) == (2 if session.graph == SHARED else 1)
    assert not graphs.compare_graphs(session, exact, ids, 0.0, 128)[0]


@pytest.mark.parametrize("name", [SHARED, ROUNDED])
def test_a_graph_that_rounds_otherwise_is_found(name: str, write: Write, ids: np.ndarray, tmp_path: Path) -> None:
    """Scales in the file that are not those of the codes: the values read are then consistent, the codes are not."""
    session = write(STATIC["tensor"])
    for path in session.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    document = onnx.load(str(tmp_path / name), load_external_data=False)
    scale = next(each for each in document.graph.initializer if each.name == "cache.1.value_scale")
    rounding = [node for node in document.graph.node if node.op_type in ("Div", "GroupQueryAttention")]
    wrong = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * 1.05, "wrong")
    document.graph.initializer.append(wrong)
    node = next(each for each in rounding if scale.name in each.input)
    node.input[list(node.input).index(scale.name)] = "wrong"
    onnx.save(document, str(tmp_path / name))
    exact = Session(tmp_path, 1, exact=True)
    assert not growing_check.compare_rounded(tmp_path, exact, ids, 1e-4)[0]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (KvSpec(keys="int4(group=32, float_zero)"), "float_zero) is not stored"),
        (KvSpec(keys="int3(token)"), "is not stored by a graph"),
        (KvSpec(keys="fp8_e4m3(token)"), "fp8_e4m3(token) is not stored"),
        (KvSpec(keys="int8(token)", residual=32), "residual of float tokens"),
        (KvSpec(keys="int4(group=32, float_zero)", keys_by="channel", residual=32), "keys by channel"),
        (KvSpec(keys="int8(token)", rotated=True), "rotated"),
    ],
    ids=str,
)
def test_what_graphs_do_not_hold_is_refused_by_name(spec: KvSpec, told: str) -> None:
    refusal = target.takes_caches((INT8, spec), PROFILE)
    assert refusal is not None and refusal.usage and told in refusal.reason


def test_gpus_and_heads_that_runs_do_not_divide_are_refused(model: Model, tmp_path: Path) -> None:
    gpu = growing.refusal((INT8,), hwprofiles.load("nvidia-l4").runtime("onnxruntime"))
    assert gpu is not None and not gpu.usage and "CPU provider" in gpu.reason
    for made in (with_caches(model, KvSpec(keys="int8(group=12)")), with_caches(model, KvSpec(values="int4(group=1)"))):
        with pytest.raises(UnsupportedError, match=r"runs of 12? do not divide"):  # the plan, before any work
            target.predict_bytes(model.structure.layers.values(), made, PROFILE)
        with pytest.raises(UnsupportedError, match=r"runs of 12? do not divide"):
            cache_codes.of_layer(made.kv[0], {}, 16, 0)
    with pytest.raises(UnsupportedError, match="15 channels"):
        cache_codes.of_layer(INT4, {name: torch.ones(2, 15) for name in INT4.wants}, 15, 0)


def test_an_artifact_with_codes_is_verified_and_generates(model: Model, tmp_path: Path) -> None:
    artifact = compress.export(Pipeline(KvQuant()).run(model), profile=PROFILE, out=tmp_path / "out")
    found = compress.verify(artifact.folder)
    assert found.agrees and any(ROUNDED in note and "values of its codes" in note for note in found.notes)
    engine = compress.load(artifact.folder)
    rows = engine.generate([[1, 2, 3], [5] * 20], max_new_tokens=16).rows
    assert [len(row.tokens) for row in rows] == [16, 16] and engine.placement.file.endswith(ROUNDED)
    again = engine.generate([[1, 2, 3], [5] * 20], max_new_tokens=16).rows
    assert [row.tokens for row in rows] == [row.tokens for row in again]


def test_scales_that_data_give_go_into_the_graphs(model: Model, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("\n".join(" ".join(str(7 * row + at) for at in range(24)) for row in range(4)))
    data = calibrate(model, tmp_path / "ids.txt")
    static = KvQuant(keys="int8(channel)", values="int4(head)", static="minmax", float_layers=(0,))
    result = Pipeline(static).run(model, data, folder=tmp_path / "model")
    artifact = compress.export(result, profile=PROFILE, out=tmp_path / "out")
    found = compress.verify(artifact.folder)
    assert found.agrees and any("keys and values of other bits" in note for note in found.notes)
    session = GrowingSession(artifact.folder / "onnx", 1, graph=ROUNDED)
    codes = growing_check.stored(session)["past_key_values.1.key"]
    np.testing.assert_array_equal(codes.fixed, result.model.kv_tensors[1]["key_scale"].numpy())  # type: ignore[arg-type]
