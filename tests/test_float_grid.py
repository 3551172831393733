"""`FloatGrid`: text, storage, scales, activations, and agreement with another project's quantizer."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress import floats
from compress.collect import LayerStats
from compress.data import calibrate
from compress.errors import UsageError
from compress.formats import parse_format
from compress.formats.base import QuantTensor
from compress.formats.float_grid import FloatGrid
from compress.hessian import accumulate, weighted_error
from compress.layer import Layer, LayerKind
from compress.passes.gptq import Gptq
from compress.passes.rtn import Rtn
from compress.pipeline import Pipeline

FORMATS = [
    "fp8_e4m3(channel)",
    "fp8_e5m2(tensor)",
    "fp8_e4m3(group=24)",
    "fp6_e3m2(group=32)",
    "fp5_e2m2(channel, scale=e8m0)",
    "fp3_e2m0(group=16, scale=float32)",
    "fp4_e2m1(channel, scale=float8_e4m3)",
    "mxfp4",
    "mxfp6_e2m3",
    "mxfp6_e3m2",
    "mxfp8_e4m3",
    "mxfp8_e5m2",
    "nvfp4",
]


def weights(rows: int = 7, columns: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def stored(form: FloatGrid, weight: torch.Tensor, **settings: object) -> QuantTensor:
    params = form.fit(weight, **settings)
    codes, _ = form.quantize(weight, params, torch.arange(weight.shape[1]))
    return form.pack(codes, params, tuple(weight.shape))


def loss(form: FloatGrid, weight: torch.Tensor, **settings: object) -> float:
    return float((stored(form, weight, **settings).dequantize() - weight).pow(2).mean())


@pytest.mark.parametrize("text", FORMATS)
def test_a_format_prints_as_it_is_written(text: str) -> None:
    assert str(parse_format(text)) == text
    assert parse_format(str(parse_format(text))) == parse_format(text)


@pytest.mark.parametrize(
    ("long", "short"),
    [
        ("fp4_e2m1(group=32, scale=e8m0)", "mxfp4"),
        ("fp4_e2m1(scale=float8_e4m3, group=16)", "nvfp4"),
        ("fp8_e5m2(e8m0, group=32)", "mxfp8_e5m2"),
        ("fp8_e4m3", "fp8_e4m3(channel)"),
        ("fp4_e2m1(group=32, float16)", "fp4_e2m1(group=32)"),
        ("fp8_e4m3(token, scale=float32)", "fp8_e4m3(token)"),
    ],
)
def test_settings_that_have_a_name_or_are_usual_print_short(long: str, short: str) -> None:
    assert str(parse_format(long)) == short
    assert parse_format(long) == parse_format(short)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fp6_e4m3", r"1 sign, 4 exponent and 3 mantissa bits are 8, not 6"),
        ("fp9_e4m4", r"3 to 8"),
        ("fp2_e1m0", r"3 to 8"),
        ("fp4_e0m3", r"at least 1 of them exponent"),
        ("fp8_e4m3(group=0)", r"group=0 is not a group"),
        ("fp8_e4m3(group=true)", r"group=True is not a group"),
        ("fp8_e4m3(chanel)", r"Did you mean 'channel'"),
        ("fp8_e4m3(channel, tensor)", r"given twice"),
        ("fp8_e4m3(channel, scale=e8m1)", r"unknown scale format 'e8m1'.*e8m0"),
        ("fp8_e4m3(channel, size=3)", r"unknown setting 'size'"),
        ("fp4_e2m1(tensor, scale=float8_e4m3)", r"must be more than one"),
        ("fp8_e4m3([channel])", r"unknown word"),
        ("fp8_e4m3(channel, scale=[e8m0])", r"unknown scale format"),
        ("fp8_e4m3(group=[32])", r"is not a group"),
        ("nvfp4(token)", r"takes no settings.*fp4_e2m1\(group=16, scale=float8_e4m3\)"),
        ("mxfp6_e2m2", r"Did you mean 'mxfp6_e"),
        ("nvfp5", r"Did you mean 'nvfp4'"),
    ],
)
def test_settings_that_make_no_sense_are_refused_with_what_would(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_format(text)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("search", [False, True])
def test_what_is_stored_survives_a_file_and_decodes_to_what_was_chosen(text: str, search: bool, tmp_path: Path) -> None:
    form, weight = parse_format(text), weights(columns=100)
    params = form.fit(weight, search=search)
    _, values = form.quantize(weight, params, torch.arange(100))
    packed = stored(form, weight, search=search)
    save_file(packed.tensors, tmp_path / "one.safetensors")
    again = QuantTensor(form, load_file(tmp_path / "one.safetensors"), (7, 100))
    assert torch.equal(again.dequantize(), values)
    assert {name: (tuple(t.shape), t.dtype) for name, t in again.tensors.items()} == form.tensor_specs((7, 100))
    assert packed.nbytes == form.stored_bytes((7, 100))


@pytest.mark.parametrize("text", FORMATS)
def test_every_weight_lands_on_the_nearest_value_of_its_scale(text: str) -> None:
    form, weight = parse_format(text), weights(columns=100)
    packed = stored(form, weight)
    _, scale = form.unpack(packed.tensors, (7, 100))
    size = form.group if isinstance(form.group, int) else 100
    elements = floats.magnitudes(form.kind)
    elements = elements[torch.isfinite(elements)]
    points = torch.cat([elements, -elements])
    for column in range(100):
        step = scale[:, min(column // size, scale.shape[1] - 1)]
        nearest = (points[None] * step[:, None] - weight[:, column : column + 1]).abs().amin(-1)
        found = (packed.dequantize()[:, column] - weight[:, column]).abs()
        assert torch.allclose(found, nearest, atol=1e-7), column


def test_quantizing_some_columns_equals_those_columns_of_the_whole() -> None:
    for text in ("nvfp4", "mxfp4", "fp8_e4m3(channel)"):
        form, weight = parse_format(text), weights()
        params, some = form.fit(weight), torch.tensor([95, 3, 40])
        whole = form.quantize(weight, params, torch.arange(96))[1]
        assert torch.equal(form.quantize(weight[:, some], params, some)[1], whole[:, some])


@pytest.mark.parametrize("text", FORMATS)
def test_columns_in_a_loop_are_rounded_as_they_are_together(text: str) -> None:
    form, weight, columns = (
        parse_format(text),
        weights(),
        torch.randperm(96, generator=torch.Generator().manual_seed(0)),
    )
    params = form.fit(weight)
    codes, values = form.quantize(weight[:, columns], params, columns)
    rounder, turned = form.rounder(params, columns), weight[:, columns].T.contiguous()
    found = [rounder(turned[at : at + 1], at) for at in range(96)]
    assert torch.equal(torch.cat([one for one, _ in found]).T, codes)
    assert torch.equal(torch.cat([one for _, one in found]).T, values)


@pytest.mark.parametrize(
    "text", ["nvfp4", "fp8_e4m3(channel)", "fp4_e2m1(group=32)", "fp6_e2m3(channel, scale=float16)"]
)
def test_a_scale_is_refitted_to_the_nearest_that_can_be_stored(text: str) -> None:
    form, weight = parse_format(text), weights()
    span, params = form.refit_span(96), form.fit(weight)
    before, codes = params["scale"].clone(), form.quantize(weight, params, torch.arange(96))[0]
    params["scale"] = before.clone()
    factor = torch.linspace(0.7, 1.5, 7)
    applied = form.rescale(params, 0, factor)
    assert torch.allclose(params["scale"][:, 0], before[:, 0] * applied, rtol=1e-6) and torch.equal(
        params["scale"][:, 1:], before[:, 1:]
    )
    assert bool(((applied - factor).abs() <= (1 - factor).abs()).all())  # nearer to what is wanted than no change
    decoded = form.pack(codes, params, (7, 96)).dequantize()
    old = form.pack(codes, {**params, "scale": before}, (7, 96)).dequantize()
    assert torch.allclose(decoded[:, :span], old[:, :span] * applied[:, None], rtol=1e-6)


def test_scales_that_no_row_has_for_itself_or_that_are_powers_of_two_are_not_refitted() -> None:
    assert [parse_format(text).refit_span(96) for text in ("mxfp4", "fp8_e4m3(tensor)", "nvfp4")] == [0, 0, 16]


def test_named_formats_take_the_bits_that_their_specifications_say() -> None:
    bits = {name: parse_format(name).stored_bytes((1024, 1024)) * 8 / 2**20 for name in ("mxfp4", "mxfp8_e4m3")}
    assert bits == {"mxfp4": 4.25, "mxfp8_e4m3": 8.25}
    assert parse_format("nvfp4").stored_bytes((1024, 1024)) == 2**20 // 2 + 2**20 // 16 + 4


def test_nvfp4_is_laid_out_as_its_readers_expect() -> None:
    weight = torch.zeros(1, 16)
    weight[0, :3] = torch.tensor([6.0, -1.5, 0.5])
    tensors = stored(parse_format("nvfp4"), weight).tensors
    assert tensors["codes"][0, :2].tolist() == [0b1011_0111, 0b0001]  # first of a pair in the low half
    assert tensors["scale"].view(torch.float8_e4m3fn).item() == 448.0
    assert tensors["global_scale"].tolist() == [448.0]  # 448 · 6 / 6, a multiplier


def test_layers_that_share_a_peak_have_one_global_scale() -> None:
    form, small, large = parse_format("nvfp4"), weights(seed=1), weights(seed=2) * 3
    assert form.shares_peak and not parse_format("mxfp4").shares_peak and not parse_format("int4").shares_peak
    peak = float(large.abs().max())
    both = [stored(form, weight, peak=peak) for weight in (small, large)]
    assert torch.equal(both[0].tensors["global_scale"], both[1].tensors["global_scale"])
    assert float(both[0].tensors["global_scale"]) == pytest.approx(448 * 6 / peak)
    assert float((both[0].dequantize() - small).pow(2).mean()) < 1.2 * loss(form, small)


def test_a_shared_peak_below_the_weights_own_is_refused() -> None:
    with pytest.raises(ValueError, match="below this weight's own"):
        parse_format("nvfp4").fit(weights(), peak=0.01)


@pytest.mark.parametrize("text", ["fp8_e4m3(channel)", "fp4_e2m1(group=32)", "fp6_e2m3(tensor)", "mxfp4", "nvfp4"])
def test_the_search_never_leaves_a_group_worse(text: str) -> None:
    form, weight = parse_format(text), weights(64)
    groups = form._groups(weight)
    errors = []
    for search in (False, True):
        params = form.fit(weight, search=search)
        scale = params["scale"][: groups.shape[0]] / params.get("global_scale", 1.0)
        errors.append(floats.scale_error(groups, scale, form.kind, None))
    assert bool((errors[1] <= errors[0]).all())
    assert float(errors[1].sum()) < float(errors[0].sum())


@pytest.mark.parametrize("text", ["fp4_e2m1(channel)", "fp4_e2m1(tensor)", "nvfp4"])
def test_importance_moves_the_error_to_where_it_matters_less(text: str) -> None:
    form, weight = parse_format(text), weights(columns=96)
    importance = torch.ones(96)
    importance[::4] = 100.0
    plain, weighed = (
        (stored(form, weight, search=True, importance=what).dequantize() - weight).abs().pow(2.4)
        for what in (None, importance)
    )
    assert float((weighed * importance).sum()) < float((plain * importance).sum())


@pytest.mark.parametrize("text", FORMATS)
def test_zeros_stay_zeros(text: str) -> None:
    form = parse_format(text)
    for search in (False, True):
        assert torch.count_nonzero(stored(form, torch.zeros(2, 96), search=search).dequantize()) == 0
    mixed = weights()
    mixed[:, :48] = 0
    assert torch.count_nonzero(stored(form, mixed).dequantize()[:, :48]) == 0


@pytest.mark.parametrize("text", FORMATS)
def test_nan_and_infinity_are_never_hidden(text: str) -> None:
    for broken in (torch.nan, torch.inf):
        weight = weights()
        weight[0, 0] = broken
        for search in (False, True):
            found = stored(parse_format(text), weight, search=search).dequantize()
            assert not bool(torch.isfinite(found).all()), (broken, search)


def test_tiny_weights_keep_their_digits() -> None:
    for text in ("fp8_e4m3(channel)", "mxfp4", "nvfp4"):
        form = parse_format(text)
        assert loss(form, weights() * 2.0**-40) == pytest.approx(loss(form, weights()) * 2.0**-80, rel=1e-3)


def test_a_short_last_group_is_stored_and_is_told() -> None:
    form = parse_format("mxfp4")
    assert form.fills_groups(96) and not form.fills_groups(100)
    assert stored(form, weights(columns=100)).tensors["scale"].shape == (7, 4)
    assert parse_format("fp8_e4m3(channel)").fills_groups(100)


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
