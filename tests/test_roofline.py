"""Predicted latency follows from bytes, products and the profile, and is told as a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import compress
from compress import hwprofiles
from compress.errors import UnsupportedError
from compress.export import find
from compress.export.onnx import matmul_bnb4
from compress.export.onnx.lowering import Choice
from compress.formats import parse_format
from compress.hwprofiles import Profile, Runtime
from compress.layer import LayerKind, LayerSpec
from compress.models.attention import attentions
from compress.pipeline import Pipeline, planned
from compress.plan import latency_arms, make_plan
from compress.profiles import as_profile
from compress.recipe import of_passes
from compress.records import PredictedLatency
from compress.speed import roofline
from compress.target import Refusal, plan_layers

CONFIG = SimpleNamespace(num_attention_heads=1, num_key_value_heads=1, hidden_size=64, num_hidden_layers=0)


def spec(name: str = "a", form: str | None = None, kind: LayerKind = LayerKind.LINEAR) -> LayerSpec:
    made = LayerSpec(name, kind, (1000, 2000), (name,), segment=0, source_dtype=torch.float32)
    return made if form is None else LayerSpec(**{**made.__dict__, "format": parse_format(form)})


def predict(
    *specs: LayerSpec,
    stored: int = 0,
    config: object = CONFIG,
    rounded: Sequence[str] = (),
    profile: Profile | None = None,
    threads: int = 2,
) -> dict[tuple[str, int, int], PredictedLatency]:
    """By phase, batch and prompt. With a profile's own figures of int4 in blocks of 32 where it has some."""
    machine = profile or hwprofiles.load("cpu-x86-avx2")
    runtime = machine.runtime("onnxruntime")
    speed = runtime.support("weight_only", 4).speed(32)
    lowered = roofline.Lowered(
        {each.name: stored for each in specs}, rounded, {each.name: speed for each in specs} if speed else {}
    )
    rates = roofline.rates(machine, threads, runtime)
    blocks = attentions(config)
    arms = [roofline.arm(specs, how, config, blocks, rates, "float32") for how in (lowered, None)]
    return {(one.phase, one.batch, one.prompt): one for one in roofline.predict(*arms, machine, decodes=True)}


def decode(*specs: LayerSpec, **settings: Any) -> PredictedLatency:
    return predict(*specs, **settings)["decode", 1, 128]


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
        found = predict(spec(form="int4(group=32)"), stored=1_125_000, rounded=rounded)
        times[rounded] = found["prefill", 1, 128]
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


def figure(value: float) -> dict[str, object]:
    return {"value": value, "state": "measured", "source": "made up"}


def calibrated(tmp_path: Path, *, node_us: float | None = None) -> Profile:
    """A profile with figures of int4 at two blocks and of float32."""
    told = hwprofiles.load("cpu-x86-avx2").model_dump(mode="json")
    runtime = told["runtimes"]["onnxruntime"]
    if node_us is not None:
        runtime["node_us"] = figure(node_us)
    for entry in runtime["formats"]:
        if (entry["use"], entry["bits"]) == ("weight_only", [4]):
            rates = {32: (25.0, 500.0), 128: (20.0, 800.0)}
            entry["speeds"] = [
                {"block": block, "kernel_gb_s": figure(read), "kernel_gflops": figure(further)}
                for block, (read, further) in rates.items()
            ]
        if (entry["use"], entry["bits"]) == ("float", [32]):
            entry["speeds"] = [{"kernel_gb_s": figure(40.0), "kernel_gflops": figure(400.0)}]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**told, "id": "mine"}))
    return hwprofiles.load(path)


