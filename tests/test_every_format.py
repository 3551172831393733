"""What every registered format owes. A new format is tested by being in the table and in `SAMPLES`."""

import re

import pytest
import torch

from compress.formats import FORMATS, NAMES, parse_format

# at least one text per line of the table
SAMPLES = [
    *(f"{name}(channel)" for name in NAMES),
    "int4(group=32)",
    "int3(group=16, asymmetric)",
    "int4(group=32, signed)",
]


def weight(rows: int = 5, columns: int = 70) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_every_line_of_the_table_has_a_sample() -> None:
    for pattern in FORMATS:
        assert any(re.fullmatch(pattern, text.partition("(")[0]) for text in SAMPLES), pattern


@pytest.mark.parametrize("text", SAMPLES)
def test_text_and_object_are_the_same(text: str) -> None:
    assert str(parse_format(text)) == text
    assert parse_format(text) == parse_format(str(parse_format(text)))
    assert hash(parse_format(text)) == hash(parse_format(str(parse_format(text))))


@pytest.mark.parametrize("text", SAMPLES)
def test_stored_tensors_have_the_planned_shapes_and_decode_to_the_chosen_values(text: str) -> None:
    form = parse_format(text)
    params = form.fit(weight())
    codes, values = form.quantize(weight(), params, torch.arange(70))
    stored = form.pack(codes, params, (5, 70))
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.tensors.items()} == form.tensor_specs((5, 70))
    assert stored.nbytes == form.stored_bytes((5, 70)) == round(stored.bits_per_weight * 350 / 8)
    assert torch.equal(stored.dequantize(), values)
    assert all(tensor.is_contiguous() for tensor in stored.tensors.values())


@pytest.mark.parametrize("text", SAMPLES)
def test_quantizing_what_was_decoded_changes_nothing(text: str) -> None:
    form = parse_format(text)
    params = form.fit(weight())
    first = form.quantize(weight(), params, torch.arange(70))[1]
    assert torch.equal(form.quantize(first, params, torch.arange(70))[1], first)


@pytest.mark.parametrize("name", ["int", "int1", "int9", "fp3", "", "INT4"])
def test_an_unknown_format_is_refused_with_those_that_exist(name: str) -> None:
    with pytest.raises(Exception, match=r"Unknown format|Cannot read"):
        parse_format(name)
