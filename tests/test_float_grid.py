"""`FloatGrid`: text, storage, scales, activations, and agreement with another project's quantizer."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import UsageError
from compress.formats import parse_format
from compress.formats.base import QuantTensor
from compress.maths import floats
from helpers.float_grids import FORMATS, loss, stored, weights


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


def test_a_short_last_group_is_stored() -> None:
    assert stored(parse_format("mxfp4"), weights(columns=100)).tensors["scale"].shape == (7, 4)
