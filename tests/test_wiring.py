"""Scale folding: which scale folds into what is found on any architecture, and nothing is folded that is not exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import compress
from compress.blockpass import Block
from compress.collect import LayerStats, Stat
from compress.errors import UsageError
from compress.folding import Bench, Folding, agreed, fold, rescaled_stats
from compress.formats import parse_format
from compress.layer import ActSpec, Layer, LayerKind
from compress.model import Model
from compress.passes.rtn import Rtn
from compress.passes.smoothquant import SmoothQuant
from compress.skeleton import OUTER
from compress.stream import BlockStream
from compress.wiring import Wiring, wire

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
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


def tokens(rows: int = 4, length: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def first_block(model: Model) -> tuple[Block, BlockStream]:
    """The first block, loaded, with every layer chosen and its statistics."""
    stream = BlockStream(model, [tokens()])
    stream.start(model.layers(OUTER))
    layers, plain = model.layers(0), model.plain(0)
    stream.load(0, layers, plain)
    stats = stream.collect(0, list(layers), {Stat.HESSIAN, Stat.ABS_MEAN, Stat.ABS_MAX})
    chosen = {name: SmoothQuant() for name in layers}
    return block_of(model.structure.blocks[0], layers, plain, stream.runner(0), chosen, stats), stream


def block_of(name: str, layers: Any, plain: Any, runner: Any, chosen: Any = None, stats: Any = None) -> Block:
    return Block(
        name=name, layers=layers, source=layers, chosen=chosen or {}, plain=plain, stats=stats or {}, runner=runner
    )


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


class Norm(nn.Module):
    """RMS over the last axis, times a weight, perhaps through something else."""

    def __init__(self, width: int, after: Callable[[torch.Tensor], torch.Tensor] = lambda values: values) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.after = after

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = self.after(
            values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-6) * self.weight
        )
        return scaled


class Other(nn.Module):
    """Reads its input with a weight of three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values @ self.weight[0]


class Hand(nn.Module):
    """norm → first → act → second, with a residual; `extra` adds what an architecture might."""

    def __init__(
        self,
        act: Callable[[torch.Tensor], torch.Tensor] = torch.relu,
        extra: Callable[[Hand, torch.Tensor], torch.Tensor] | None = None,
        after: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = Norm(8, after)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)
        self.other = Other()
        self.act, self.extra = act, extra

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden)
        result = hidden + self.second(self.act(self.first(normed)))
        return result if self.extra is None else result + self.extra(self, normed)


@dataclass
class HandRunner:
    """A hand-made block as a block pass sees it."""

    module: nn.Module
    root: nn.Module
    batches: int = 1

    def inputs(self, place: int) -> torch.Tensor:
        return torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(place))

    def targets(self, place: int) -> torch.Tensor:
        return self.forward(place)

    def forward(self, place: int, hidden: torch.Tensor | None = None) -> torch.Tensor:
        result: torch.Tensor = self.module(self.inputs(place) if hidden is None else hidden)
        return result


def by_hand(module: Hand, **changes: Layer) -> Block:
    """The block `b` of a tree that holds only it; changes: layers by their last name."""
    root = nn.ModuleDict({"b": module.requires_grad_(False)})
    layers = {
        f"b.{key}": Layer(f"b.{key}", LayerKind.LINEAR, child.weight.clone(), child.bias.clone(), users=(f"b.{key}",))
        for key, child in (("first", module.first), ("second", module.second))
    }
    layers |= {f"b.{key}": layer for key, layer in changes.items()}
    plain = {key: value.clone() for key, value in root.state_dict().items() if key.rpartition(".")[0] not in layers}
    return block_of("b", layers, plain, HandRunner(module, root))


def producers(wiring: Wiring) -> list[str]:
    return [folding.producer for folding in wiring.foldings]


def test_a_scale_passes_relu_but_no_smooth_activation() -> None:
    assert producers(wire(by_hand(Hand()), pairs=True)) == ["b.norm", "b.first"]
    assert producers(wire(by_hand(Hand(nn.functional.gelu)), pairs=True)) == ["b.norm"]


def test_a_channel_that_is_never_on_is_left_alone() -> None:
    module = Hand()
    module.first.bias.data[3] = -1e3  # ReLU keeps it at 0
    folding = wire(by_hand(module), pairs=True).foldings[1]
    assert folding.rows.tolist() == [0, 1, 2, -1, *range(4, 12)]
    scale = torch.full((12,), 4.0)
    assert folding.spread(folding.only_used(scale)).tolist() == [4.0] * 3 + [1.0] + [4.0] * 8


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (lambda _, normed: normed, "b.norm puts out goes elsewhere too"),
        (lambda _, normed: torch.tanh(normed.clone()), "b.norm puts out goes elsewhere too"),
        (lambda self, normed: normed @ self.norm.weight.diag(), "b.norm puts out goes elsewhere too"),
        (lambda self, normed: self.other(normed), "also feeds b.other, which has no weight to scale"),
    ],
)
def test_a_norm_with_another_reader_is_refused(extra: Any, sentence: str) -> None:
    wiring = wire(by_hand(Hand(extra=extra)), pairs=True)
    assert producers(wiring) == ["b.first"]
    assert sentence in wiring.refused["b.first"]


