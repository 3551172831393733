"""Grid maths and packing, against slow and obvious twins."""

import pytest
import torch

from compress.formats import parse_format
from compress.maths import grid

FORMATS = [
    "int4(group=32)",
    "int3(channel)",
    "int2(group=16, asymmetric)",
    "int8(tensor)",
    "int5(group=48, signed)",
    "int7(channel, asymmetric)",
    "int6(tensor, asymmetric)",
]


def weights(rows: int = 9, columns: int = 100, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 33])
def test_packed_codes_come_back(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (5, count), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = grid.pack_bits(codes, bits)
    assert packed.nbytes == grid.packed_bytes(5, count, bits)
    assert torch.equal(grid.unpack_bits(packed, bits, count), codes)


def test_packing_puts_the_first_code_in_the_lowest_bits() -> None:
    stream = 0
    codes = [5, 2, 7, 1, 6]
    for place, code in enumerate(codes):
        stream |= code << (3 * place)
    expected = [stream & 255, stream >> 8]
    assert grid.pack_bits(torch.tensor([codes], dtype=torch.uint8), 3)[0].tolist() == expected


@pytest.mark.parametrize("text", FORMATS)
def test_a_format_prints_and_parses_back(text: str) -> None:
    assert str(parse_format(text)) == text
    assert parse_format(str(parse_format(text))) == parse_format(text)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("search", [False, True])
def test_what_is_stored_decodes_to_what_was_chosen(text: str, search: bool) -> None:
    form, weight = parse_format(text), weights()
    params = form.fit(weight, search=search)
    codes, values = form.quantize(weight, params, torch.arange(100))
    packed = form.pack(codes, params, (9, 100))
    assert torch.equal(packed.dequantize(), values)
    assert packed.nbytes == form.stored_bytes((9, 100))
    specs = form.tensor_specs((9, 100))
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.tensors.items()} == specs


@pytest.mark.parametrize("text", FORMATS)
def test_every_weight_lands_on_the_nearest_point_of_its_group(text: str) -> None:
    form, weight = parse_format(text), weights()
    params = form.fit(weight)
    _, values = form.quantize(weight, params, torch.arange(100))
    bits, group = form.bits, form.group if isinstance(form.group, int) else 100
    for row in range(9):
        for column in range(100):
            place = column // group if params["scale"].shape[1] > 1 else 0
            scale, zero = float(params["scale"][row, place]), float(params["zero"][row, place])
            points = [(code - zero) * scale for code in range(2**bits)]
            nearest = min(abs(point - float(weight[row, column])) for point in points)
            assert abs(float(values[row, column] - weight[row, column])) == pytest.approx(nearest, abs=1e-6)


def test_quantizing_some_columns_equals_those_columns_of_the_whole() -> None:
    form, weight = parse_format("int4(group=32)"), weights()
    params, some = form.fit(weight), torch.tensor([99, 3, 40])
    whole = form.quantize(weight, params, torch.arange(100))[1]
    assert torch.equal(form.quantize(weight[:, some], params, some)[1], whole[:, some])


@pytest.mark.parametrize("text", FORMATS)
def test_the_rounder_of_a_loop_gives_what_quantizing_gives(text: str) -> None:
    form, weight = parse_format(text), weights()
    params, columns = form.fit(weight, search=True), torch.tensor([99, 3, 40, 41])
    codes, values = form.quantize(weight[:, columns], params, columns)
    rounder = form.rounder(params, columns)
    for at in range(4):
        chosen, rounded = rounder(weight.T[columns][at : at + 1], at)
        assert torch.equal(chosen[0].float(), codes[:, at]) and torch.equal(rounded[0], values[:, at])


