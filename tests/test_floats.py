"""Small floats and their scales, against torch's own types, a library of others, and slow, obvious twins."""

from fractions import Fraction

import pytest
import torch

from compress.maths import floats
from compress.maths.floats import E4M3, E5M2, ExMy

# every split of 3 to 8 bits
KINDS = [ExMy(x, bits - 1 - x) for bits in range(3, 9) for x in range(1, bits)]
NATIVE = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


def slow_value(code: int, kind: ExMy) -> Fraction | None:
    """The number of a code without sign, straight from the definition; None where it is reserved."""
    field, part = divmod(code, 2**kind.mantissa)
    if (kind == E4M3 and code == 0x7F) or (kind == E5M2 and field == 31):
        return None
    bias = 2 ** (kind.exponent - 1) - 1
    if field == 0:
        return Fraction(part, 2**kind.mantissa) * Fraction(2) ** (1 - bias)
    return (1 + Fraction(part, 2**kind.mantissa)) * Fraction(2) ** (field - bias)


def slow_encode(value: float, kind: ExMy) -> int:
    """The nearest of all values; of two that are equally near, the even code."""
    size = Fraction(abs(value))
    found = [(abs(size - number), code % 2, code) for code, number in table(kind)]
    sign = (1 << (kind.exponent + kind.mantissa)) if str(value).startswith("-") else 0
    return min(found)[2] | sign


def table(kind: ExMy) -> list[tuple[int, Fraction]]:
    numbers = [(code, slow_value(code, kind)) for code in range(2 ** (kind.exponent + kind.mantissa))]
    return [(code, number) for code, number in numbers if number is not None]


def awkward(kind: ExMy) -> torch.Tensor:
    """Around every value and every middle of two, both signs, zeros, beyond the largest, below the smallest."""
    values = torch.tensor([float(number) for _, number in table(kind)])
    points = torch.cat([values, (values[1:] + values[:-1]) / 2, values[-1:] * 1.1, values[-1:] * 100, values[1:2] / 9])
    up, down = torch.nextafter(points, points + 1e30), torch.nextafter(points, torch.zeros_like(points))
    points = torch.cat([points, up, down])
    return torch.cat([points, -points])


@pytest.mark.parametrize("kind", NATIVE)
def test_encoding_equals_torchs_own_conversion_bit_for_bit(kind: ExMy) -> None:
    top, random = floats.largest(kind), torch.randn(20000, generator=torch.Generator().manual_seed(0))
    spread = random * torch.exp2(torch.linspace(-20, 12, 20000))
    values = torch.cat([awkward(kind), random, spread])
    values = values[values.abs() <= top]
    assert torch.equal(floats.encode(values, kind), values.to(NATIVE[kind]).view(torch.uint8))


@pytest.mark.parametrize("kind", NATIVE)
def test_decoding_equals_torchs_own_types_for_every_code(kind: ExMy) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(NATIVE[kind]).float()
    assert torch.equal(torch.nan_to_num(floats.decode(codes, kind), 1e9), torch.nan_to_num(expected, 1e9))
    assert torch.equal(torch.isnan(floats.decode(codes, kind)), torch.isnan(expected))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_split_takes_the_nearest_of_all_its_values(kind: ExMy) -> None:
    values = awkward(kind)
    some = values[torch.linspace(0, len(values) - 1, 120).long()] if kind.mantissa + kind.exponent > 5 else values
    expected = [slow_encode(value, kind) for value in some.tolist()]
    assert floats.encode(some, kind).tolist() == expected
    assert torch.equal(floats.round_to(values, kind), floats.decode(floats.encode(values, kind), kind))