def test_a_norm_that_is_no_gain_is_refused() -> None:
    wiring = wire(by_hand(Hand(after=torch.tanh)), pairs=False)
    assert not wiring.foldings and "b.norm, which feeds it, is no gain per channel" in wiring.refused["b.first"]


def test_layers_that_are_quantized_rounded_or_shared_are_not_rescaled() -> None:
    block = by_hand(Hand())
    first = block.layers["b.first"]
    form = parse_format("int8(channel)")
    quantized = Rtn(format=form).layer(first, LayerStats())
    rounded = replace(first, act=ActSpec(parse_format("int8(token)")))
    shared = replace(first, users=("b.first", "b.elsewhere"))
    sentences = ("b.first, which would have to be rescaled too, is quantized", "input of b.first", "with b.elsewhere")
    for layer, sentence in zip((quantized, rounded, shared), sentences, strict=True):
        wiring = wire(by_hand(Hand(), first=layer), pairs=False)
        assert not wiring.foldings and sentence in wiring.refused["b.first"]
    assert producers(wire(by_hand(Hand(), first=quantized), pairs=True)) == []  # its rows cannot take a scale either


def test_outside_the_blocks_nothing_is_folded() -> None:
    block = replace(by_hand(Hand()), name="outside the blocks", runner=None)
    assert wire(block, pairs=True) == Wiring((), dict.fromkeys(block.layers, "outside the blocks nothing is folded"))


def test_folding_equals_its_slow_twin() -> None:
    block = by_hand(Hand())
    maker = torch.Generator().manual_seed(2)
    scale = torch.rand(12, generator=maker) + 0.5
    rows = torch.tensor([0, 1, 1, -1, *range(4, 12)])
    layers, plain = fold(Folding("b.first", ("b.second",), (), 12, rows), scale, block.layers, block.plain)
    used = {int(row) for row in rows if row >= 0}
    for row in range(12):
        by = float(scale[row]) if row in used else 1.0
        torch.testing.assert_close(
            layers["b.first"].float_weight()[row], block.layers["b.first"].float_weight()[row] / by
        )
        bias = block.layers["b.first"].bias
        assert bias is not None and layers["b.first"].bias is not None
        torch.testing.assert_close(layers["b.first"].bias[row], bias[row] / by)
    for column in range(12):
        by = float(scale[rows[column]]) if rows[column] >= 0 else 1.0
        expected = block.layers["b.second"].float_weight()[:, column] * by
        torch.testing.assert_close(layers["b.second"].float_weight()[:, column], expected)
    assert not plain


def test_gathering_takes_what_the_inputs_of_a_channel_have_in_common() -> None:
    folding = Folding("p", ("c",), (), 3, torch.tensor([0, 0, 2, -1]))
    values = torch.tensor([1.0, 3.0, 5.0, 9.0])
    assert folding.gather(values, "amax").tolist() == [3.0, 0.0, 5.0]
    assert folding.gather(values, "mean").tolist() == [2.0, 0.0, 5.0]


def test_rescaled_statistics_are_those_of_rescaled_inputs() -> None:
    maker = torch.Generator().manual_seed(3)
    inputs, columns = torch.randn(50, 6, generator=maker), torch.rand(6, generator=maker) + 0.5

    def stats(values: torch.Tensor) -> LayerStats:
        return LayerStats(
            values.T @ values / 50, values.mean(0), values.abs().mean(0), values.abs().amax(0), tokens=len(values)
        )

    found, expected = rescaled_stats(stats(inputs), columns), stats(inputs / columns)
    for key in ("hessian", "mean", "abs_mean", "abs_max"):
        torch.testing.assert_close(getattr(found, key), getattr(expected, key))
    assert found.tokens == 50 and found.cross is None


def test_layers_that_share_a_scale_must_agree_on_its_settings() -> None:
    folding = Folding("norm", ("q", "k", "v"), (), 2, torch.arange(2))
    chosen = {"q": SmoothQuant(alpha=0.5), "k": SmoothQuant(alpha=0.8)}
    block = block_of("b", {}, {}, None, chosen)
    with pytest.raises(UsageError, match=r"q alpha=0\.5 and k alpha=0\.8, but norm feeds both"):
        agreed(block, folding, ("alpha",))
    assert agreed(block, folding, ("folds",)) is chosen["q"]
    assert agreed(block, Folding("norm", ("v",), (), 2, torch.arange(2)), ("alpha",)) is None