@pytest.mark.parametrize("text", [text for text in FORMATS if "tensor" not in text])
def test_a_rescaled_group_is_stored_as_it_is_told(text: str) -> None:
    form, weight = parse_format(text), weights()
    params = {name: value.clone() for name, value in form.fit(weight).items()}
    codes, before = form.quantize(weight, params, torch.arange(100))
    span = form.refit_span(100)
    factor = torch.linspace(0.5, 1.5, 9)
    factor[4] = 1e-12  # a scale that float16 could not hold stays as it is
    done = form.rescale(params, 0, factor)
    after = form.pack(codes, params, (9, 100)).dequantize()
    assert torch.allclose(after[:, :span], before[:, :span] * done[:, None], rtol=1e-5, atol=0)
    assert torch.equal(after[:, span:], before[:, span:])
    kept = torch.arange(9) != 4
    assert torch.allclose(done[kept], factor[kept], rtol=1e-3) and done[4] == 1


def test_one_scale_for_all_is_not_refitted_row_by_row() -> None:
    assert parse_format("int8(tensor)").refit_span(100) == 0


def test_the_signed_scheme_puts_the_largest_magnitude_on_the_extra_code() -> None:
    weight = torch.tensor([[0.1, -0.2, 0.8, 0.4], [0.1, -0.8, 0.2, 0.4]])
    form = parse_format("int2(channel, signed)")
    params = form.fit(weight)
    codes, values = form.quantize(weight, params, torch.arange(4))
    assert codes[0, 2] == 0 and codes[1, 1] == 0
    assert params["scale"][0, 0] < 0 < params["scale"][1, 0]
    assert torch.allclose(values[0, 2], weight[0, 2], atol=1e-3)


def test_the_range_search_never_does_worse_than_the_extremes() -> None:
    groups = grid.to_groups(weights(), 25)
    for scheme in ("symmetric", "asymmetric", "signed"):
        plain = grid.fit_range(groups, 3, scheme)
        found = grid.search_range(groups, 3, scheme)
        before = grid.range_error(groups, plain[0].half().float(), plain[1], 3, None)
        assert bool((grid.range_error(groups, *found, 3, None) <= before).all())


def test_the_search_may_give_the_extra_code_to_the_smaller_side() -> None:
    """Twelve at −0.7 and one at 0.9 at 2 bits: the codes that reach 0.9 leave twelve errors, the others one."""
    groups = torch.tensor([[[0.9] + 12 * [-0.7]]])
    plain, found = grid.fit_range(groups, 2, "signed"), grid.search_range(groups, 2, "signed")
    assert plain[0].item() < 0 < found[0].item()


def test_a_group_of_zeros_stays_zero() -> None:
    for text in FORMATS:
        form, weight = parse_format(text), torch.zeros(2, 100)
        codes, _ = form.quantize(weight, form.fit(weight), torch.arange(100))
        assert torch.count_nonzero(form.pack(codes, form.fit(weight), (2, 100)).dequantize()) == 0


def test_dynamic_rounding_per_token_uses_each_vectors_own_range() -> None:
    values = torch.tensor([[[1.0, -0.5, 0.25]], [[100.0, 3.0, -20.0]]])
    found = grid.fake_quantize(values, 8, "symmetric", "token")
    for row, expected in zip(found.reshape(-1, 3), values.reshape(-1, 3), strict=True):
        step = float(expected.abs().max()) / 127
        assert bool(((row - expected).abs() <= step / 2 + 1e-6).all())
        assert torch.allclose(row / step, torch.round(row / step), atol=1e-3)


def test_dynamic_rounding_per_tensor_equals_onnx_dynamic_quantize_linear() -> None:
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])
    back = helper.make_node("DequantizeLinear", ["y", "s", "z"], ["o"])
    graph = helper.make_graph(
        [node, back],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 50])],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, [4, 50])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    values = weights(4, 50) * 3 + 1
    expected = ReferenceEvaluator(model).run(None, {"x": values.numpy()})[0]
    found = grid.fake_quantize(values, 8, "asymmetric", "tensor")
    step = float((values.max() - values.min()) / 255)
    # a value halfway between two points may go either way in float32
    assert float((found - torch.from_numpy(expected)).abs().max()) <= step * 1.01
    assert float(((found - torch.from_numpy(expected)).abs() > 1e-5).float().mean()) < 0.02