@pytest.mark.parametrize(
    ("kind", "name"), [(ExMy(2, 1), "float4_e2m1fn"), (ExMy(2, 3), "float6_e2m3fn"), (ExMy(3, 2), "float6_e3m2fn")]
)
def test_elements_of_the_mx_formats_equal_those_of_ml_dtypes(kind: ExMy, name: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = awkward(kind)
    values = values[values.abs() < floats.overflow(kind)]
    expected = values.numpy().astype(getattr(ml_dtypes, name))
    assert torch.equal(floats.round_to(values, kind), torch.from_numpy(expected.astype("float32")))
    assert floats.encode(values, kind).tolist() == expected.view("uint8").tolist()


def test_the_largest_values_are_those_of_the_specifications() -> None:
    found = {kind: floats.largest(kind) for kind in (ExMy(2, 1), ExMy(2, 3), ExMy(3, 2), E4M3, E5M2)}
    assert list(found.values()) == [6.0, 7.5, 28.0, 448.0, 57344.0]
    assert [floats.overflow(kind) for kind in found] == [7.0, 7.75, 30.0, 464.0, 61440.0]


def test_what_is_too_large_becomes_the_largest_value() -> None:
    for kind in KINDS:
        huge = torch.tensor([1e30, -1e30, torch.inf])
        assert floats.round_to(huge, kind).tolist() == [
            floats.largest(kind),
            -floats.largest(kind),
            floats.largest(kind),
        ]


def test_one_exponent_bit_makes_a_uniform_grid() -> None:
    steps = floats.magnitudes(ExMy(1, 4)).diff()
    assert torch.equal(steps, steps[:1].expand_as(steps))


def slow_power(peak: float, limit: float) -> float:
    exponent = -126
    while not Fraction(peak) < Fraction(limit) * Fraction(2) ** exponent and exponent < 127:
        exponent += 1
    return 2.0**exponent


@pytest.mark.parametrize("limit", [6.0, 7.0, 8.0, 7.75, 464.0])
def test_power_of_two_scales_equal_the_slow_search(limit: float) -> None:
    peaks = torch.rand(40, generator=torch.Generator().manual_seed(0)) * torch.exp2(torch.arange(-20.0, 20.0))
    edges = torch.tensor([limit * 2.0**power for power in (-30, -3, 0, 5)])
    peaks = torch.cat([peaks, edges, torch.nextafter(edges, torch.zeros(4)), torch.tensor([0.0, 1e-45, 3e38])])
    assert floats.power_of_two(peaks, limit).tolist() == [slow_power(peak, limit) for peak in peaks.tolist()]


def test_every_power_of_two_scale_is_held_exactly_by_e8m0() -> None:
    scales = floats.power_of_two(torch.exp2(torch.arange(-126.0, 127.0)), 1.0)
    assert torch.equal(scales, torch.exp2(torch.arange(-125.0, 128.0)))
    assert torch.equal(scales.to(torch.float8_e8m0fnu).float(), scales)


def test_a_peak_that_is_not_finite_gives_a_scale_that_is_not() -> None:
    broken = torch.tensor([torch.nan, torch.inf])
    assert bool(torch.isnan(floats.power_of_two(broken, 7.0)).all())
    assert bool(torch.isnan(floats.as_stored(broken[:1], torch.float8_e4m3fn)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_stored_scales_are_never_zero_and_are_held_exactly(dtype: torch.dtype) -> None:
    scales = floats.as_stored(torch.tensor([0.0, 1e-12, 0.3, 5.0]), dtype)
    assert bool((scales > 0).all())
    assert torch.equal(scales.to(dtype).float(), scales)


def blocks(size: int = 32) -> torch.Tensor:
    return torch.randn(6, 9, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [ExMy(2, 1), ExMy(2, 3), E4M3])
def test_the_default_scale_rule_beats_floor_and_ceil_and_the_search_beats_each_of_them(kind: ExMy) -> None:
    groups = blocks()
    peaks, top = groups.abs().amax(-1), floats.largest(kind)
    rules = {"floor": 2.0 ** (int(torch.tensor(top).log2()) + 1), "ceil": top, "ours": floats.overflow(kind)}
    scales = {name: floats.power_of_two(peaks, limit) for name, limit in rules.items()}
    errors = {name: floats.scale_error(groups, scale, kind, None) for name, scale in scales.items()}
    assert float(errors["ours"].sum()) <= float(min(errors["floor"].sum(), errors["ceil"].sum()))
    assert float(errors["ours"].sum()) < float(errors["floor"].sum())
    found = floats.search_scale(groups, scales["ours"], 1.0, kind, torch.float8_e8m0fnu, None)
    best = floats.scale_error(groups, found, kind, None)
    assert all(bool((best <= error).all()) for error in errors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_the_search_equals_trying_every_scale_on_every_group_alone(dtype: torch.dtype) -> None:
    groups, kind, multiplier = blocks(16)[:2, :3], ExMy(2, 1), torch.tensor([40.0])
    start = floats.power_of_two(groups.abs().amax(-1) * 40, 7.0)
    importance = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))
    found = floats.search_scale(groups, start, multiplier, kind, dtype, importance)
    for row in range(2):
        for place in range(3):
            own, base = groups[row, place], start[row, place].reshape(1)
            tried = [float(base), *(float(scale) for scale in floats.nearby(base, dtype))]
            loss = []
            for scale in tried:
                values = floats.round_to(own * 40 / scale, kind) * scale / 40
                loss.append(float(((own - values).abs() ** 2.4 * importance[place]).sum()))
            assert loss[tried.index(float(found[row, place]))] == pytest.approx(min(loss), rel=1e-5)


def test_a_search_in_pieces_equals_one_in_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, kind = blocks(), ExMy(2, 1)
    start = floats.as_stored(groups.abs().amax(-1) / 6, torch.float16)
    whole = floats.search_scale(groups, start, 1.0, kind, torch.float16, None)
    monkeypatch.setattr(floats, "SEARCH_ELEMENTS", 300)
    assert torch.equal(floats.search_scale(groups, start, 1.0, kind, torch.float16, None), whole)
