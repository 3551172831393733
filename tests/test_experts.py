"""Mixtures of experts: one layer per expert, read once per stack, with statistics of the tokens routed to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import compress
from compress import hwprofiles
from compress.engine.layer_stats import Stat
from compress.engine.matching import resolve
from compress.engine.stream import BlockStream
from compress.export.onnx import experts as lowering
from compress.export.onnx import interfaces, target
from compress.export.onnx.runtime import Session
from compress.formats import parse_format
from compress.layer import LayerKind
from compress.models.model import Model
from compress.models.skeleton import OUTER
from compress.models.weights import Checkpoint
from compress.passes.rtn import Rtn
from compress.pipeline import Pipeline
from compress.quality.evaluate import stream_logits
from helpers import models
from helpers.models import calibration, tokens

SIZES = {**models.SIZES, "num_experts_per_tok": 2}
SHARED = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
PROFILE = hwprofiles.load("cpu-x86-avx512-vnni")
FIRST = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def folder(save_random: Callable[..., Path]) -> Path:
    return save_random("mixtral", transformers.MixtralConfig(**SIZES, num_local_experts=4))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return compress.load(folder)


def test_experts_are_layers_of_their_own_and_no_default_target_is_a_router(save_random: Callable[..., Path]) -> None:
    structure = compress.load(save_random("shared", transformers.Qwen2MoeConfig(**SIZES, **SHARED))).structure
    names = [name for name, spec in structure.layers.items() if spec.kind is LayerKind.EXPERT]
    assert names[:5] == [*(f"{FIRST}.gate_up_proj.{index}" for index in range(4)), f"{FIRST}.down_proj.0"]
    assert structure.layers[names[0]].shape == (64, 32) and structure.layers[names[4]].shape == (32, 32)
    laid = resolve([Rtn(format=parse_format("int4(group=16)"))], structure)
    assert all(laid.passes[name] for name in names)
    assert "router" in laid.skipped[0]["model.layers.0.mlp.shared_expert_gate"]
    assert "model.layers.0.mlp.gate.weight" in structure.plain[0]


def test_a_stack_of_experts_is_converted_once_for_all_of_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, converted = compress.load(folder), []
    convert = Checkpoint._convert

    def counted(self: Checkpoint, name: str, origin: Any) -> torch.Tensor:
        converted.append(name)
        return convert(self, name, origin)

    monkeypatch.setattr(Checkpoint, "_convert", counted)
    names = [f"{FIRST}.{key}.{index}" for index in range(4) for key in ("gate_up_proj", "down_proj")]  # as exported
    read = {name: model.layer(model.structure.layers[name]) for name in names}
    assert converted == [f"{FIRST}.gate_up_proj", f"{FIRST}.down_proj"]
    model.plain(OUTER)
    assert isinstance(model.weights, Checkpoint) and not model.weights._stacks
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.experts
    for name, layer in read.items():
        key, index = name.split(".")[-2:]
        assert torch.equal(layer.float_weight(), getattr(whole, key)[int(index)])


def test_rtn_rounds_each_expert_by_itself(model: Model) -> None:
    result = Pipeline.parse("rtn(format=int4(group=16))").run(model)
    form = parse_format("int4(group=16)")
    for index in range(4):
        name = f"{FIRST}.down_proj.{index}"
        stored, source = (
            result.model.layer(result.model.structure.layers[name]),
            model.layer(model.structure.layers[name]),
        )
        params = form.fit(source.float_weight(), search=False)
        _, values = form.quantize(source.float_weight(), params, torch.arange(64))
        assert stored.format == form and torch.equal(stored.float_weight(), values)


def test_statistics_of_an_expert_are_those_of_the_tokens_routed_to_it(model: Model, folder: Path) -> None:
    ids, seen = tokens(3, 16), []
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    reference.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    with torch.no_grad():
        reference(ids)
    hidden, picked, _ = seen[0]
    stream = BlockStream(model, [ids[:2], ids[2:]])
    stream.start(model.layers(OUTER))
    stream.load(0, model.layers(0), model.plain(0))
    found = stream.collect(0, [f"{FIRST}.gate_up_proj.{index}" for index in range(4)], {Stat.HESSIAN})
    for index in range(4):
        inputs = hidden[(picked == index).any(-1)]
        stats = found[f"{FIRST}.gate_up_proj.{index}"]
        assert stats.tokens == len(inputs) and stats.hessian is not None
        torch.testing.assert_close(stats.hessian, inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-5)


def test_gptq_names_the_experts_that_saw_too_few_tokens_or_none(model: Model) -> None:
    ids = torch.full((1, 6), 7)  # one token over and over: it takes the same two experts everywhere
    result = Pipeline.parse('gptq(format=int4(group=16), targets=["kind:expert"])').run(model, calibration(ids))
    notes = {item.layer: " ".join(item.notes) for item in result.passes[0].layers if item.changed}
    assert len(notes) == 16
    unseen = [name for name, note in notes.items() if "no calibration token reached it" in note]
    few = [name for name, note in notes.items() if "only 6 tokens for" in note]
    assert len(unseen) == 8 and len(few) == 8
    form = parse_format("int4(group=16)")
    weight = model.layer(model.structure.layers[unseen[0]]).float_weight()
    params = form.fit(weight, search=True)
    _, nearest = form.quantize(weight, params, torch.arange(weight.shape[1]))
    stored = result.model.layer(result.model.structure.layers[unseen[0]])
    torch.testing.assert_close(stored.float_weight(), nearest)  # the identity Hessian moves nothing


def test_sparsegpt_prunes_experts_that_saw_no_token_by_their_weights_and_gptq_keeps_the_zeros(model: Model) -> None:
    ids, experts = torch.full((1, 6), 7), 'targets=["kind:expert"]'
    text = f"sparsegpt(pattern=2:4, {experts}), gptq(format=int4(group=16), {experts})"
    result = Pipeline.parse(text).run(model, calibration(ids))
    notes = [" ".join(item.notes) for item in result.passes[0].layers if item.changed]
    assert sum("no calibration token reached it" in note for note in notes) == 8 and len(notes) == 16
    for item in result.passes[1].layers:
        if item.changed:
            weight = result.model.layer(result.model.structure.layers[item.layer]).float_weight()
            assert bool(((weight.reshape(len(weight), -1, 4) != 0).sum(-1) <= 2).all())


def test_a_plan_says_that_experts_are_computed_densely(model: Model) -> None:
    layers = model.structure.layers
    expert = target.plan_layer(layers[f"{FIRST}.down_proj.1"], PROFILE)
    assert (expert.operator, expert.kernel) == ("MatMul", "works") and lowering.NOTE in expert.note
    assert target.plan_layer(layers["model.layers.0.self_attn.q_proj"], PROFILE).kernel == "fast"


def test_the_bound_is_wider_only_where_rounded_activations_meet_a_router(model: Model) -> None:
    rounded = Pipeline.parse('rtn(format=int4(group=16), targets=["*.q_proj"])').run(model).model
    for one, bound in ((model, 0.0), (rounded, lowering.ROUTING_BOUND)):
        specs = one.structure.layers
        choices = {name: target.plan_layer(spec, PROFILE) for name, spec in specs.items()}
        assert lowering.bounds(choices, specs).shipped == bound


def test_turned_experts_with_biases_and_a_gate_of_their_own_agree(
    save_random: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt-oss without its sinks, which the target refuses: they are put so low that they take no weight."""
    config = transformers.GptOssConfig(**{**SIZES, "head_dim": 8}, num_local_experts=4)
    folder = save_random("gpt-oss", config)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for block in reference.model.layers:
        block.self_attn.sinks.data.fill_(-1e4)
    reference.save_pretrained(folder)
    model = compress.load(folder)
    assert model.structure.layers[f"{FIRST}.gate_up_proj.3"].shape == (128, 32)
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = reference(ids).logits
    torch.testing.assert_close(torch.stack(list(stream_logits(model, ids))), expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(interfaces, "_HARMLESS", interfaces._HARMLESS | {"s_aux"})
    target.write(model, PROFILE, tmp_path)
    np.testing.assert_allclose(Session(tmp_path, 1).logits(ids.numpy()), expected.numpy(), rtol=1e-3, atol=1e-4)
