"""Layers in turn, against plain runs of the whole block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import compress
from compress.engine.layer_stats import Stat
from compress.engine.stream import BlockStream
from compress.engine.turns import Turns
from compress.inputs.datasets import Calibration
from compress.inputs.windows import Windows
from compress.layer import Layer, LayerKind
from compress.models.model import Model
from compress.models.skeleton import OUTER
from compress.passes.gptq import Gptq
from compress.pipeline import Pipeline
from helpers.models import UNGROUPED

GPT2: dict[str, Any] = {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
MIXTURE: dict[str, Any] = {**UNGROUPED, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": transformers.LlamaConfig(**UNGROUPED),
    "gemma2": transformers.Gemma2Config(**UNGROUPED, head_dim=8),
    "phi3": transformers.Phi3Config(**UNGROUPED, pad_token_id=0),
    "gpt2": transformers.GPT2Config(**GPT2),
    "gptj": transformers.GPTJConfig(**GPT2, rotary_dim=8),
    "mixtral": transformers.MixtralConfig(**MIXTURE),
}
IN_TURN = {
    "llama": [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)],
    "gptj": [("q_proj", "k_proj", "v_proj", "fc_in"), ("out_proj",), ("fc_out",)],
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str, save_random: Callable[..., Path]) -> Model:
    return compress.load(save_random(f"turns-{family}", FAMILIES[family]))


def batches() -> list[torch.Tensor]:
    maker = torch.Generator().manual_seed(0)
    return [torch.randint(3, 96, (rows, 12), generator=maker) for rows in (3, 3, 1)]


def loaded(model: Model, reference: bool = False) -> BlockStream:
    """A stream with its first block in place, as a walk would have it; both streams differ, as later in a walk."""
    stream = BlockStream(model, batches(), reference=reference)
    stream.start(model.layers(OUTER))
    stream.load(0, model.layers(0), model.plain(0))
    for place, hidden in enumerate(stream.hidden):
        noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(place))
        hidden.add_(0.3 * hidden.std() * noise)
    return stream


def shaken(layer: Layer) -> Layer:
    """The layer with other weights, by half of what they are."""
    weight = layer.float_weight()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(layer.name)))
    return layer.with_weight(weight + 0.5 * weight.std() * noise)


def turns_of(stream: BlockStream, cross: bool = False) -> Turns:
    specs = [spec for spec in stream.model.structure.segment_layers(0) if not spec.routed]
    return Turns(stream, 0, specs, cross)


def test_every_group_is_seen_with_all_before_it_changed(model: Model, family: str) -> None:
    stream, twin = loaded(model), loaded(model)
    turns = turns_of(stream)
    if family in IN_TURN:
        assert [tuple(name.rpartition(".")[2] for name in group) for group in turns.groups] == IN_TURN[family]
    for group in turns.groups:
        found = turns.collect(group, {Stat.HESSIAN, Stat.ABS_MAX})
        expected = twin.collect(0, group, {Stat.HESSIAN, Stat.ABS_MAX})  # the whole block, as it now is
        assert found.keys() == expected.keys()
        for name, stats in found.items():
            assert stats.tokens == expected[name].tokens
            torch.testing.assert_close(stats.hessian, expected[name].hessian, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(stats.abs_max, expected[name].abs_max, rtol=1e-4, atol=1e-5)
        for name in group:
            changed = shaken(model.layers(0)[name])
            stream.put(changed)
            twin.put(changed)
        turns.settle(group)
    for found_output, hidden in zip(turns.outputs(), twin.hidden, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(found_output, twin.call(0, hidden), rtol=0, atol=0)  # a resumed run makes these


def inputs_of(stream: BlockStream, name: str, hidden: torch.Tensor) -> torch.Tensor:
    """What enters one layer, by running the block."""
    seen: list[torch.Tensor] = []
    hook = stream.module.get_submodule(name).register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        stream.call(0, hidden)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def test_the_mismatch_is_against_the_block_as_it_was_received(model: Model) -> None:
    stream, before, after = loaded(model, reference=True), loaded(model), loaded(model)
    turns = turns_of(stream, cross=True)
    for group in turns.groups:
        found = turns.collect(group, {Stat.HESSIAN, Stat.CROSS})
        if stream.model.structure.layers[group[0]].kind is LayerKind.EXPERT:
            assert all(stats.cross is None for stats in found.values())
            continue
        expected = torch.zeros(())
        for own, other in zip(stream.hidden, stream.reference, strict=True):
            rows = inputs_of(after, group[0], own)
            expected = expected + (inputs_of(before, group[0], other) - rows).T @ rows
        cross = found[group[0]].cross
        assert cross is not None
        torch.testing.assert_close(cross, expected / found[group[0]].tokens, rtol=1e-3, atol=1e-5)
        for name in group:
            changed = shaken(model.layers(0)[name])
            stream.put(changed)
            after.put(changed)
        turns.settle(group)


def test_layers_in_turn_are_guided_each_by_its_own_gradient(model: Model) -> None:
    stream, twin = loaded(model, reference=True), loaded(model)
    turns = turns_of(stream, cross=True)
    linear = [spec.name for spec in model.structure.segment_layers(0) if spec.kind is LayerKind.LINEAR]
    maker = torch.Generator().manual_seed(0)
    guides = {name: [torch.rand(rows * 12, 2, generator=maker) for rows in (3, 3, 1)] for name in linear[1:]}
    for group in turns.groups:
        found = turns.collect(group, {Stat.HESSIAN, Stat.CROSS, Stat.GUIDED, Stat.SHARING}, guides)
        expected = twin.collect(0, group, {Stat.HESSIAN, Stat.GUIDED}, guides)
        assert found.keys() == expected.keys()
        for name, stats in found.items():
            assert (stats.guided is not None) == (name in guides)
            if stats.guided is not None:
                assert stats.sharing == group and stats.cross is not None
                torch.testing.assert_close(stats.guided, expected[name].guided, rtol=1e-4, atol=1e-5)
        turns.settle(group)


def test_the_reference_stream_goes_on_as_if_nothing_had_changed(model: Model) -> None:
    stream, twin = loaded(model, reference=True), loaded(model, reference=True)
    twin.look_ahead(0)
    turns = turns_of(stream, cross=True)
    for group in turns.groups:
        turns.collect(group, {Stat.HESSIAN, Stat.CROSS})
        for name in group:
            if stream.model.structure.layers[name].kind is not LayerKind.EXPERT:
                stream.put(shaken(model.layers(0)[name]))
        turns.settle(group)
    turns.look_ahead()
    for found, expected in zip(stream.targets, twin.targets, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_nothing_heavy_is_computed_twice(llama: Path) -> None:
    stream = loaded(compress.load(llama))
    turns = turns_of(stream)
    calls: Counter[str] = Counter()
    for group in turns.groups:
        for name in group:
            module = stream.module.get_submodule(name)
            module.register_forward_hook(lambda _m, _i, _o, name=name: calls.update([name]))
    for group in turns.groups:
        turns.collect(group, {Stat.HESSIAN})
        turns.settle(group)
    assert len(list(turns.outputs())) == 3
    assert set(calls.values()) == {3}  # once per batch


def test_a_block_comes_out_of_its_turns_as_it_was(model: Model) -> None:
    stream, twin = loaded(model, reference=True), loaded(model)
    turns = turns_of(stream, cross=True)
    for group in turns.groups:
        turns.collect(group, {Stat.HESSIAN, Stat.CROSS})
        turns.settle(group)
    with torch.no_grad():
        torch.testing.assert_close(stream.call(0, stream.hidden[0]), twin.call(0, twin.hidden[0]), rtol=0, atol=0)


def test_a_pass_after_one_in_turn_sees_what_that_made(llama: Path, tmp_path: Path) -> None:
    """The step to the next block may not use what was kept before the later pass changed the block."""
    model = compress.load(llama)
    ids = torch.cat([batch % 90 for batch in batches()])
    calibration = Calibration(Windows(ids, (0,) * len(ids), "test", ""), 0, "test")
    text = 'gptq(format=int8(group=32), targets=["*.0.*"]), gptq(format=int3(group=32), targets=["*.1.*"])'
    both = 'gptq(format=int8(group=32), targets=["*.0.*"]), act_quant(format=int8(token), targets=["*.0.*"])'
    rest = 'gptq(format=int3(group=32), targets=["*.1.*"])'
    plain = Pipeline.parse(text).run(model, calibration).model
    rounded = Pipeline.parse(f"{both}, {rest}").run(model, calibration).model
    name = "model.layers.1.self_attn.q_proj"
    first, second = (one.layer(one.structure.layers[name]).float_weight() for one in (plain, rounded))
    assert not torch.equal(first, second)


def test_gptq_makes_up_for_the_errors_before_it(llama: Path) -> None:
    model = compress.load(llama)
    ids = torch.randint(3, 250, (16, 48), generator=torch.Generator().manual_seed(1))
    calibration = Calibration(Windows(ids, (0,) * 16, "test", ""), 0, "test")
    reference = outputs(model, ids)
    errors = {}
    for text in ("sequential=false", "mismatch=0", "mismatch=0.5", "mismatch=1"):
        made = Pipeline.parse(f"gptq(format=int3(group=32), {text})").run(model, calibration).model
        errors[text] = float((outputs(made, ids) - reference).square().mean())
    assert errors["mismatch=1"] < errors["mismatch=0.5"] < 0.9 * min(errors["mismatch=0"], errors["sequential=false"])


def outputs(model: Model, ids: torch.Tensor) -> torch.Tensor:
    from compress.quality.evaluate import stream_logits

    return torch.stack(list(stream_logits(model, ids)))


def test_what_asks_for_a_correction_that_cannot_be_is_refused() -> None:
    with pytest.raises(compress.CompressError, match="needs sequential=true"):
        Gptq(sequential=False, mismatch=0.5)
    with pytest.raises(compress.CompressError, match="may not set sequential"):
        Gptq(overrides={"*": {"sequential": False}})
    with pytest.raises(compress.CompressError, match="may not set mismatch"):
        Gptq(mismatch=0, overrides={"*": {"mismatch": 0.5}})
    assert Stat.CROSS not in Gptq(sequential=False).wants
