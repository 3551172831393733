"""Predicted latency follows from bytes, products and the profile, and is told as a prediction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import compress
from compress import hwprofiles
from compress.errors import UnsupportedError
from compress.export.onnx import matmul_bnb4
from compress.export.onnx.lowering import Choice
from compress.formats import parse_format
from compress.hwprofiles import Runtime
from compress.layer import LayerKind, LayerSpec
from compress.models.attention import attentions
from compress.plan import make_plan
from compress.profiles import as_profile
from compress.recipe import of_passes
from compress.records import PredictedLatency
from compress.speed import roofline
from compress.target import Refusal

CONFIG = SimpleNamespace(num_attention_heads=1, num_key_value_heads=1, hidden_size=64, num_hidden_layers=0)


def spec(name: str = "a", form: str | None = None, kind: LayerKind = LayerKind.LINEAR) -> LayerSpec:
    made = LayerSpec(name, kind, (1000, 2000), (name,), segment=0, source_dtype=torch.float32)
    return made if form is None else LayerSpec(**{**made.__dict__, "format": parse_format(form)})


def decode(*specs: LayerSpec, stored: int = 0, config: object = CONFIG, **settings: object) -> PredictedLatency:
    profile = hwprofiles.load("cpu-x86-avx2")
    found = roofline.predict(
        specs,
        {each.name: stored for each in specs},
        config,
        profile,
        float_dtype="float32",
        threads=2,
        decodes=True,
        **settings,  # type: ignore[arg-type]
    )
    return next(one for one in found if one.phase == "decode" and one.batch == 1)


def test_a_large_layer_decodes_in_the_time_of_reading_its_weights() -> None:
    bandwidth = hwprofiles.load("cpu-x86-avx2").memory.bandwidth_gb_s.value * 1e9
    found = decode(spec(form="int4(group=32)"), stored=1_125_000, rounded=("a",))
    assert found.bound == "memory"
    assert found.baseline_s == pytest.approx(4 * 2_000_000 / bandwidth)
    assert found.variant_s == pytest.approx(1_125_000 / bandwidth)


def test_layers_follow_one_another() -> None:
    one, two = decode(spec()), decode(spec("a"), spec("b"))
    assert two.baseline_s == pytest.approx(2 * one.baseline_s)


def test_prefill_is_bound_by_arithmetic_and_faster_where_inputs_are_rounded() -> None:
    profile = hwprofiles.load("cpu-x86-avx2")
    peak = profile.peak.dense_gflops_per_core["float32"].value * 2e9
    times = {}
    for rounded in ((), ("a",)):
        found = roofline.predict(
            [spec(form="int4(group=32)")],
            {"a": 1_125_000},
            CONFIG,
            profile,
            float_dtype="float32",
            threads=2,
            decodes=True,
            rounded=rounded,
        )
        times[rounded] = max(found, key=lambda one: one.batch * one.prompt if one.phase == "prefill" else 0)
    plain = times[()]
    assert plain.bound == "arithmetic"
    assert plain.variant_s == pytest.approx(2 * 2_000_000 * plain.batch * plain.prompt / peak)
    assert times[("a",)].variant_s < plain.variant_s


def test_an_embedding_is_looked_up_and_costs_nothing() -> None:
    assert decode(spec(kind=LayerKind.EMBEDDING)).baseline_s == 0


def test_of_the_experts_only_those_that_a_token_reaches_are_read() -> None:
    config = SimpleNamespace(**CONFIG.__dict__, num_local_experts=8, num_experts_per_tok=2)
    shared = decode(spec(kind=LayerKind.EXPERT), config=config)
    assert shared.baseline_s == pytest.approx(decode(spec()).baseline_s / 4)


def test_a_longer_context_costs_the_reading_of_its_keys_and_values() -> None:
    config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, hidden_size=64, num_hidden_layers=3)
    bandwidth = hwprofiles.load("cpu-x86-avx2").memory.bandwidth_gb_s.value * 1e9
    found = decode(config=config)
    assert found.baseline_s == pytest.approx(3 * 2 * found.prompt * 2 * 16 * 4 / bandwidth)


def test_a_plan_predicts_every_setting_of_the_profiles_grid(llama: Path) -> None:
    profile = as_profile("cpu-x86-avx512-vnni")
    plan = make_plan(compress.load(llama), of_passes("rtn(format=int4(group=32))"), profile)
    wanted = len(profile.grid.prefill) + len(profile.grid.decode)
    assert len(plan.predicted_latency) == wanted
    assert all(0 < one.variant_s < one.baseline_s for one in plan.predicted_latency if one.phase == "decode")


def test_a_kernel_that_rounds_inputs_is_predicted_so_whatever_format_it_reads(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who says so is the target's answer for a layer, not its format."""
    model, profile = compress.load(llama), as_profile("cpu-x86-avx512-vnni")

    def prefill(text: str) -> float:
        plan = make_plan(model, of_passes(text), profile)
        return max(one.variant_s for one in plan.predicted_latency if one.phase == "prefill")

    integer, lookup = prefill("rtn(format=int8(channel))"), prefill("rtn(format=nf4)")
    assert integer < lookup
    plain = matmul_bnb4.choose

    def rounding(layer: LayerSpec, runtime: Runtime) -> Choice | Refusal | None:
        found = plain(layer, runtime)
        return replace(found, rounds_inputs=True) if isinstance(found, Choice) else found

    monkeypatch.setattr(matmul_bnb4, "choose", rounding)
    assert prefill("rtn(format=nf4)") < lookup


def test_reading_keys_and_values_takes_each_block_by_itself() -> None:
    block = SimpleNamespace(num_attention_heads=8, num_key_value_heads=2, hidden_size=64, num_hidden_layers=3)
    assert attentions(block) == ((8, 2, 8),) * 3
    block.head_dim = 16
    assert attentions(block)[0] == (8, 2, 16)
    with pytest.raises(UnsupportedError, match="'mamba' has no attention heads"):
        attentions(SimpleNamespace(model_type="mamba"))


def test_a_chip_whose_engines_are_built_elsewhere_is_predicted_in_its_own_type(llama: Path) -> None:
    recipe, model = of_passes("rtn(format=int4(group=32))"), compress.load(llama)
    for name in ("nvidia-l4", "nvidia-h100-sxm"):
        profile = as_profile(name)
        plan = make_plan(model, recipe, profile)
        moved = sum(row.shape[0] * row.shape[1] for row in plan.layers) * 2  # float16
        decode = next(one for one in plan.predicted_latency if one.phase == "decode")
        assert decode.baseline_s < 1.5 * moved / (profile.memory.bandwidth_gb_s.value * 1e9)
