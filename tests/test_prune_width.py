"""A narrower model puts out what the wide one does with zeros for what is gone; where that cannot be, it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers

import compress
from compress.engine.store import open_store
from compress.errors import UnsupportedError, UsageError
from compress.export.checkpoint.target import COMPRESSED_TENSORS
from compress.export.onnx.runtime import SHARED
from compress.maths import channels
from compress.models import placing
from compress.models.model import Model, Task
from compress.passes import PruneWidth
from compress.pipeline import Pipeline, Result
from helpers.checkpoints import PROFILE
from helpers.models import SIZES, UNGROUPED, calibration, tokens

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT2 = {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**SIZES, "head_dim": 16}),
    "llama-tied": ("LlamaConfig", {**SIZES, "tie_word_embeddings": True, "dtype": torch.bfloat16}),
    "llama-with-biases": ("LlamaConfig", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "gemma": ("GemmaConfig", {**SIZES, "head_dim": 8}),  # embeddings times the root of the hidden size
    "olmo": ("OlmoConfig", {**SIZES, "pad_token_id": 0}),  # LayerNorms without weights
    "gemma3": ("Gemma3TextConfig", {**SIZES, "head_dim": 16, "layer_types": ["full_attention"] * 2}),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 8}),  # norms over a head's queries and keys
    "phi3": ("Phi3Config", {**SIZES, "pad_token_id": 0}),  # gate and up in one layer; queries, keys and values too
    "mixtral": ("MixtralConfig", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3MoeConfig", {**SIZES, "head_dim": 8, **EXPERTS}),
    "qwen2-moe": ("Qwen2MoeConfig", {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "gpt2": ("GPT2Config", GPT2),  # weights stored as (in, out), a width that the config leaves out
    "bert": ("BertConfig", UNGROUPED),
    "olmo2": ("Olmo2Config", {**SIZES, "pad_token_id": 0}),  # norms over all heads at once
    "gpt-oss": ("GptOssConfig", {**SIZES, "num_local_experts": 4, "layer_types": ["full_attention"] * 2}),
}
REFUSED = {
    ("olmo2", "kv_groups=1"): "something else reads these channels",
    ("bert", "kv_groups=1"): "knows no head_dim",
    ("gpt2", "kv_groups=1"): "knows no head_dim",
    ("gpt-oss", "ffn=0.5"): "gate_up_proj_bias has intermediate_size in its shape",
    ("bert", "hidden=0.5"): "output is the hidden states themselves",
    ("gpt2", "hidden=0.5"): "c_attn is .* it is not narrowed",
    ("olmo", "hidden=0.5"): "one norm is wanted outside the blocks",
    ("gemma", "hidden=0.5"): "a factor of the hidden size",
    ("gemma3", "hidden=0.5"): "o_proj puts out is not simply added .* Its hidden size cannot be narrowed",
}
HIDDEN = ("llama-tied", "llama-with-biases", "qwen3", "phi3", "qwen2-moe")
CASES = [
    (name, text)
    for name in FAMILIES
    if name not in ("llama-tied", "gemma", "olmo")
    for text in ("ffn=0.5", "kv_groups=1")
    if (name, text) not in REFUSED
]


@pytest.fixture(scope="module")
def model_of(save_random: Callable[..., Path]) -> Callable[[str], Model]:
    """The model of a family, with random weights; the same one each time."""
    made: dict[str, Model] = {}

    def make(name: str) -> Model:
        if name not in made:
            config, settings = FAMILIES[name]
            maker = "AutoModel" if name == "bert" else "AutoModelForCausalLM"
            made[name] = compress.load(save_random(f"width-{name}", getattr(transformers, config)(**settings), maker))
        return made[name]

    return make


@torch.no_grad()
def outputs(module: Any) -> torch.Tensor:
    found = module(input_ids=tokens(3, 12))
    result: torch.Tensor = found.logits if "logits" in found else found.last_hidden_state
    return result


def ran(model: Model, text: str, folder: Path | None = None) -> Result:
    return Pipeline.parse(f"prune_width({text})").run(model, calibration(tokens(8, 16)), folder=folder)


def readers(result: Result) -> list[str]:
    return [row.layer for row in result.passes[0].layers if row.output_error is not None]


def with_zeros(model: Model, result: Result) -> torch.nn.Module:
    """The wide model with zeros for the input columns that the narrow one, not refitted, does not have."""
    module = placing.whole_module(model)
    for name in readers(result):
        layer, narrow = (each.layer(each.structure.layers[name]) for each in (model, result.model))
        wide, left = layer.float_weight(), narrow.float_weight()
        kept = (wide.T[:, None] == left.T[None]).all(-1).any(1)
        assert int(kept.sum()) == left.shape[1]
        placing.put_layer(module, layer.with_weight(wide * kept))
    return module


@pytest.mark.parametrize(("name", "text"), CASES)
def test_it_puts_out_what_the_wide_model_does_with_zeros_for_what_is_gone(
    name: str, text: str, model_of: Callable[[str], Model]
) -> None:
    model = model_of(name)
    result = ran(model, f"{text}, refit=false")
    assert readers(result)
    assert result.model.source_bytes < model.source_bytes
    wide, narrow = outputs(with_zeros(model, result)), outputs(placing.whole_module(result.model))
    torch.testing.assert_close(narrow, wide, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(narrow, outputs(placing.whole_module(model)), atol=1e-3)


@pytest.mark.parametrize(("name", "text"), list(REFUSED))
def test_what_cannot_be_narrowed_is_refused_with_why(name: str, text: str, model_of: Callable[[str], Model]) -> None:
    with pytest.raises(UnsupportedError, match=REFUSED[name, text]):
        ran(model_of(name), text)


@pytest.mark.parametrize("name", HIDDEN)
def test_a_narrower_stream_is_the_wide_one_without_its_last_channels(
    name: str, save_random: Callable[..., Path], tmp_path: Path
) -> None:
    """Channels to which nothing is ever written are not missed, whatever reads them."""
    config, settings = FAMILIES[name]
    folder = save_random(f"stream-{name}", getattr(transformers, config)(**settings))
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    gone = torch.arange(32) % 4 == 1
    for key, tensor in twin.named_parameters():
        last = key.rsplit(".", 2)[-2] if key.endswith((".weight", ".bias")) else key.rsplit(".", 1)[-1]
        if "embed_tokens" in key:
            tensor.data[..., gone] = 0
        elif last in ("o_proj", "down_proj"):
            if tensor.ndim == 3:
                tensor.data[:, gone] = 0
            else:
                tensor.data[gone] = 0
    twin.to(dtype=settings.get("dtype", torch.float32)).save_pretrained(tmp_path / "source")
    model = compress.load(tmp_path / "source")
    result = ran(model, "hidden_size=24", tmp_path / "model")
    made = COMPRESSED_TENSORS.write(result.model, PROFILE, tmp_path / "out").folder
    narrow = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).eval()
    assert (narrow.config.hidden_size, narrow.config.num_attention_heads) == (24, 4)
    found, wanted = outputs(narrow), outputs(placing.whole_module(model))
    close = 0.03 if name == "llama-tied" else 1e-3
    assert float((found - wanted).norm() / wanted.norm()) < close
    names = {row.layer for row in result.passes[0].layers}
    assert "model.embed_tokens" in names and "model.layers.1.self_attn.o_proj" in names


def test_what_reads_the_stream_makes_up_for_the_channels_that_go(model_of: Callable[[str], Model]) -> None:
    model = model_of("llama")
    whole = outputs(placing.whole_module(model))
    lost = [
        float((outputs(placing.whole_module(ran(model, f"hidden=0.25, refit={each}").model)) - whole).norm())
        for each in ("true", "false")
    ]
    assert lost[0] < lost[1]


def test_transformers_loads_it_by_a_plain_config(model_of: Callable[[str], Model], tmp_path: Path) -> None:
    result = ran(model_of("llama"), "ffn_size=40, kv_heads=1", tmp_path / "model")
    folder = COMPRESSED_TENSORS.write(result.model, PROFILE, tmp_path / "out").folder
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in ("intermediate_size", "num_attention_heads", "num_key_value_heads")} == {
        "intermediate_size": 40,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    assert config["head_dim"] == 16
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(outputs(twin), outputs(placing.whole_module(open_store(tmp_path / "model"))))


def test_the_exported_graph_runs_with_fewer_groups(model_of: Callable[[str], Model], tmp_path: Path) -> None:
    result = Pipeline.parse("prune_width(ffn=0.5, kv_groups=1), rtn(bits=8, group_size=32)").run(
        model_of("llama"), calibration(tokens(8, 16))
    )
    compress.export(result, profile="cpu-x86-avx2", out=tmp_path / "out")  # runs it beside the model
    graph = onnx.load(tmp_path / "out" / "onnx" / SHARED, load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    found = [{one.name: one.i for one in node.attribute} for node in nodes]
    assert [(each["num_heads"], each["kv_num_heads"]) for each in found] == [(2, 1), (2, 1)]


def test_with_all_kept_nothing_changes(model_of: Callable[[str], Model]) -> None:
    model = model_of("llama")
    result = ran(model, "ffn=0, kv_groups=0")
    assert not result.passes[0].layers
    for name, spec in model.structure.layers.items():
        assert torch.equal(result.model.layer(result.model.structure.layers[name]).float_weight(),
                           model.layer(spec).float_weight())  # fmt: skip


@pytest.mark.parametrize("by", ["obs", "wanda", "activation", "magnitude"])
def test_channels_that_are_never_on_go_first_and_are_not_missed(by: str, save_random: Callable[..., Path]) -> None:
    folder = save_random(f"dead-{by}", transformers.LlamaConfig(**SIZES))
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for block in twin.model.layers:
        for layer in (block.mlp.gate_proj, block.mlp.up_proj):
            layer.weight.data[1::2] = 0
        if by == "magnitude":  # by which what reads them counts too
            block.mlp.down_proj.weight.data[:, 1::2] = 0
    twin.save_pretrained(folder)
    model = compress.load(folder)
    result = ran(model, f"ffn=0.5, by={by}")
    down = "model.layers.1.mlp.down_proj"
    before, after = (each.layer(each.structure.layers[down]).float_weight() for each in (model, result.model))
    assert torch.equal(after, before[:, ::2])
    assert all(row.output_error in (None, 0.0) for row in result.passes[0].layers)
    torch.testing.assert_close(outputs(placing.whole_module(result.model)), outputs(twin.eval()), rtol=1e-4, atol=1e-5)


def test_a_refit_loses_less(model_of: Callable[[str], Model]) -> None:
    def errors(text: str) -> list[float]:
        rows = ran(model_of("llama"), text).passes[0].layers
        return [row.output_error for row in rows if row.output_error is not None]

    for by in ("obs", "activation"):
        plain, refitted = (errors(f"ffn=0.5, by={by}, refit={each}") for each in ("false", "true"))
        assert refitted[0] < plain[0]
    assert errors("ffn=0.5")[0] <= errors("ffn=0.5, by=wanda")[0]


def test_weights_alone_need_no_data(model_of: Callable[[str], Model]) -> None:
    result = Pipeline.parse("prune_width(ffn=0.25, by=magnitude, refit=false)").run(model_of("llama"))
    assert result.model.config.intermediate_size == 48


def test_it_goes_with_parts_that_were_dropped_and_passes_that_round(model_of: Callable[[str], Model]) -> None:
    narrow = "prune_width(ffn=0.5, kv_groups=1, hidden=0.25)"
    text = f"drop_blocks(count=1, what=attention), {narrow}, rtn(format=int8(group=8))"
    made = Pipeline.parse(text).run(model_of("llama"), calibration(tokens(8, 16))).model
    shapes = {spec.shape for name, spec in made.structure.layers.items() if name.endswith("o_proj")}
    assert (len(made.attentions), shapes, made.config.intermediate_size) == (1, {(24, 32)}, 32)
    assert bool(outputs(placing.whole_module(made)).isfinite().all())


def test_an_encoder_is_narrowed_too(model_of: Callable[[str], Model]) -> None:
    result = ran(model_of("bert"), "ffn=0.25")
    assert (result.model.task, result.model.config.intermediate_size) == (Task.ENCODER, 48)
    assert outputs(placing.whole_module(result.model)).shape == (3, 12, 32)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ffn=1.0", "ffn=1.0: it should be less than 1"),
        ("ffn=-0.1", "greater than or equal to 0"),
        ("ffn=0.01", "intermediate_size=64 rounds to none of it"),
        ("ffn=0.99", "intermediate_size=64 rounds to all of it"),
        ("ffn_size=65", "intermediate_size=64 can become 1 to 64, not 65"),
        ("kv_groups=2", "kv_groups=2 leaves 0 of 2 heads"),
        ("kv_heads=3", "kv_heads=3 leaves 3 of 2 heads"),
        ("ffn=0.5, ffn_size=8", "Keep one of them"),
        ("hidden=0.001", "hidden=0.001 of hidden_size=32 rounds to none"),
        ("hidden_size=33", "hidden_size=32 can become 1 to 32, not 33"),
        ("hidden=0.5, hidden_size=8", "hidden says how much goes"),
        ("targets=[x]", "takes no targets"),
        ("ffn_size=32, multiple=8", "multiple=8 rounds what a share leaves"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, sentence: str, model_of: Callable[[str], Model]) -> None:
    with pytest.raises(UsageError, match=sentence):
        Pipeline.parse(f"prune_width({text})").lay(model_of("llama"))


def test_shapes_that_transformers_refuses_are_refused_with_others(
    save_random: Callable[..., Path],
) -> None:
    """Its Llama wants a hidden size that is a multiple of the heads, whatever their size is."""
    config = transformers.LlamaConfig(**{**SIZES, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8})
    model = compress.load(save_random("eight-heads", config))
    with pytest.raises(UsageError, match=r"32\) is not a multiple .* \(6\)\. kv_heads that it takes: 1, 2, 4\."):
        Pipeline(PruneWidth(kv_groups=1)).lay(model)
    with pytest.raises(UsageError, match=r"\(20\) is not a multiple .* \(8\)\. Choose another hidden_size"):
        Pipeline(PruneWidth(hidden_size=20)).lay(model)
    both = ran(model, "kv_groups=1, hidden_size=24").model.config
    assert (both.num_attention_heads, both.num_key_value_heads, both.hidden_size) == (6, 3, 24)


def test_a_size_is_asked_of_one_width_only(model_of: Callable[[str], Model]) -> None:
    with pytest.raises(UsageError, match="ffn_size is one of moe_intermediate_size, shared_expert_intermediate_size"):
        Pipeline(PruneWidth(ffn_size=8)).lay(model_of("qwen2-moe"))


def test_the_greedy_order_is_that_of_the_least_loss_each_time() -> None:
    maker = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(200, 12, generator=maker).double(), torch.randn(5, 12, generator=maker).double()
    inputs = inputs @ torch.randn(12, 12, generator=maker).double()
    hessian = inputs.T @ inputs / 200
    for size in (1, 3):
        left = list(range(12 // size))
        while len(left) > 2:
            losses = []
            for unit in left:
                columns = channels.columns_of(torch.tensor([one for one in left if one != unit]), size)
                solved = torch.linalg.lstsq(inputs[:, columns], inputs @ weight.T).solution
                losses.append(float((inputs[:, columns] @ solved - inputs @ weight.T).square().sum()))
            left.pop(losses.index(min(losses)))
            assert channels.least_needed(weight, hessian, size, len(left)).tolist() == left
            columns = channels.columns_of(torch.tensor(left), size)
            found = channels.refitted(weight, hessian, columns)
            solved = torch.linalg.lstsq(inputs[:, columns], inputs @ weight.T).solution
            torch.testing.assert_close(found[:, columns], solved.T)
            assert int((found != 0).any(0).sum()) == len(columns)


def test_scores_of_units_are_what_they_put_out_alone() -> None:
    maker = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(50, 6, generator=maker), torch.randn(4, 6, generator=maker)
    found = channels.output_scores(weight, inputs.T @ inputs / 50, 2)
    for unit in range(3):
        own = slice(2 * unit, 2 * unit + 2)
        wanted = (inputs[:, own] @ weight[:, own].T).square().sum(1).mean()
        torch.testing.assert_close(found[unit].float(), wanted)
    assert channels.most_important(torch.tensor([1.0, 3.0, 3.0, 0.0]), 2).tolist() == [1, 2]


def test_statistics_without_a_use_are_damped_until_they_serve() -> None:
    assert channels.damped(torch.zeros(3, 3), 0.01)[0].equal(torch.eye(3).double())
    negative = torch.diag(torch.tensor([1.0, 1.0, -0.1]))
    found, damp = channels.damped(negative, 0.01)
    assert damp > 0.1 and bool((torch.linalg.eigvalsh(found) > 0).all())
