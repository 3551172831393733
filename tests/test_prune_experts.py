"""Fewer experts: those that do least go, router rows with them, and the folder loads by a plain config."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import compress
from compress.errors import UnsupportedError, UsageError
from compress.export.checkpoint.target import COMPRESSED_TENSORS
from compress.maths.merging import averaged, merged
from compress.models import placing
from compress.models.model import Model
from compress.pipeline import Pipeline, Result
from helpers.checkpoints import PROFILE
from helpers.models import SIZES, calibration, tokens

QWEN = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3MoeConfig", {**QWEN, "norm_topk_prob": True}),
    "qwen2-moe": ("Qwen2MoeConfig", {**QWEN, "norm_topk_prob": True, "shared_expert_intermediate_size": 16}),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 5, "num_experts_per_tok": 2}),
}


@pytest.fixture(scope="module")
def folder_of(save_random: Callable[..., Path]) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            config, settings = FAMILIES[name]
            made[name] = save_random(f"experts-{name}", getattr(transformers, config)(**SIZES, **settings))
        return made[name]

    return make


@torch.no_grad()
def outputs(module: Any) -> torch.Tensor:
    logits: torch.Tensor = module(input_ids=tokens(3, 12)).logits
    return logits


def ran(model: Model, text: str, folder: Path | None = None) -> Result:
    return Pipeline.parse(f"prune_experts({text})").run(model, calibration(tokens(8, 16)), folder=folder)


def gone(result: Result) -> dict[int, set[int]]:
    """By block."""
    names = [row.layer.split(".") for row in result.passes[0].layers]
    return {block: {int(name[-1]) for name in names if int(name[2]) == block} for block in range(2)}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_it_puts_out_what_the_model_does_whose_router_never_chooses_them(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    model = compress.load(folder_of(name))
    result = ran(model, "drop=2")
    twin = placing.whole_module(model)
    for block, dropped in gone(result).items():
        assert len(dropped) == 2
        for path, module in twin.model.layers[block].named_modules():  # type: ignore[union-attr, operator, index]
            if path.endswith(("gate", "router")) and hasattr(module, "weight") and module.weight.shape[0] == 5:
                module.register_forward_hook(partial(_never, dropped=sorted(dropped)))
    found, wanted = outputs(placing.whole_module(result.model)), outputs(twin)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def _never(module: Any, inputs: Any, output: Any, dropped: list[int]) -> Any:
    """What a router whose logits of some experts are -inf puts out, by the probabilities of the others."""
    logits = torch.nn.functional.linear(inputs[0].reshape(-1, 32), module.weight, getattr(module, "bias", None))
    logits[:, dropped] = float("-inf")
    best, index = logits.topk(2, -1)
    return (logits, best.softmax(-1), index)


def test_transformers_loads_it_by_a_plain_config(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    for name, key in (("mixtral", "num_local_experts"), ("qwen3-moe", "num_experts")):
        result = ran(compress.load(folder_of(name)), "keep=3", tmp_path / name)
        folder = COMPRESSED_TENSORS.write(result.model, PROFILE, tmp_path / f"{name}-out").folder
        config = transformers.AutoConfig.from_pretrained(folder)
        assert getattr(config, key) == 3 and json.loads((folder / "config.json").read_text())
        twin = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        torch.testing.assert_close(outputs(twin), outputs(placing.whole_module(result.model)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", ["output", "weight", "frequency"])
def test_an_expert_that_no_token_reaches_goes_first(by: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder_of("gpt-oss"), dtype=torch.float32)
    for block in twin.model.layers:
        block.mlp.router.bias.data[3] = -1e4
    twin.save_pretrained(tmp_path)
    result = ran(compress.load(tmp_path), f"drop=1, by={by}")
    assert gone(result) == {0: {3}, 1: {3}}
    [note] = {note for row in result.passes[0].layers for note in row.notes}
    assert note == f"dropped, the least by {by}: 0.00% of the tokens' choices went to it"
    torch.testing.assert_close(outputs(placing.whole_module(result.model)), outputs(twin.eval()), rtol=1e-4, atol=1e-5)


def test_with_all_kept_nothing_changes(folder_of: Callable[[str], Path]) -> None:
    model = compress.load(folder_of("mixtral"))
    result = ran(model, "drop=0")
    assert not result.passes[0].layers
    assert torch.equal(outputs(placing.whole_module(result.model)), outputs(placing.whole_module(model)))


def test_a_copy_that_is_merged_is_not_missed(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Two experts that are one: the mean of both is either."""
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder_of("mixtral"), dtype=torch.float32)
    for block in twin.model.layers:
        for stack in (block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj):
            stack.data[1:] = stack.data[:1]
    twin.save_pretrained(tmp_path)
    model = compress.load(tmp_path)
    found = outputs(placing.whole_module(ran(model, "keep=2, merge=true").model))
    torch.testing.assert_close(found, outputs(placing.whole_module(model)), rtol=1e-4, atol=1e-5)


def test_an_expert_is_merged_into_the_nearest_by_its_tokens() -> None:
    weights = {0: torch.tensor([1.0, 0.0]), 1: torch.tensor([0.0, 1.0]), 2: torch.tensor([0.1, 3.0])}
    found, went = merged(weights, torch.tensor([0, 1]), torch.tensor([5.0, 3.0, 1.0]))
    assert went == {2: 1}
    torch.testing.assert_close(found[1], torch.tensor([0.025, 1.5]))
    assert torch.equal(found[0], weights[0])
    biases = averaged(torch.tensor([[1.0], [2.0], [6.0]]), went, torch.tensor([5.0, 3.0, 1.0]))
    assert biases[:2].tolist() == [[1.0], [3.0]]
    found, _ = merged(weights, torch.tensor([0, 1]), torch.zeros(3))  # none was used
    assert torch.equal(found[1], weights[1])
    assert averaged(torch.tensor([[1.0], [2.0], [6.0]]), went, torch.zeros(3))[1] == 2


def test_biases_are_merged_with_the_weights(folder_of: Callable[[str], Path]) -> None:
    model = compress.load(folder_of("gpt-oss"))
    result = ran(model, "drop=1, merge=true")
    for block, dropped in gone(result).items():
        [away], path = dropped, f"model.layers.{block}.mlp.experts"
        near = next(int(row.notes[0].split("expert ")[1].split(",")[0]) for row in result.passes[0].layers
                    if row.layer.startswith(path))  # fmt: skip
        left = near - (away < near)
        for key in ("gate_up_proj", "down_proj"):
            before, after = ({**each.plain(block)}[f"{path}.{key}_bias"] for each in (model, result.model))
            weights = [each.layer(each.structure.layers[f"{path}.{key}.{place}"]).float_weight()
                       for each, place in ((model, near), (model, away), (result.model, left))]  # fmt: skip
            share = float(((weights[2] - weights[0]) / (weights[1] - weights[0])).median())
            assert 0 < share < 1
            torch.testing.assert_close(after[left], torch.lerp(before[near], before[away], share), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("keep=1", "keep=1 leaves 1 of 5 experts, and each token goes to 2. Allowed: keep from 2 to 5"),
        ("drop=5", "drop=5 leaves 0 of 5"),
        ("keep=6", "keep=6 leaves 6 of 5"),
        ("drop=1, keep=4", "Keep one of them"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, sentence: str, folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match=sentence):
        Pipeline.parse(f"prune_experts({text})").lay(compress.load(folder_of("mixtral")))


def test_a_model_without_experts_is_refused(llama: Path) -> None:
    with pytest.raises(UnsupportedError, match="has no mixture of experts"):
        Pipeline.parse("prune_experts").lay(compress.load(llama))
