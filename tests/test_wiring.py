"""Scale folding: which scale folds into what is found on any architecture, and nothing is folded that is not exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import compress
from compress.engine.blockpass import Block
from compress.engine.layer_stats import Stat
from compress.engine.stream import BlockStream
from compress.models.model import Model
from compress.models.skeleton import OUTER
from compress.passes.smoothquant import SmoothQuant
from compress.wiring.foldable import wire
from compress.wiring.folding import Bench
from helpers.blocks import block_of
from helpers.models import SPECIAL, UNGROUPED, tokens

SIZES = {**UNGROUPED, **SPECIAL, "num_hidden_layers": 1}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "eos_token_id": 2}
LOCAL = {"local_attention": 8, "global_attn_every_n_layers": 1, "cls_token_id": 1, "sep_token_id": 2}
MIXTURE = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 16}
SHARED = {**MIXTURE, "shared_expert_intermediate_size": 16}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = {
    "input_layernorm": QKV,
    "self_attn.v_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}
EXPERTS = {f"mlp.experts.gate_up_proj.{index}": (f"mlp.experts.down_proj.{index}",) for index in range(4)}
FIRST = tuple(EXPERTS)
ATTENTION = {"input_layernorm": QKV, "self_attn.v_proj": ("self_attn.o_proj",)}
# config class, its settings, producer → consumers of the block
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, tuple[str, ...]]]] = {
    "llama": ("LlamaConfig", GROUPED, GATED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 16}, GATED),
    "gemma3": (
        "Gemma3TextConfig",
        {**GROUPED, "head_dim": 16, "sliding_window": 5, "layer_types": ["sliding_attention"]},
        {**GATED, "pre_feedforward_layernorm": GATED["post_attention_layernorm"], "post_attention_layernorm": ()},
    ),
    "phi3": (
        "Phi3Config",
        GROUPED,
        {
            "input_layernorm": ("self_attn.qkv_proj",),
            "self_attn.qkv_proj": ("self_attn.o_proj",),
            "post_attention_layernorm": ("mlp.gate_up_proj",),
            "mlp.gate_up_proj": ("mlp.down_proj",),
        },
    ),
    "gpt2": ("GPT2Config", GPT2, {"ln_1": ("attn.c_attn",), "attn.c_attn": ("attn.c_proj",), "ln_2": ("mlp.c_fc",)}),
    "opt": (
        "OPTConfig",
        {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32},
        {
            "self_attn_layer_norm": QKV,
            "self_attn.v_proj": ("self_attn.out_proj",),
            "final_layer_norm": ("fc1",),
            "fc1": ("fc2",),  # through ReLU, which a positive scale passes
        },
    ),
    "mixtral": (
        "MixtralConfig",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        {**ATTENTION, "post_attention_layernorm": FIRST, **EXPERTS},
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {**GROUPED, "head_dim": 8, **MIXTURE},
        {**ATTENTION, "post_attention_layernorm": FIRST, **EXPERTS},
    ),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {**GROUPED, **SHARED},
        {
            **ATTENTION,
            "post_attention_layernorm": (
                *("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
                *FIRST,
                "mlp.shared_expert_gate",
            ),
            "mlp.shared_expert.up_proj": ("mlp.shared_expert.down_proj",),
            **EXPERTS,
        },
    ),
    "bert": ("BertConfig", SIZES, {"attention.self.value": ("attention.output.dense",)}),
    "modernbert": (
        "ModernBertConfig",
        {**SIZES, **LOCAL},
        {"mlp_norm": ("mlp.Wi",), "mlp.Wi": ("mlp.Wo",), "attn.Wqkv": ("attn.Wo",)},
    ),
}
ENCODERS = ("bert", "modernbert")


@pytest.fixture(scope="module")
def model_of(save_random: Callable[..., Path]) -> Callable[[str], Model]:
    """The model of a family, with random weights; the same one each time."""
    made: dict[str, Model] = {}

    def make(name: str) -> Model:
        if name not in made:
            config, settings, _ = FAMILIES[name]
            maker = "AutoModel" if name in ENCODERS else "AutoModelForCausalLM"
            made[name] = compress.load(save_random(f"wiring-{name}", getattr(transformers, config)(**settings), maker))
        return made[name]

    return make


def first_block(model: Model) -> tuple[Block, BlockStream]:
    """The first block, loaded, with every layer chosen and its statistics."""
    stream = BlockStream(model, [tokens()])
    stream.start(model.layers(OUTER))
    layers, plain = model.layers(0), model.plain(0)
    stream.load(0, layers, plain)
    stats = stream.collect(0, list(layers), {Stat.HESSIAN, Stat.ABS_MEAN, Stat.ABS_MAX})
    chosen = {name: SmoothQuant() for name in layers}
    return block_of(model.structure.blocks[0], layers, plain, stream.runner(0), chosen, stats), stream


@pytest.mark.parametrize("name", list(FAMILIES))
def test_each_family_is_wired_as_its_code_says(name: str, model_of: Callable[[str], Model]) -> None:
    block, _ = first_block(model_of(name))
    wiring = wire(block, pairs=True)
    found: dict[str, tuple[str, ...]] = {}
    for folding in wiring.foldings:
        producer = folding.producer.removeprefix(f"{block.name}.")
        found[producer] = tuple(one.removeprefix(f"{block.name}.") for one in folding.consumers)
    assert {key: sorted(value) for key, value in found.items()} == {
        key: sorted(value) for key, value in FAMILIES[name][2].items() if value
    }
    consumers = {one for folding in wiring.foldings for one in folding.consumers}
    assert set(wiring.refused) == set(block.layers) - consumers and all(wiring.refused.values())
    norms = wire(block, pairs=False).foldings
    assert [one.producer for one in norms] == [one.producer for one in wiring.foldings if one.offset is not None]


@pytest.mark.parametrize("name", list(FAMILIES))
def test_any_scale_folded_in_leaves_the_block_as_it_was(name: str, model_of: Callable[[str], Model]) -> None:
    block, stream = first_block(model_of(name))
    runner = block.runner
    assert runner is not None
    before = runner.forward(0)
    bench, maker = Bench(block), torch.Generator().manual_seed(1)
    for folding in wire(block, pairs=True).foldings:
        bench.fold(folding, torch.exp(2 * torch.rand(folding.channels, generator=maker) - 1))
    stream.load(0, {**block.layers, **bench.changed}, {**block.plain, **bench.changed_plain})
    torch.testing.assert_close(runner.forward(0), before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    assert any(
        not torch.equal(bench.layer(one).float_weight(), block.layers[one].float_weight()) for one in block.layers
    )
    found = stream.collect(0, list(block.stats), {Stat.HESSIAN, Stat.ABS_MEAN, Stat.ABS_MAX})
    for one, stats in found.items():  # statistics that were carried along are those of the block as it now is
        for key in ("hessian", "abs_mean", "abs_max"):
            now, carried = getattr(stats, key), getattr(bench.stats[one], key)
            torch.testing.assert_close(carried, now, rtol=1e-3, atol=1e-4 * float(now.abs().max()))


def test_looking_for_foldings_leaves_the_loaded_block_as_it_was(model_of: Callable[[str], Model]) -> None:
    block, _ = first_block(model_of("mixtral"))
    runner = block.runner
    assert runner is not None
    before = {key: value.clone() for key, value in runner.module.state_dict().items()}
    wire(block, pairs=True)
    after = runner.module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    hooks = [
        hook for module in runner.module.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)
    ]
    assert not hooks


def test_a_post_norm_is_refused_by_its_name_and_so_is_what_no_norm_feeds(model_of: Callable[[str], Model]) -> None:
    block, _ = first_block(model_of("bert"))
    wiring = wire(block, pairs=False)
    assert not wiring.foldings
    assert (
        "attention.output.LayerNorm puts out goes elsewhere too" in wiring.refused["encoder.layer.0.intermediate.dense"]
    )
    assert "no norm of this block feeds it" in wiring.refused["encoder.layer.0.attention.self.query"]


def test_a_value_row_is_found_for_each_query_head_of_its_group(model_of: Callable[[str], Model]) -> None:
    block, _ = first_block(model_of("llama"))
    found = {one.producer: one for one in wire(block, pairs=True).foldings}
    rows = found[f"{block.name}.self_attn.v_proj"].rows
    expected = [(head // 2) * 8 + place for head in range(4) for place in range(8)]  # 4 heads of 8, 2 of them values'
    assert rows.tolist() == expected
    assert found[f"{block.name}.mlp.up_proj"].rows.tolist() == list(range(64))


def test_the_part_of_a_fused_layer_that_scales_is_found(model_of: Callable[[str], Model]) -> None:
    block, _ = first_block(model_of("phi3"))
    found = {one.producer: one for one in wire(block, pairs=True).foldings}
    values = found[f"{block.name}.self_attn.qkv_proj"].rows  # 32 rows of queries, 16 of keys, then the values
    assert values.min() == 48 and values.unique().numel() == 16
    assert found[f"{block.name}.mlp.gate_up_proj"].rows.tolist() == list(range(64, 128))


@pytest.mark.parametrize(("name", "offset"), [("llama", 0.0), ("gemma3", 1.0), ("gpt2", 0.0)])
def test_what_a_norm_adds_to_its_weight_is_found(name: str, offset: float, model_of: Callable[[str], Model]) -> None:
    block, _ = first_block(model_of(name))
    assert {one.offset for one in wire(block, pairs=False).foldings} == {offset}


def test_routers_are_wired_though_they_are_no_layers(model_of: Callable[[str], Model]) -> None:
    block, _ = first_block(model_of("mixtral"))
    found = {one.producer: one for one in wire(block, pairs=False).foldings}
    assert found[f"{block.name}.post_attention_layernorm"].plain == (f"{block.name}.mlp.gate.weight",)
