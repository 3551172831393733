"""Depth pruning: blocks or parts of them leave, chosen by what the model loses without them; what is left is whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import compress
from compress.engine.ablation import Trials, part_cosines, run_cosines
from compress.engine.stream import BlockStream
from compress.errors import UnsupportedError, UsageError
from compress.inputs.datasets import Calibration
from compress.models import depth, placing
from compress.models.model import Model
from compress.models.skeleton import OUTER
from compress.passes import DropBlocks
from compress.pipeline import Pipeline, Result
from compress.plan import make_plan
from compress.profiles import as_profile
from compress.recipe import of_passes
from helpers.models import SIZES, SPECIAL, UNGROUPED, calibration, tokens

Save = Callable[..., Path]
IDS = tokens(4, 12)


@pytest.fixture(scope="module")
def folder(make_llama: Callable[..., Path]) -> Path:
    return make_llama("deep-llama", num_hidden_layers=5, vocab_size=96, hidden_size=32, intermediate_size=48)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return compress.load(folder)


@pytest.fixture(scope="module")
def data() -> Calibration:
    return calibration(IDS)


def run(model: Model, data: Calibration | None = None, **settings: Any) -> Result:
    return Pipeline(DropBlocks(**settings)).run(model, data)


def twin(folder: Path, gone: tuple[int, ...] = ()) -> Any:
    """The model in plain transformers, without some blocks."""
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = found.model.layers
    found.model.layers = nn.ModuleList(layer for place, layer in enumerate(layers) if place not in gone)
    for place, layer in enumerate(found.model.layers):
        layer.self_attn.layer_idx = place
    found.config.num_hidden_layers = len(found.model.layers)
    return found


@torch.no_grad()
def loss_of(module: nn.Module, teacher: nn.Module, by: str) -> float:
    """Per token, written out."""
    logits, wanted = module(input_ids=IDS).logits.double(), teacher(input_ids=IDS).logits.double()
    if by == "perplexity":
        chosen = logits.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])
        return -float(chosen.mean())
    first, second = wanted.log_softmax(-1), logits.log_softmax(-1)
    return float((first.exp() * (first - second)).sum(-1).mean())


def noted(result: Result) -> dict[str, str]:
    return {row.layer: row.reason or row.notes[0] for row in result.passes[0].layers}


@pytest.mark.parametrize("by", ["kl", "perplexity"])
def test_each_step_takes_the_block_without_which_the_model_loses_least(
    by: str, model: Model, folder: Path, data: Calibration
) -> None:
    gone: list[int] = []
    teacher = twin(folder)
    for _ in range(2):
        scores = {place: loss_of(twin(folder, (*gone, place)), teacher, by) for place in range(5) if place not in gone}
        gone.append(min(scores, key=lambda place: scores[place]))
    result = run(model, data, count=2, by=by)
    assert result.model.origins == tuple(place for place in range(5) if place not in gone)
    rows = [row for row in result.passes[0].layers if row.changed]
    assert {row.layer for row in rows} == {f"model.layers.{place}" for place in gone}
    told = {"kl": "KL {:.4g} per token", "perplexity": "perplexity {:.4g}"}[by]
    value = torch.tensor(scores[gone[1]]).double()
    number = told.format(float(value if by == "kl" else value.exp()))
    assert noted(result)[f"model.layers.{gone[1]}"].startswith(f"dropped: {number} without it beside the 1 chosen")
    assert all("per token" in text or "perplexity" in text for text in noted(result).values())


def test_scores_of_trials_are_those_of_models_without_the_part(model: Model, data: Calibration) -> None:
    parts = {place: f"model.layers.{place}.mlp" for place in range(5)}
    trials = Trials(model, data.batches(), parts=parts)
    trials.gone = {4}
    found = trials.losses([1, 2], "kl", lambda done, count: None)
    teacher = placing.whole_module(model)
    for place in (1, 2):
        shape = depth.without_parts(model, (place, 4), "mlp")
        made = placing.whole_module(model)
        for edit in shape.edits:
            made.get_submodule(edit.path).down_proj.weight.data.zero_()  # type: ignore[union-attr, operator]
        assert found[place] == pytest.approx(loss_of(made, teacher, "kl"), rel=1e-4)


def hidden_states(folder: Path) -> list[Tensor]:
    """What enters each block, and what leaves the last one, before the norm."""
    seen: list[Tensor] = []
    module = twin(folder)
    for layer in module.model.layers:
        layer.register_forward_hook(lambda _m, args, output: seen.append(args[0]) or seen.append(output))
    with torch.no_grad():
        module(input_ids=IDS)
    return [*seen[::2], seen[-1]]


@pytest.mark.parametrize("run_length", [1, 3])
def test_cosines_are_taken_over_runs_of_blocks(run_length: int, model: Model, folder: Path) -> None:
    stream = BlockStream(model, [IDS[:2], IDS[2:]])
    stream.start(model.layers(OUTER))
    found = run_cosines(stream, run_length, lambda *_: None)
    states = hidden_states(folder)
    for place in range(5 - run_length + 1):
        first, second = states[place].double(), states[place + run_length].double()
        cosine = (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))
        assert found[place] == pytest.approx(float(1 - cosine.mean()), abs=1e-6)


def test_cosines_of_parts_are_taken_around_what_they_add(model: Model, folder: Path) -> None:
    layer, state = twin(folder).model.layers[2], hidden_states(folder)
    between: list[Tensor] = []
    layer.post_attention_layernorm.register_forward_hook(lambda _m, args, _o: between.append(args[0]))
    module = twin(folder)
    module.model.layers[2] = layer
    with torch.no_grad():
        module(input_ids=IDS)
    for part, first, second in (("attention", state[2], between[0]), ("mlp", between[0], state[3])):
        stream = BlockStream(model, [IDS])
        stream.start(model.layers(OUTER))
        name = "self_attn" if part == "attention" else "mlp"
        found = part_cosines(stream, {2: f"model.layers.2.{name}"}, part, lambda *_: None)  # type: ignore[arg-type]
        wanted = 1 - torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=-1).mean()
        assert found == {2: pytest.approx(float(wanted), abs=1e-6)}


def test_the_model_is_the_one_with_those_blocks_deleted(model: Model, folder: Path, tmp_path: Path) -> None:
    result = run(model, blocks=(1, 3))
    wanted = twin(folder, (1, 3))
    found = placing.whole_module(result.model)
    with torch.no_grad():
        assert torch.equal(found(input_ids=IDS).logits, wanted(input_ids=IDS).logits)
        one_by_one = found.generate(IDS[:1], max_new_tokens=8, do_sample=False, use_cache=True)  # type: ignore[operator]
        at_once = found.generate(IDS[:1], max_new_tokens=8, do_sample=False, use_cache=False)  # type: ignore[operator]
    assert torch.equal(one_by_one, at_once)
    compress.export(result, profile="cpu-x86-avx2", target="checkpoint", out=tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint", dtype=torch.float32).eval()
    assert plain.config.num_hidden_layers == 3
    with torch.no_grad():
        assert torch.equal(plain(input_ids=IDS).logits, wanted(input_ids=IDS).logits)


def test_what_only_edits_can_say_is_refused_for_checkpoints_and_runs_elsewhere(model: Model, tmp_path: Path) -> None:
    result = run(model, blocks=(0, 3), what="attention")
    with pytest.raises(UnsupportedError, match=r"config\.json.* 2 module\(s\).*model\.layers\.0\.self_attn"):
        compress.export(result, profile="cpu-x86-avx2", target="checkpoint", out=tmp_path / "no")
    made = compress.export(result, profile="cpu-x86-avx2", target="native", out=tmp_path / "out")
    with torch.no_grad():
        wanted = placing.whole_module(result.model)(input_ids=IDS).logits
    torch.testing.assert_close(torch.from_numpy(made.session().logits(IDS.numpy())), wanted, rtol=1e-4, atol=1e-5)
    told = json.loads((tmp_path / "out" / "native" / "native.json").read_text())
    assert [edit["path"] for edit in told["edits"]] == ["model.layers.0.self_attn", "model.layers.3.self_attn"]


def test_a_later_pass_drops_blocks_of_a_model_that_lost_parts(model: Model) -> None:
    first = DropBlocks(blocks=(1, 3), what="attention")
    result = Pipeline(first, DropBlocks(blocks=(0, 1))).run(model)
    assert result.model.origins == (2, 3, 4)
    assert [edit.path for edit in result.model.edits] == ["model.layers.1.self_attn"]
    with pytest.raises(UsageError, match=r"model\.layers\.1 has no attention any more"):
        Pipeline(first, DropBlocks(blocks=(1,), what="attention")).lay(model)
    with pytest.raises(UsageError, match="No attention would be left"):
        Pipeline(first, DropBlocks(blocks=(0, 2, 4), what="attention")).lay(model)
    with pytest.raises(UsageError, match="No block that would stay has its attention"):
        Pipeline(first, DropBlocks(blocks=(0, 2, 4))).lay(model)
    with pytest.raises(UsageError, match=r"4 attention.* only 3 may"):
        Pipeline(first, DropBlocks(count=4, what="attention")).lay(model)


def test_a_run_of_neighbours_leaves_by_cosine(model: Model, data: Calibration, folder: Path) -> None:
    result = run(model, data, count=2, by="cosine", contiguous=True, keep=(0,))
    states = hidden_states(folder)
    turned = [1 - torch.nn.functional.cosine_similarity(states[i], states[i + 2], dim=-1).mean() for i in range(4)]
    first = min(range(1, 4), key=lambda place: float(turned[place]))
    assert result.model.origins == tuple(place for place in range(5) if place not in (first, first + 1))
    with pytest.raises(UsageError, match="no 3 neighbouring blocks"):
        DropBlocks(count=3, by="cosine", contiguous=True, keep=(2,)).shape(model)


def test_blocks_that_are_kept_stay_whatever_the_scores(model: Model, data: Calibration) -> None:
    result = run(model, data, count=2, by="cosine", keep=(2, 3, 4))
    assert result.model.origins == (2, 3, 4)
    assert noted(result)["model.layers.2"] == "stays as model.layers.0: keep names it"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"blocks": (5,)}, "blocks names block 5; the model has 0 to 4"),
        ({"blocks": (-1,)}, "blocks names block -1"),
        ({"keep": (9,)}, "keep names block 9"),
        ({"count": 5}, "5 of 5 blocks would leave"),
        ({"blocks": (0, 1, 2, 3, 4)}, "5 of 5 blocks would leave"),
        ({"count": 3, "keep": (0, 1, 2)}, "only 2 may"),
        ({"count": 5, "what": "mlp"}, "5 of 5 blocks would leave"),
    ],
)
def test_what_a_model_cannot_lose_is_refused(settings: dict[str, Any], told: str, model: Model) -> None:
    with pytest.raises(UsageError, match=told):
        Pipeline(DropBlocks(**settings)).lay(model)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("drop_blocks(count=0)", "greater than or equal to 1"),
        ("drop_blocks(count=-1)", "greater than or equal to 1"),
        ("drop_blocks(blocks=[1, 1])", "names block 1 more than once"),
        ("drop_blocks(blocks=[])", "names none"),
        ("drop_blocks(blocks=[1], by=cosine)", "by would do nothing"),
        ("drop_blocks(blocks=[1], count=1)", "count would do nothing"),
        ("drop_blocks(contiguous=true)", "contiguous=true"),
        ("drop_blocks(what=head)", "what='head'"),
        ("drop_blocks(targets=['*'])", "takes no targets"),
    ],
)
def test_settings_that_mean_nothing_are_refused(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Pipeline.parse(text)


def random_model(save_random: Save, kind: str, **changes: Any) -> Model:
    """A family's smallest, with weights that are all random."""
    config = getattr(transformers, f"{kind}Config")(**{**SPECIAL, **changes})
    return compress.load(save_random(kind.lower(), config, "AutoModel" if kind == "Bert" else "AutoModelForCausalLM"))


