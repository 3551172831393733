"""Passes about the cache: kept with the model, run by the target native, refused by runtimes that keep their own."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, GPTJConfig

import compress
from compress.__main__ import main
from compress.engine import store
from compress.errors import InputError, UnsupportedError, UsageError
from compress.kv.spec import KvSpec
from compress.models.model import Model
from compress.passes import KvEvict, KvQuant, Rtn, find
from compress.pipeline import Pipeline, planned_caches
from compress.report.speed_rows import footprint_table
from compress.report.verdict import verdict_sentence
from helpers.reports import speed_of

PROFILE = "cpu-x86-avx2"


@pytest.fixture(scope="module")
def model(llama: Path) -> Model:
    return compress.load(llama)


def test_the_store_says_how_each_layer_is_cached(model: Model, tmp_path: Path) -> None:
    passes = (KvQuant(float_layers=(0,)), Rtn(bits=8, group_size=32), KvEvict(budget=64, by="key_norm"))
    result = Pipeline(*passes).run(model, folder=tmp_path / "model")
    evicting = {"scorer": "key_norm", "budget": 64}
    quantized = {"keys": "int8(token)", "values": "int8(token)", **evicting}
    assert [spec.as_data() for spec in result.model.kv] == [evicting, quantized, quantized]
    assert store.open_store(tmp_path / "model").kv == result.model.kv
    rows = result.passes[2].layers
    assert [row.layer for row in rows] == [f"model.layers.{index}.cache" for index in range(3)]
    assert rows[1].format == "int8(token) keys, int8(token) values, 64 tokens by key_norm"


@pytest.mark.parametrize("dropped", ["blocks=[1]", "blocks=[1], what=attention"])
def test_a_cache_goes_with_its_block_when_others_leave(dropped: str, model: Model, tmp_path: Path) -> None:
    recipe = f"kv_quant(float_layers=[2]), drop_blocks({dropped}), kv_evict(budget=64, by=key_norm)"
    result = Pipeline.parse(recipe).run(model, folder=tmp_path / "model")
    evicting = {"scorer": "key_norm", "budget": 64}
    quantized = {"keys": "int8(token)", "values": "int8(token)", **evicting}
    assert [spec.as_data() for spec in result.model.kv] == [quantized, evicting]
    assert store.open_store(tmp_path / "model").kv == result.model.kv
    assert [row.format for row in result.passes[0].layers][2] == "float keys, float values"


def test_weights_are_as_without_it(model: Model) -> None:
    rtn = Rtn(bits=8, group_size=32)
    with_cache, alone = Pipeline(rtn, KvEvict(budget=64)).run(model), Pipeline(rtn).run(model)
    assert with_cache.model.digest == alone.model.digest


def test_a_runtime_with_a_cache_of_its_own_refuses(model: Model, tmp_path: Path) -> None:
    result = Pipeline(KvEvict(budget=64)).run(model)
    with pytest.raises(UnsupportedError, match="--target native"):
        compress.export(result, profile=PROFILE, target="openvino", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("passes", "told"),
    [
        ("kv_evict(budget=64), kv_evict(budget=96)", "both say which tokens are attended to"),
        ("kv_quant, kv_quant(keys=int4(group=8))", "both say what is stored"),
        ("kv_quant(targets=[*])", "takes no targets"),
        ("kv_quant(keys=null, values=null)", "leave all in float"),
        ("kv_quant(float_layers=[0, 3])", "names layer 3; the model that it meets has caches 0 to 2"),
        ("drop_blocks(blocks=[0]), kv_quant(float_layers=[2])", "has caches 0 to 1"),
        ("rtn, kv_quant(residual=32, float_layers=[0]), kv_evict", "single ones cannot be dropped"),
        ("kv_evict(budget=20)", "leaves nothing to choose"),
        ("kv_quant(keys=int4(group=12))", "heads have 16 channels, which runs of 12 do not divide"),
        ("kv_quant(values=int8(group=32))", "heads have 16 channels, which runs of 32 do not divide. Give group=8, 16"),
        ("kv_evict(budget=64, by=streaming, heads=adaptive)", "streaming scores alike for all heads"),
        ("kv_evict(budget=64, layers=pyramid), drop_blocks(blocks=[0])", "Move it behind drop_blocks"),
        ("kv_evict(budget=64, by=kvzap, labels=attention, by_age=true, heads=adaptive)", "in its own unit"),
        ("kv_quant(values=int8(channel), static=minmax, envelope=false)", "static scales of keys"),
        ("kv_evict(budget=64, by=tova, decay=0.9)", "are of by=h2o"),
        ("kv_quant(keys=int8(tensor))", "come one by one"),
        ("kv_quant(keys=int2(group=16, float_zero), keys_by=channel, residual=16), kv_evict(budget=64)", "dropped"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(passes: str, told: str, model: Model) -> None:
    with pytest.raises(UsageError, match=told):
        Pipeline.parse(passes).run(model)


def test_what_is_shared_out_over_all_layers_comes_after_blocks_left(model: Model) -> None:
    for shared in ("kv_quant(sensitive=1)", "kv_evict(budget=64, layers=measured)"):
        with pytest.raises(UsageError, match="Move it behind drop_blocks"):
            Pipeline.parse(f"{shared}, drop_blocks(blocks=[0])").lay(model)
        Pipeline.parse(f"drop_blocks(blocks=[0]), {shared}").lay(model)


def test_a_model_that_generates_nothing_has_no_cache(save_random: Callable[..., Path]) -> None:
    config = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    bert = save_random("bert-uncached", config, "AutoModel")
    with pytest.raises(UnsupportedError, match="generates nothing"):
        Pipeline(KvEvict(budget=64)).run(compress.load(bert))


def test_a_model_that_attends_by_code_of_its_own_is_refused_before_any_work(save_random: Callable[..., Path]) -> None:
    settings = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 32}
    model = compress.load(save_random("gptj-cached", GPTJConfig(**settings, bos_token_id=1, eos_token_id=2)))
    with pytest.raises(UnsupportedError, match=r"^kv_evict: GPTJForCausalLM has an attention of its own"):
        Pipeline(KvEvict(budget=64)).lay(model)


def test_text_parses_back(model: Model) -> None:
    for text in ("kv_evict(budget=64, by=key_norm)", "kv_quant(keys=int4(group=8), values=null, float_layers=[0])"):
        assert str(Pipeline.parse(text)) == text
        assert find(text.partition("(")[0]).caches


def test_native_runs_the_model_with_its_cache(model: Model, tmp_path: Path) -> None:
    result = Pipeline(KvQuant(), KvEvict(budget=16, sinks=2, recent=4, chunk=8)).run(model)
    artifact = compress.export(result, profile=PROFILE, target="native", out=tmp_path / "out")
    session = artifact.session()
    ids = np.random.default_rng(0).integers(1, 256, (1, 40))
    plain, through = session.plain.logits(ids), session.logits(ids)
    # nothing is dropped or read back rounded before the second token
    np.testing.assert_allclose(plain[:, 0], through[:, 0], rtol=1e-4, atol=1e-5)
    assert np.abs(plain[:, 30:] - through[:, 30:]).max() > 1e-3
    tokens, size = session.cache_use()
    assert tokens == 128 and size < 3 * 2 * 2 * 17 * (16 + 2) + 3 * 2 * 17 * 13
    expected = session.greedy(ids[0].tolist(), 8)
    assert len(expected) == 8 and session.greedy(ids[0].tolist(), 8) == expected
    call = session.call(ids[:, :1], 64)
    for _ in range(3):
        call()
    assert session.greedy(ids[0].tolist(), 8) == expected


def test_native_runs_codebooks_with_a_compressed_cache(model: Model, tmp_path: Path) -> None:
    result = Pipeline.parse("rtn(format=codebook(vector=2, entries=16)), kv_evict(budget=64)").run(model)
    artifact = compress.export(result, profile=PROFILE, target="native", out=tmp_path / "out")
    session = artifact.session()
    ids = np.random.default_rng(0).integers(1, 256, (1, 12))
    np.testing.assert_allclose(session.logits(ids), session.plain.logits(ids), rtol=0.1, atol=0.1)
    assert session.greedy(ids[0].tolist(), 4) == session.greedy(ids[0].tolist(), 4)


def test_a_store_with_caches_for_other_layers_is_refused(model: Model, tmp_path: Path) -> None:
    Pipeline(KvEvict(budget=64)).run(model, folder=tmp_path / "model")
    path = tmp_path / "model" / "structure.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "kv": info["kv"][:2]}))
    with pytest.raises(InputError, match="2 caches"):
        store.open_store(tmp_path / "model")
    path.write_text(json.dumps({**info, "kv": [{"scorer": "guess"}] * 3}))
    with pytest.raises(InputError, match="malformed"):
        store.open_store(tmp_path / "model")


def test_batches_of_prompts_of_unlike_length_generate_as_alone(model: Model, tmp_path: Path) -> None:
    result = Pipeline(KvEvict(budget=16, by="key_norm", sinks=2, recent=4, chunk=1)).run(model)
    engine = compress.export(result, profile=PROFILE, target="native", out=tmp_path / "out")
    torch.manual_seed(0)
    rows = [torch.randint(1, 256, (count,)).tolist() for count in (30, 22)]
    from compress.export.native import target

    session = target.session(tmp_path / "out" / "native", 1)
    runner = target.runner(session, tmp_path / "out" / "native")
    width = max(map(len, rows))
    ids = np.array([[0] * (width - len(row)) + row for row in rows], np.int64)
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows], np.int64)
    together = runner.start(ids, mask)
    for place, row in enumerate(rows):
        alone = target.runner(session, tmp_path).start(np.array([row]), np.ones((1, len(row)), np.int64))
        np.testing.assert_allclose(together[place], alone[0], rtol=1e-3, atol=1e-4)
    assert engine.model().kv == (KvSpec(scorer="key_norm", budget=16, sinks=2, recent=4, chunk=1),) * 3


def test_the_verdict_and_the_footprint_tell_the_bytes_of_the_cache() -> None:
    speed = speed_of()
    variant = speed.variant.model_copy(update={"cache_tokens": 512, "cache_bytes": 42_000})
    baseline = speed.baseline.model_copy(update={"cache_tokens": 512, "cache_bytes": 655_000})
    told = speed.model_copy(update={"baseline": baseline, "variant": variant})
    sentence = verdict_sentence(source_bytes=10, artifact_bytes=10, speed=told)
    assert "the cache of 512 tokens 15.6x smaller (42 kB from 655 kB)" in sentence
    assert "cache" not in verdict_sentence(source_bytes=10, artifact_bytes=10, speed=speed)
    assert footprint_table(told).columns[-1] == "cache" and "cache" not in footprint_table(speed).columns


def test_the_plan_keeps_the_caches_of_the_blocks_that_are_left(model: Model) -> None:
    for text in ("kv_quant(float_layers=[0]), drop_blocks(blocks=[1])", "drop_blocks(blocks=[1]), kv_quant"):
        pipeline = Pipeline.parse(text)
        planned = planned_caches(pipeline.passes, pipeline.lay(model))
        assert planned == pipeline.run(model).model.kv
        assert len(planned) == 2
    pipeline = Pipeline.parse("rtn(format=int8(group=32))")
    assert planned_caches(pipeline.passes, pipeline.lay(model)) == ()


@pytest.mark.parametrize(
    ("passes", "told"), [("kv_quant, rtn", "a cache of its own"), ("kv_evict(budget=20)", "leaves nothing to choose")]
)
def test_what_no_installed_tool_and_no_model_changes_is_told_first(
    passes: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the runtime nor the model need be there."""
    text = tmp_path / "text.txt"
    text.write_text("words")
    given = ["run", str(tmp_path / "absent"), "--passes", passes, "--target", "openvino", "--data", str(text)]
    assert main([*given, "-p", PROFILE, "-o", str(tmp_path / "out")]) in (2, 4)
    assert told in " ".join(capsys.readouterr().err.split())
