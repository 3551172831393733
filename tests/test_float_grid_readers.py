"""Floating-point grids of activations, in passes, and beside those of compressed-tensors."""

from pathlib import Path

import pytest
import torch

import compress
from compress.engine.layer_stats import LayerStats
from compress.errors import UsageError
from compress.formats import parse_format
from compress.formats.base import QuantTensor
from compress.inputs.datasets import calibrate
from compress.layer import Layer, LayerKind
from compress.maths.hessian import accumulate, weighted_error
from compress.passes.gptq import Gptq
from compress.passes.rtn import Rtn
from compress.pipeline import Pipeline
from helpers.float_grids import stored, weights


def test_a_weight_cannot_be_rounded_per_token_nor_an_activation_per_channel() -> None:
    with pytest.raises(UsageError, match="rounds activations"):
        parse_format("fp8_e4m3(token)").fit(weights())
    with pytest.raises(UsageError, match="cannot round activations"):
        parse_format("fp8_e4m3(channel)").round_activation(weights())
    allowed = {text: parse_format(text).rounds_activations for text in ("fp8_e4m3(channel)", "nvfp4", "int8(channel)")}
    assert allowed == {"fp8_e4m3(channel)": False, "nvfp4": True, "int8(channel)": False}


@pytest.mark.parametrize("text", ["fp8_e4m3(tensor)", "fp8_e4m3(token)", "mxfp4", "mxfp8_e4m3", "nvfp4"])
def test_activations_are_rounded_as_a_weight_of_those_vectors_would_be(text: str) -> None:
    values = weights(6, 100).reshape(2, 3, 100)
    found = parse_format(text).round_activation(values)
    assert found.shape == values.shape
    form = parse_format(text.replace("token", "channel"))
    rows = values.reshape(-1, 100)
    parts = rows[None] if text.endswith("(tensor)") else rows[:, None]  # nvfp4: a global scale for each vector
    expected = torch.cat([stored(form, part).dequantize() for part in parts])
    assert torch.equal(found.reshape(-1, 100), expected)
    assert parse_format(text).round_activation(values[:0]).shape == (0, 3, 100)


@pytest.mark.parametrize("text", ["fp8_e4m3(token)", "mxfp4", "nvfp4"])
def test_a_tokens_rounding_does_not_depend_on_other_tokens(text: str) -> None:
    form, values = parse_format(text), weights()
    louder = torch.cat([values, 1000 * values])
    assert torch.equal(form.round_activation(louder)[:7], form.round_activation(values))


@pytest.mark.parametrize("text", ["fp8_e4m3(tensor)", "nvfp4"])
def test_a_static_grid_fitted_to_the_very_values_rounds_as_the_dynamic_one(text: str) -> None:
    form, values = parse_format(text), weights(1)
    params = form.fit_activation(values.amin(), values.amax())
    assert torch.allclose(form.round_static(values, params), form.round_activation(values), atol=1e-7)
    beyond = form.round_static(values * 100, params)
    assert float(beyond.abs().max()) == pytest.approx(float(values.abs().max()), rel=1e-5)


@pytest.mark.parametrize("text", ["fp8_e4m3(token)", "mxfp4"])
def test_grids_without_a_tensor_wide_scale_cannot_be_static(text: str) -> None:
    with pytest.raises(UsageError, match="no static grid"):
        parse_format(text).fit_activation(torch.tensor(-1.0), torch.tensor(1.0))


@pytest.mark.parametrize("text", ["nvfp4", "mxfp4", "fp6_e3m2(group=16)", "fp4_e2m1(channel)"])
def test_gptq_leaves_less_output_error_than_rounding(text: str) -> None:
    maker = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 48, generator=maker) @ torch.randn(48, 48, generator=maker)
    hessian = accumulate(None, inputs) / 300
    one = Layer("block.linear", LayerKind.LINEAR, weights(8, 48), users=("block.linear",))
    rounded = Rtn(format=text, clip=True).layer(one, LayerStats())
    solved = Gptq(format=text).layer(one, LayerStats(hessian, tokens=300))
    before, after = (weighted_error(made.float_weight() - one.float_weight(), hessian) for made in (rounded, solved))
    assert after < before


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_layers_that_a_runtime_fuses_get_one_global_scale(name: str, llama: Path, text_file: Path) -> None:
    model = compress.load(llama)
    made = Pipeline.parse(f"{name}(format=nvfp4)").run(model, calibrate(model, text_file, samples=4, length=32)).model
    found = {}
    for layer, spec in made.structure.layers.items():
        if isinstance(weight := made.layer(spec).weight, QuantTensor):
            found[layer.removeprefix("model.layers.0.")] = float(weight.tensors["global_scale"])
    attention = {found[f"self_attn.{part}_proj"] for part in "qkv"}
    assert len(attention) == 1 and found["mlp.gate_proj"] == found["mlp.up_proj"]
    assert len({*attention, found["self_attn.o_proj"], found["mlp.up_proj"], found["mlp.down_proj"]}) == 4


def others(weight: torch.Tensor, preset: str) -> tuple[torch.Tensor, object]:
    """compressed-tensors' own scales and rounding for one of its presets: values (out, in) and the scheme."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    scheme = preset_name_to_scheme(preset, ["Linear"])
    args = scheme.weights
    groups = weight.reshape(len(weight), -1, args.group_size) if args.group_size else weight[:, None]
    low, high = groups.amin(-1), groups.amax(-1)
    overall = generate_gparam(weight.amin(), weight.amax()) if preset.startswith("NVFP4") else None
    scale, zero = calculate_qparams(low, high, args, global_scale=overall)
    scale = scale.float() if scale.dtype != torch.uint8 else torch.exp2(scale.float() - 127)
    return fake_quantize(weight, scale, zero, args, global_scale=overall), scheme


@pytest.mark.parametrize(
    ("text", "preset"),
    [
        ("fp8_e4m3(channel)", "FP8_DYNAMIC"),
        ("nvfp4", "NVFP4A16"),
        ("mxfp4", "MXFP4A16"),
        ("mxfp6_e2m3", "MXFP6A16"),
        ("mxfp8_e4m3", "MXFP8A16"),
    ],
)
def test_rounding_equals_that_of_compressed_tensors(text: str, preset: str) -> None:
    weight = weights(16, 256)
    expected, _ = others(weight, preset)
    assert torch.equal(stored(parse_format(text), weight).dequantize(), expected)


@pytest.mark.parametrize(("text", "preset"), [("nvfp4", "NVFP4A16"), ("mxfp4", "MXFP4A16")])
def test_compressed_tensors_decodes_our_tensors_to_our_values(text: str, preset: str) -> None:
    _, scheme = others(weights(16, 256), preset)
    from compressed_tensors.compressors import BaseCompressor

    ours = stored(parse_format(text), weights(16, 256), search=True)
    state = {"weight_packed": ours.tensors["codes"], "weight_scale": ours.tensors["scale"]}
    if text == "nvfp4":
        state["weight_scale"] = state["weight_scale"].view(torch.float8_e4m3fn)
        state["weight_global_scale"] = ours.tensors["global_scale"]
    reader = BaseCompressor.get_value_from_registry(f"{text}-pack-quantized")
    found = reader.decompress(state, scheme)["weight"].float()
    assert torch.allclose(found, ours.dequantize(), rtol=0.005, atol=1e-6)  # it decodes in bfloat16
