"""`Codebook`: what it stores, decodes and counts, and how well it can do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import compress
from compress.errors import UsageError
from compress.formats import parse_format
from compress.formats.codebook import Codebook
from compress.maths import codebooks, grid
from compress.pipeline import Pipeline


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def stored(form: Codebook, weight: torch.Tensor):  # type: ignore[no-untyped-def]
    params = form.fit(weight)
    codes, values = form.quantize(weight, params, torch.arange(weight.shape[1]))
    return form.pack(codes, params, tuple(weight.shape)), values  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("groups", [1, 2])
def test_every_weight_decodes_as_the_plain_formula_says(axis: str, groups: int) -> None:
    form = Codebook(vector=3, entries=8, stages=2, axis=axis, groups=groups)
    quantized, _ = stored(form, gaussian(7, 12))
    codes, book, scale = form.unpack(quantized.tensors, (7, 12))
    expected = torch.empty(7, 12)
    for row in range(7):
        for column in range(12):
            along, across = (column, row) if axis == "in" else (row, column)
            place = codes[across, along // 3] if axis == "in" else codes[along // 3, across]
            group = column // (12 // groups)
            value = sum(float(book[group, stage, int(place[stage]), along % 3]) for stage in range(2))
            expected[row, column] = value * float(scale[row, 0] if axis == "in" else scale[0, column])
    assert torch.allclose(quantized.dequantize(), expected, atol=1e-6)


@pytest.mark.parametrize("bits", range(1, 17))
def test_codes_of_every_width_are_packed_and_read_back(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 13), generator=torch.Generator().manual_seed(bits), dtype=torch.int32)
    packed = grid.pack_bits(codes, bits)
    assert packed.shape == (3, grid.packed_bytes(1, 13, bits))
    assert torch.equal(grid.unpack_bits(packed, bits, 13).int(), codes)
    stream = "".join(f"{int(byte):08b}"[::-1] for byte in packed[1])
    assert [int(stream[at * bits : (at + 1) * bits][::-1], 2) for at in range(13)] == codes[1].tolist()


def test_a_search_with_enough_candidates_finds_the_best_sum_of_entries() -> None:
    book, vectors = gaussian(2 * 8, 3).reshape(2, 8, 3), gaussian(50, 3, 1)
    pairs = (book[0][:, None] + book[1]).reshape(64, 3)
    best = torch.cdist(vectors, pairs).min(1).values
    exact = codebooks.decode(codebooks.assign(vectors, book, 8), book)
    greedy = codebooks.decode(codebooks.assign(vectors, book, 1), book)
    assert torch.allclose((vectors - exact).norm(dim=1), best, atol=1e-5)
    assert float((vectors - greedy).norm()) > float((vectors - exact).norm())


def test_more_candidates_never_do_worse() -> None:
    book, vectors = gaussian(3 * 16, 4).reshape(3, 16, 4), gaussian(200, 4, 1)
    found = [codebooks.decode(codebooks.assign(vectors, book, beam), book) for beam in (1, 4, 64)]
    errors = [float((vectors - each).square().sum()) for each in found]
    assert errors[0] > errors[1] >= errors[2]


@pytest.mark.parametrize(
    ("text", "bits", "least", "most"),
    [
        # Lloyd-Max scalar quantizers of a Gaussian: 0.3634, 0.1175, 0.03454 (Max 1960)
        ("codebook(vector=1, entries=2, stages=1)", 1, 0.355, 0.372),
        ("codebook(vector=1, entries=4, stages=1)", 2, 0.115, 0.120),
        ("codebook(vector=1, entries=8, stages=1)", 3, 0.0335, 0.0355),
        # vectors do better than scalars at the same bits, and never than the rate-distortion bound 4^-b
        ("codebook(vector=4, entries=256, stages=1)", 2, 0.0625, 0.105),
        ("codebook(vector=8, entries=256, stages=2)", 2, 0.0625, 0.115),
    ],
)
def test_the_distortion_of_a_gaussian_is_what_theory_says(text: str, bits: int, least: float, most: float) -> None:
    weight = gaussian(512, 256)
    quantized, _ = stored(parse_format(text), weight)  # type: ignore[arg-type]
    form = quantized.format
    assert isinstance(form, Codebook)
    assert form.bits * form.stages == bits * form.vector
    assert least < float((quantized.dequantize() - weight).square().mean()) < most


def test_a_shared_codebook_is_counted_once_among_its_holders() -> None:
    alone, shared = Codebook(4, 256, 1), Codebook(4, 256, 1, share=8)
    codes, book, scale = 64 * 32, 256 * 4 * 2, 64 * 2
    assert alone.stored_bytes((64, 128)) == codes + book + scale
    assert shared.stored_bytes((64, 128)) == codes + book // 8 + scale


def test_rows_that_do_not_fill_a_vector_are_padded_and_cut_off_again() -> None:
    quantized, values = stored(Codebook(vector=6, entries=16, stages=1, axis="out"), gaussian(20, 9))
    assert quantized.tensors["codes"].shape[0] == 4
    assert quantized.dequantize().shape == (20, 9)
    assert torch.equal(quantized.dequantize(), values)


def test_a_weight_of_zeros_stays_zero() -> None:
    for text in ("codebook(vector=4, entries=4, stages=2)", "codebook(vector=4, entries=4, stages=1, out)"):
        quantized, _ = stored(parse_format(text), torch.zeros(8, 8))  # type: ignore[arg-type]
        assert torch.equal(quantized.dequantize(), torch.zeros(8, 8))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("codebook(entries=100)", "power of two"),
        ("codebook(vector=0)", "1 to 64"),
        ("codebook(stages=5)", "1 to 4"),
        ("codebook(up)", "unknown word 'up'"),
        ("codebook(out, axis=in)", "given twice"),
        ("codebook(scale=diagonal)", "is not allowed"),
        ("codebook(entrys=4)", "entries"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_what_is_allowed(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_format(text)


def test_columns_that_cannot_be_cut_into_groups_of_whole_vectors_are_refused() -> None:
    with pytest.raises(UsageError, match="cannot be cut into 5 groups"):
        Codebook(vector=4, groups=5).fit(gaussian(8, 16))


def test_a_codebook_said_to_be_shared_is_refused_by_passes_that_give_each_layer_its_own(llama: Path) -> None:
    with pytest.raises(UsageError, match="held by several layers"):
        Pipeline.parse("rtn(format=codebook(vector=4, entries=16, stages=1, share=9))").run(compress.load(llama))


def test_columns_that_do_not_fit_are_refused_before_the_work_naming_the_layer(llama: Path) -> None:
    with pytest.raises(UsageError, match=r"q_proj.*cannot be cut into 3 groups"):
        Pipeline.parse("rtn(format=codebook(vector=4, entries=16, stages=1, groups=3))").run(compress.load(llama))


def test_large_codebooks_are_searched_without_a_table_of_all_pairs() -> None:
    book, vectors = gaussian(2 * 4096, 2).reshape(2, 4096, 2), gaussian(3, 2, 1)
    few = codebooks.assign(vectors, book, 8)
    many = codebooks.assign(vectors.repeat(600, 1), book, 8)
    assert torch.equal(few.repeat(600, 1), many)
