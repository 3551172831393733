"""What every registered format owes. A new one is tested by being in the table and in helpers/formats.py."""

import re
from math import prod

import pytest
import torch

from compress.errors import UsageError
from compress.formats import FORMATS, NAMES, parse_format
from helpers.formats import SAMPLES, name_of, shape_of


def weight(text: str) -> torch.Tensor:
    return torch.randn(shape_of(text), generator=torch.Generator().manual_seed(0))


def test_every_line_of_the_table_has_a_sample() -> None:
    for pattern in FORMATS:
        assert any(re.fullmatch(pattern, name_of(text)) for text in SAMPLES), pattern


def test_every_line_of_the_table_is_offered_to_a_user_by_some_name() -> None:
    for pattern in FORMATS:
        assert any(re.fullmatch(pattern, name) for name in NAMES), pattern


def test_every_name_offered_to_a_user_has_a_sample() -> None:
    assert set(NAMES) <= set(map(name_of, SAMPLES))


@pytest.mark.parametrize("text", SAMPLES)
def test_text_and_object_are_the_same(text: str) -> None:
    assert str(parse_format(text)) == text
    assert parse_format(text) == parse_format(str(parse_format(text)))
    assert hash(parse_format(text)) == hash(parse_format(str(parse_format(text))))


@pytest.mark.parametrize("text", SAMPLES)
def test_stored_tensors_have_the_planned_shapes_and_decode_to_the_chosen_values(text: str) -> None:
    form = parse_format(text)
    params = form.fit(weight(text))
    codes, values = form.quantize(weight(text), params, torch.arange(shape_of(text)[1]))
    assert codes.dtype in (torch.uint8, torch.int32)
    assert values.dtype == torch.float32
    shape = shape_of(text)
    stored = form.pack(codes, params, shape)
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.tensors.items()} == form.tensor_specs(shape)
    assert stored.nbytes == form.stored_bytes(shape) == round(stored.bits_per_weight * prod(shape) / 8)
    assert torch.equal(stored.dequantize(), values)
    assert all(tensor.is_contiguous() for tensor in stored.tensors.values())


@pytest.mark.parametrize("text", SAMPLES)
def test_a_peak_that_is_the_weights_own_changes_nothing_and_a_larger_one_only_where_it_is_shared(text: str) -> None:
    form, own = parse_format(text), float(weight(text).abs().max())
    alone, same, larger = (form.fit(weight(text), peak=peak) for peak in (None, own, 2 * own))
    assert all(torch.equal(same[name], tensor) for name, tensor in alone.items())
    assert any(not torch.equal(larger[name], tensor) for name, tensor in alone.items()) == form.shares_peak


@pytest.mark.parametrize("text", SAMPLES)
def test_column_by_column_the_codes_and_values_are_those_of_the_whole(text: str) -> None:
    form = parse_format(text)
    params = form.fit(weight(text))
    rounder = form.rounder(params, torch.arange(shape_of(text)[1]))
    pairs = [rounder(weight(text).T[at : at + form.step], at) for at in range(0, shape_of(text)[1], form.step)]
    codes, values = form.quantize(weight(text), params, torch.arange(shape_of(text)[1]))
    assert torch.equal(torch.cat([each for each, _ in pairs]).T, codes)
    assert pairs[0][0].dtype == codes.dtype
    assert torch.equal(torch.cat([each for _, each in pairs]).T, values)


@pytest.mark.parametrize("text", SAMPLES)
def test_quantizing_what_was_decoded_changes_nothing(text: str) -> None:
    form = parse_format(text)
    params = form.fit(weight(text))
    first = form.quantize(weight(text), params, torch.arange(shape_of(text)[1]))[1]
    assert torch.equal(form.quantize(first, params, torch.arange(shape_of(text)[1]))[1], first)


@pytest.mark.parametrize("name", ["int", "int1", "int9", "fp3", "", "INT4"])
def test_an_unknown_format_is_refused_with_those_that_exist(name: str) -> None:
    with pytest.raises(UsageError, match=r"Unknown format|Cannot read"):
        parse_format(name)
