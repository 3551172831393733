"""Mixtures of experts in compressed-tensors checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

import compress
from compress.export.checkpoint.target import COMPRESSED_TENSORS as TARGET
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.target import Refusal, plan_layers
from helpers.checkpoints import PROFILE, config_of, keys_of, verified
from helpers.models import SIZES, calibration, tokens

MIXTURES = {
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4}, "block_sparse_moe.experts.3.w3"),
    "qwen3-moe": (
        transformers.Qwen3MoeConfig,
        {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8, "decoder_sparse_step": 1},
        "mlp.experts.3.up_proj",
    ),
}


@pytest.fixture(scope="module", params=sorted(MIXTURES))
def mixture(request: pytest.FixtureRequest, save_random: Callable[..., Path]) -> tuple[Model, str]:
    kind, settings, member = MIXTURES[request.param]
    model = compress.load(save_random(request.param, kind(**SIZES, **settings, num_experts_per_tok=2)))
    return model, f"model.layers.0.{member}"


def test_a_mixture_goes_through_gptq_and_its_experts_load_in_transformers(
    mixture: tuple[Model, str], tmp_path: Path
) -> None:
    model, member = mixture
    result = Pipeline.parse("gptq(format=int4(group=16))").run(model, calibration(tokens(4, 32)))
    lowered = TARGET.write(result.model, PROFILE, tmp_path)
    assert {f"{member}.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")} <= keys_of(tmp_path)
    config = config_of(tmp_path)["quantization_config"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert any(name.endswith(".gate") for name in config["ignore"])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, spec in result.model.structure.layers.items():
        if ".experts." not in name:
            continue
        stack, _, index = name.rpartition(".")
        weight = result.model.layer(spec).float_weight()
        # transformers decodes experts in the dtype of their scales
        assert torch.equal(loaded.get_parameter(stack)[int(index)], weight.half().float()), name
    found = verified(result.model, lowered)
    assert found.level == "ran" and found.exact_relative_difference is not None
    assert found.exact_relative_difference < 1e-4


def test_experts_of_two_formats_or_beside_packed_layers_in_float_are_refused_when_planned(
    mixture: tuple[Model, str],
) -> None:
    model, _ = mixture

    def reasons(text: str) -> set[str]:
        made = Pipeline.parse(text).run(model).model
        answers = plan_layers(TARGET, made.structure.layers, PROFILE).values()
        return {answer.reason for answer in answers if isinstance(answer, Refusal)}

    (both,) = reasons('rtn(format=int4(group=16), overrides={"*.down_proj.*": {bits: 8}})')
    assert "one format for all experts" in both
    (float_ones,) = reasons('rtn(format=int4(group=16), targets=["kind:linear"])')
    assert "float experts beside packed layers" in float_ones
    assert reasons('rtn(format=fp8_e4m3(channel), targets=["kind:linear"])') == set()
    (unread,) = reasons("rtn(format=int4(group=16, asymmetric))")
    assert "of experts, transformers reads symmetric integers" in unread


def test_a_float_mixture_is_saved_as_transformers_saves_it(mixture: tuple[Model, str], tmp_path: Path) -> None:
    model, member = mixture
    TARGET.write(model, PROFILE, tmp_path)
    with safe_open(model.path / "model.safetensors", framework="pt") as handle:
        source = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    assert keys_of(tmp_path) == set(source) and f"{member}.weight" in source
    with safe_open(tmp_path / "model.safetensors", framework="pt") as handle:
        assert all(torch.equal(handle.get_tensor(name), tensor) for name, tensor in source.items())
