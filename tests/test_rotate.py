"""A rotated model puts out what it did, from weights without outliers; what cannot be rotated is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import compress
from compress import hwprofiles
from compress.engine.blockpass import Block
from compress.engine.journal import Journal
from compress.engine.store import open_store
from compress.engine.stream import BlockStream
from compress.errors import Interrupted, UnsupportedError, UsageError
from compress.export.onnx import target
from compress.export.onnx.runtime import Session
from compress.maths.rotation import rotation
from compress.models.model import Model
from compress.models.skeleton import OUTER
from compress.passes import Rotate, Rtn
from compress.pipeline import Pipeline
from compress.plan import make_plan
from compress.quality.evaluate import stream_logits
from compress.quality.verification import agreement
from compress.recipe import of_passes
from compress.wiring.heads import find_heads

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TIED = {"tie_word_embeddings": True}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "llama-tied-bfloat16": ("LlamaConfig", {**GROUPED, **TIED, "dtype": torch.bfloat16}),
    "llama-with-biases": ("LlamaConfig", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "odd-width": ("LlamaConfig", {**GROUPED, "hidden_size": 44, "head_dim": 12}),
    "gemma": ("GemmaConfig", {**GROUPED, "head_dim": 16}),  # gains of 1 + weight, scaled embeddings, tied
    "granite": ("GraniteConfig", {**GROUPED, **TIED, "residual_multiplier": 0.3, "embedding_multiplier": 7.0}),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "phi3": ("Phi3Config", GROUPED),  # queries, keys and values in one layer
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3MoeConfig", {**GROUPED, "head_dim": 8, **EXPERTS}),
    "qwen2-moe": ("Qwen2MoeConfig", {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "nanochat": ("NanoChatConfig", GROUPED),  # norms without weights
    "gpt2": ("GPT2Config", {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "olmo": ("OlmoConfig", GROUPED),  # LayerNorms without weights
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 16, "layer_types": ["full_attention"] * 2}),
    "bert": ("BertConfig", {**SIZES, "is_decoder": True}),
}
REFUSED = {
    "gpt2": r"transformer\.ln_f \(LayerNorm\) is no RMSNorm",
    "olmo": r"What enters lm_head follows the hidden states otherwise than through an RMSNorm",
    "gemma3": r"model\.layers\.0\.self_attn\.o_proj puts out is not simply added",
    "bert": r"cls\.predictions \(BertLMPredictionHead\) reads the hidden states",
}
ROTATED = [name for name in FAMILIES if name not in REFUSED]


@pytest.fixture(scope="module")
def model_of(save_random: Callable[..., Path]) -> Callable[[str], Model]:
    """The model of a family, with random weights, and gains of norms that differ; the same one each time."""
    made: dict[str, Model] = {}

    def make(name: str) -> Model:
        if name not in made:
            config, settings = FAMILIES[name]
            made[name] = compress.load(save_random(f"rotate-{name}", getattr(transformers, config)(**settings)))
        return made[name]

    return make


def logits(model: Model) -> torch.Tensor:
    ids = torch.randint(3, 96, (3, 20), generator=torch.Generator().manual_seed(0))
    return torch.stack(list(stream_logits(model, ids)))


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm((found - wanted).double()) / torch.linalg.vector_norm(wanted.double()))


def weight(model: Model, name: str) -> torch.Tensor:
    return model.layer(model.structure.layers[name]).float_weight().double()


@pytest.mark.parametrize("name", ROTATED)
def test_the_logits_stay_as_they_were(name: str, model_of: Callable[[str], Model]) -> None:
    model = model_of(name)
    result = Pipeline(Rotate()).run(model)
    assert distance(logits(result.model), logits(model)) < 1e-5
    notes = [note for row in result.passes[0].layers for note in row.notes]
    assert bool(notes) == (name == "odd-width") and all(row.changed for row in result.passes[0].layers)
    for layer, spec in model.structure.layers.items():
        assert distance(weight(result.model, layer), weight(model, layer)) > 0.1, layer
        assert result.model.structure.layers[layer].shape == spec.shape


@pytest.mark.parametrize("settings", [{"r1": "random"}, {"r2": False}, {"r1": "none"}])
def test_each_rotation_alone_leaves_the_logits_too(settings: dict[str, Any], model_of: Callable[[str], Model]) -> None:
    model = model_of("llama-with-biases")
    result = Pipeline(Rotate(**settings)).run(model)
    assert distance(logits(result.model), logits(model)) < 1e-5
    changed = {row.layer.rpartition(".")[2] for row in result.passes[0].layers if row.changed}
    assert (changed == {"v_proj", "o_proj"}) == ("none" in settings.values())
    assert all(row.reason for row in result.passes[0].layers if not row.changed)


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_be_rotated_is_refused_by_name(name: str, model_of: Callable[[str], Model]) -> None:
    with pytest.raises(UnsupportedError, match=REFUSED[name]):
        Pipeline(Rotate()).run(model_of(name))


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "bert"])
def test_where_hidden_states_cannot_be_rotated_values_can(name: str, model_of: Callable[[str], Model]) -> None:
    result = Pipeline(Rotate(r1="none")).run(model_of(name))
    assert distance(logits(result.model), logits(model_of(name))) < 1e-5
    assert sum(row.changed for row in result.passes[0].layers) == 4


def test_an_encoder_is_refused_since_its_hidden_states_are_its_output(save_random: Callable[..., Path]) -> None:
    folder = save_random("headless", transformers.MistralConfig(**GROUPED), "AutoModel")
    with pytest.raises(UnsupportedError, match="output is the hidden states themselves"):
        Pipeline(Rotate()).run(compress.load(folder))


def test_an_image_classifier_is_refused(cnn: str) -> None:
    with pytest.raises(UnsupportedError, match="image classifier"):
        Pipeline(Rotate()).run(compress.load(cnn))


def test_what_is_added_to_the_embedding_is_noticed(
    model_of: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = torch.nn.functional.embedding
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda self, ids: plain(ids, self.weight) + 1.0)
    with pytest.raises(UnsupportedError, match=r"not the embedding times a number: .*\(model\.norm\.weight\)"):
        Pipeline(Rotate()).run(model_of("llama"))


def test_a_block_that_does_more_than_its_weights_show_is_refused(
    model_of: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: plain(self, x) + x.abs())
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0 does not add|model\.layers\.0 does not put out"):
        Pipeline(Rotate()).run(model_of("llama"))


def test_weights_are_the_products_in_float64_rounded_once(model_of: Callable[[str], Model]) -> None:
    model = model_of("llama-tied-bfloat16")
    turned = Pipeline(Rotate(seed=5, r2=False)).run(model).model
    turn = rotation(32, "hadamard", torch.Generator().manual_seed(5)).matrix()
    plain, outer = model.plain(0), model.plain(OUTER)
    block = "model.layers.0"
    expected = {
        f"{block}.self_attn.q_proj": (block + ".input_layernorm.weight", None),
        f"{block}.mlp.up_proj": (block + ".post_attention_layernorm.weight", None),
        f"{block}.self_attn.o_proj": ("", None),
        f"{block}.mlp.down_proj": ("", None),
    }
    for name, (gain, _) in expected.items():
        before = weight(model, name)
        wanted = (before * plain[gain].double()) @ turn if gain else turn.T @ before
        assert distance(weight(turned, name), wanted) < 4e-8, name  # half a unit in the last place of float32
    table = weight(model, "model.embed_tokens")
    assert distance(weight(turned, "model.embed_tokens"), table @ turn) < 4e-8
    assert distance(weight(turned, "lm_head"), table * outer["model.norm.weight"].double() @ turn) < 4e-8
    assert all(bool((gain == 1).all()) for gain in (*turned.plain(0).values(), *turned.plain(OUTER).values()))


def test_heads_of_values_turn_each_for_itself(model_of: Callable[[str], Model]) -> None:
    model = model_of("llama")
    turned = Pipeline(Rotate(r1="none")).run(model).model
    values, outputs = (f"model.layers.0.self_attn.{name}_proj" for name in "vo")
    before, after = weight(model, values).reshape(2, 8, 32), weight(turned, values).reshape(2, 8, 32)
    turns = [new @ torch.linalg.pinv(old) for old, new in zip(before, after, strict=True)]
    for turn in turns:
        assert torch.allclose(turn @ turn.T, torch.eye(8).double(), atol=1e-5)
    assert not torch.allclose(turns[0], turns[1], atol=1e-2)
    both = torch.block_diag(*(turns[place // 2] for place in range(4)))  # two query heads read one head of values
    assert distance(weight(turned, outputs), weight(model, outputs) @ both.T) < 1e-5


def test_heads_of_another_size_than_the_attentions_are_noticed(model_of: Callable[[str], Model]) -> None:
    model = model_of("llama")
    stream = BlockStream(model, [torch.arange(3, 19)[None]])
    stream.start(model.layers(OUTER))
    layers, plain = model.layers(0), model.plain(0)
    stream.load(0, layers, plain)
    block = Block("model.layers.0", layers, layers, {}, plain, {}, stream.runner(0))
    maker = torch.Generator().manual_seed(0)
    found = find_heads(block, 8, rotation(8, "hadamard", maker))
    assert found is not None and (found.count, found.places.tolist()) == (2, [0, 0, 1, 1])
    assert find_heads(block, 16, rotation(16, "hadamard", maker)) is None


def test_an_outlier_channel_is_spread_over_all(make_llama: Callable[..., Path]) -> None:
    model = compress.load(make_llama("outlier"))
    name = "model.layers.0.mlp.down_proj"
    matrix = weight(model, name).float()
    matrix[7] *= 40
    rotated = rotation(64, "hadamard", torch.Generator().manual_seed(0))(matrix.T).T
    peaks = [float(one.abs().amax() / one.square().mean().sqrt()) for one in (matrix, rotated)]
    assert peaks[1] < peaks[0] / 2


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(model_of: Callable[[str], Model]) -> None:
    model = model_of("llama")
    first, again, other = (Pipeline(Rotate(seed=seed)).run(model).model.digest for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ("rotate(targets=['*q_proj'])", "takes no targets"),
        ("rotate(r1=none, r2=false)", "nothing to do"),
        ("rtn, rotate", "rotate must come before rtn"),
        ("act_quant, rotate", "rotate must come before act_quant"),
        ("rtn(targets=[kind:head]), rotate", "rotate must come before rtn"),
    ],
)
def test_what_makes_no_sense_is_refused(recipe: str, sentence: str, model_of: Callable[[str], Model]) -> None:
    with pytest.raises(UsageError, match=sentence):
        Pipeline.parse(recipe).run(model_of("llama"))


def test_a_tied_head_gets_a_weight_of_its_own_in_plan_and_store(
    model_of: Callable[[str], Model], tmp_path: Path
) -> None:
    model = model_of("llama-tied-bfloat16")
    profile = hwprofiles.load("cpu-x86-avx512-vnni")
    recipe = of_passes("rotate, rtn(format=int8(group=16))")
    plan, without = (
        make_plan(model, recipe, profile),
        make_plan(model, of_passes("rtn(format=int8(group=16))"), profile),
    )
    rows = {row.layer: row for row in plan.layers}
    assert rows["lm_head"].stored_bytes == rows["model.embed_tokens"].stored_bytes == 96 * 32 * 4
    assert "lm_head" not in {row.layer for row in without.layers}
    assert plan.predicted_artifact_bytes > without.predicted_artifact_bytes
    assert any("lm_head no longer shares its weight" in warning for warning in plan.warnings)
    result = Pipeline(Rotate()).run(model, folder=tmp_path / "model")
    assert result.untied == ("lm_head",)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is False
    again = open_store(tmp_path / "model")
    assert again.structure.layers["lm_head"].users == ("lm_head",) and not again.structure.aliases
    assert distance(logits(again), logits(model)) < 1e-5


def test_a_run_that_was_stopped_after_the_rotation_ends_in_the_same_bytes(
    model_of: Callable[[str], Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pipeline = model_of("llama-tied-bfloat16"), Pipeline(Rotate(), Rtn(format="int8(group=16)"))
    clean = pipeline.run(model, folder=tmp_path / "clean")
    with monkeypatch.context() as patch:
        patch.setattr(Rtn, "layer", lambda *_: (_ for _ in ()).throw(Interrupted("stopped here")))
        with pytest.raises(Interrupted):
            pipeline.run(model, folder=tmp_path / "again", journal=Journal(tmp_path / "journal"))
    monkeypatch.setattr(Rotate, "apply", None)
    resumed = pipeline.run(model, folder=tmp_path / "again", journal=Journal(tmp_path / "journal"))
    assert resumed.model.digest == clean.model.digest
    assert len(resumed.passes[0].layers) == len(clean.passes[0].layers)


def test_the_exported_graph_computes_what_the_rotated_model_does(
    model_of: Callable[[str], Model], tmp_path: Path
) -> None:
    profile = hwprofiles.load("cpu-x86-avx512-vnni")
    runtime = profile.runtimes["onnxruntime"]
    formats = tuple(entry.model_copy(update={"accuracy_level": None}) for entry in runtime.formats)  # exact kernels
    profile = profile.model_copy(update={"runtimes": {"onnxruntime": runtime.model_copy(update={"formats": formats})}})
    result = Pipeline.parse("rotate, rtn(format=int8(group=16))").run(model_of("llama-tied-bfloat16"))
    written = target.write(result.model, profile, tmp_path / "onnx", target.capture(result.model, profile))
    ids = torch.randint(3, 96, (16, 32), generator=torch.Generator().manual_seed(0))
    found = agreement(Session(written.folder, 1), result.model, ids, written.bounds)
    assert found.agrees and found.max_relative_difference < 1e-4, found