def test_a_kernels_own_figures_take_the_place_of_the_machines_peaks(tmp_path: Path) -> None:
    """A row reads the stored bytes, and each further one multiplies: 2 operations for each of 2 million weights."""
    found = predict(spec(form="int4(group=32)"), stored=1_125_000, profile=calibrated(tmp_path), rounded=("a",))
    first, float_first = 1_125_000 / 25e9, 8_000_000 / 40e9
    assert found["decode", 1, 128].variant_s == pytest.approx(first)
    assert found["decode", 1, 128].baseline_s == pytest.approx(float_first)
    assert found["decode", 4, 128].variant_s == pytest.approx(first + 3 * 4e6 / 500e9)
    prefill = found["prefill", 1, 128]
    assert prefill.variant_s == pytest.approx(first + 127 * 4e6 / 500e9)
    assert prefill.baseline_s == pytest.approx(float_first + 127 * 4e6 / 400e9)
    assert (found["decode", 1, 128].bound, prefill.bound) == ("memory", "arithmetic")


def test_figures_of_the_whole_machine_are_not_multiplied_by_its_threads(tmp_path: Path) -> None:
    one, many = (decode(spec(), profile=calibrated(tmp_path), threads=threads) for threads in (1, 16))
    assert one == many


def test_a_node_costs_its_time_for_every_layer_attention_and_small_operator(tmp_path: Path) -> None:
    config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, hidden_size=64, num_hidden_layers=3)
    free, costly = (decode(spec(), config=config, profile=calibrated(tmp_path, node_us=us)) for us in (None, 1000))
    nodes = 1 + 3 + 3 * roofline.SMALL_NODES
    assert costly.baseline_s - free.baseline_s == pytest.approx(nodes * 1e-3)
    assert (free.bound, costly.bound) == ("memory", "overhead")


def test_a_block_that_was_not_timed_goes_by_the_nearest_one_that_was(tmp_path: Path) -> None:
    support = calibrated(tmp_path).runtime("onnxruntime").support("weight_only", 4)
    blocks = {block: speed.block for block in (0, 16, 32, 64, 128, 256) if (speed := support.speed(block))}
    assert blocks == {0: 32, 16: 32, 32: 32, 64: 32, 128: 128, 256: 128}


def test_a_plan_goes_by_the_figures_of_the_kernel_that_each_layer_is_lowered_to(llama: Path, tmp_path: Path) -> None:
    model = compress.load(llama)
    profile = calibrated(tmp_path)
    recipe = of_passes("rtn(format=int4(group=32))")
    plan, specs = make_plan(model, recipe, profile), planned(Pipeline.parse(recipe.passes).resolve(model))
    variant, baseline = latency_arms(model, specs, plan_layers(find("onnx"), specs, profile), profile)
    setting = roofline.Setting("decode", 1, 128)
    ours, plain = variant.layers(setting), baseline.layers(setting)
    for row in plan.layers:
        if row.kind == "linear":
            rate = 25e9 if row.operator == "MatMulNBits" else 40e9
            stored = row.stored_bytes if row.passes else 4 * row.shape[0] * row.shape[1]
            assert ours[row.layer].seconds == pytest.approx(stored / rate)
            assert plain[row.layer].seconds == pytest.approx(4 * row.shape[0] * row.shape[1] / 40e9)
    told = next(one for one in plan.predicted_latency if (one.phase, one.batch, one.prompt) == setting)
    assert (told.variant_s, told.baseline_s) == (variant.whole(setting).seconds, baseline.whole(setting).seconds)


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


def test_a_kernel_that_decodes_to_float_is_predicted_no_faster_than_float() -> None:
    machine = roofline.Rates(1e10, {"float32": 1e11})
    spec = LayerSpec("a", LayerKind.LINEAR, (256, 256), ("a",), format=parse_format("codebook"))
    part, plain = (
        roofline._part(each, roofline.Lowered({"a": 100}, decoded=decoded), machine, "float32", None)
        for each, decoded in ((spec, ["a"]), (replace(spec, format=None), ()))
    )
    assert part == plain
    assert roofline._part(spec, roofline.Lowered({"a": 100}), machine, "float32", None).weight_bytes == 100