def test_settings_for_each_block_are_cut_with_the_blocks(save_random: Save) -> None:
    sizes = {**SIZES, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": 8}
    gemma = random_model(save_random, "Gemma2", **sizes)
    kinds = gemma.config.layer_types
    assert run(gemma, blocks=(0,)).model.raw_config["layer_types"] == kinds[1:]
    mixture = random_model(
        save_random, "Qwen3Moe", **sizes, num_experts=4, moe_intermediate_size=16, mlp_only_layers=[1, 3]
    )
    result = run(mixture, blocks=(0, 1))
    assert (result.model.raw_config["mlp_only_layers"], result.model.raw_config["num_hidden_layers"]) == ([1], 2)


def test_blocks_that_would_become_others_are_refused_by_what_changes(save_random: Save) -> None:
    names = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": 96}
    scaled = random_model(save_random, "GPT2", **names, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UnsupportedError, match=r"h\.2 cannot become block 1 of a model of 3: its attn\.scaling is"):
        run(scaled, blocks=(1,))
    assert run(scaled, calibration(IDS), by="cosine", keep=(0,)).model.origins == (0, 1, 2)  # only the last can leave


def test_parts_that_do_more_than_add_to_the_hidden_states_are_refused(save_random: Save) -> None:
    bert = random_model(save_random, "Bert", **UNGROUPED)
    with pytest.raises(
        UnsupportedError, match=r"attention of encoder\.layer\.1 cannot be taken out: .* through a norm"
    ):
        run(bert, blocks=(1,), what="attention")
    with pytest.raises(UnsupportedError, match="feed-forward in several modules"):
        run(bert, blocks=(1,), what="mlp")
    assert run(bert, calibration(IDS), by="kl").model.config.num_hidden_layers == 1
    with pytest.raises(UsageError, match="no perplexity"):
        run(bert, calibration(IDS), by="perplexity")
    mixed = random_model(save_random, "Gemma2", **SIZES, head_dim=8, sliding_window=8)
    with pytest.raises(UnsupportedError, match="attentions of several kinds"):
        run(mixed, blocks=(1,), what="attention")


def test_a_part_of_a_parallel_block_may_leave_since_it_only_adds(save_random: Save) -> None:
    phi = random_model(save_random, "Phi", **{**UNGROUPED, "num_hidden_layers": 3})
    found = placing.whole_module(run(phi, blocks=(1,), what="attention").model)
    wanted = placing.whole_module(phi)
    attention = wanted.get_submodule("model.layers.1.self_attn")
    for parameter in attention.dense.parameters():  # type: ignore[union-attr, operator]
        parameter.data.zero_()
    with torch.no_grad():
        torch.testing.assert_close(found(input_ids=IDS).logits, wanted(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
        first = found(input_ids=IDS[:, :7], use_cache=True)
        rest = found(input_ids=IDS[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, wanted(input_ids=IDS).logits[:, 7:], rtol=1e-4, atol=1e-5)


def test_an_image_model_has_no_blocks_to_drop(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(
        "import torch\n\n\ndef make():\n    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), "
        "torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))\n\n\n"
        "def sample_inputs(batch=2):\n    return (torch.randn(batch, 3, 8, 8),)\n"
    )
    with pytest.raises(UnsupportedError, match="no language model or encoder"):
        Pipeline(DropBlocks()).lay(compress.load(f"{path}:make"))


def test_a_plan_says_that_data_decide_and_has_the_right_sizes(model: Model, data: Calibration) -> None:
    text = "drop_blocks(count=2, by=cosine), rtn(bits=8, group_size=16)"
    plan = make_plan(model, of_passes(text), as_profile("cpu-x86-avx2"))
    assert any("which 2 block(s) leave is decided on the calibration data (by=cosine)" in note for note in plan.notes)
    assert {row.layer.split(".")[2] for row in plan.layers if "layers" in row.layer} == {"0", "1", "2"}
    decode = [row for row in plan.predicted_latency if row.phase == "decode"]
    assert decode and all(row.variant_s < row.baseline_s for row in decode)
