"""Trellis codes: the stream of bits, the values of states, the search, and the format that holds them."""

from __future__ import annotations

import struct
from itertools import product

import pytest
import torch
from torch import Tensor

from compress.errors import UsageError
from compress.formats import parse_format
from compress.formats.trellis import Trellis
from compress.kernels import kernel_paths
from compress.kernels import trellis as kernel
from compress.maths import trellis

WIDTHS = range(1, 9)
compiled = pytest.mark.skipif(not kernel.has_kernel(), reason="the compiled kernels are not here")


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def search(wanted: Tensor, bits: int, code: str = "mul1") -> Tensor:
    find = kernel.search if kernel.has_kernel() else trellis.search
    return find(wanted, bits, trellis.table(code))


def symbols(bits: int, *shape: int) -> Tensor:
    found = torch.randint(0, 1 << bits, (*shape, 256), generator=torch.Generator().manual_seed(bits))
    return found.to(torch.uint8)


def bits_of(tile: Tensor, bits: int) -> str:
    return "".join(f"{int(each):0{bits}b}" for each in tile)


@pytest.mark.parametrize("bits", WIDTHS)
def test_symbols_of_every_width_are_one_stream_of_bits_highest_first(bits: int) -> None:
    given = symbols(bits, 2, 3)
    packed = trellis.pack(given, bits)
    assert packed.shape == (2, 3, 16 * bits) and packed.dtype == torch.int16
    words = [int.from_bytes(struct.pack("<hh", *pair)[:4], "little") for pair in packed[1, 2].reshape(-1, 2).tolist()]
    assert "".join(f"{word:032b}" for word in words) == bits_of(given[1, 2], bits)
    assert torch.equal(trellis.unpack(packed, bits), given)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_state_is_the_last_16_bits_of_the_stream_which_begins_where_it_ends(bits: int) -> None:
    (given,) = symbols(bits, 1)
    stream = bits_of(given, bits)
    found = trellis.states(given[None], bits)[0]
    for place in range(256):
        end = (place + 1) * bits
        assert int(found[place]) == int((stream + stream)[len(stream) + end - 16 : len(stream) + end], 2)


def half(word: int) -> float:
    value: float = struct.unpack("<e", struct.pack("<H", word))[0]
    return value


@pytest.mark.parametrize("state", [0, 1, 4711, 65535])
def test_the_value_of_a_state_is_what_its_bits_say(state: int) -> None:
    for code, word in (("mcg", state * 0xCBAC1FED), ("3inst", state * 89226354 + 64248484)):
        word = (word & 0xFFFFFFFF & 0x8FFF8FFF) ^ 0x3B603B60
        assert float(trellis.table(code)[state]) == half(word & 0xFFFF) + half(word >> 16)
    word = state * 0x83DCD12D & 0xFFFFFFFF
    total = 1024 + sum(word.to_bytes(4, "little"))
    expected = torch.tensor(total) * half(0x1EEE) + half(0xC931)
    assert float(trellis.table("mul1")[state]) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("code", trellis.MULTIPLIERS)
def test_values_of_all_states_look_like_a_gaussian(code: str) -> None:
    values = trellis.table(code) / trellis.table(code).std()
    assert abs(float(values.mean())) < 0.01
    assert abs(float(values.pow(4).mean()) - 3) < 0.4
    assert abs(float((values.abs() < 1).float().mean()) - 0.683) < 0.02


def test_the_weights_of_a_tile_are_taken_as_tensor_cores_hold_them() -> None:
    first = [(0, 0), (1, 0), (8, 0), (9, 0), (0, 8), (1, 8), (8, 8), (9, 8), (2, 0)]
    assert [divmod(place, 16) for place in trellis.places()[:9].tolist()] == first
    assert sorted(trellis.places().tolist()) == list(range(256))
    values = gaussian(32, 48)
    tiles = trellis.to_tiles(values)
    assert tiles.shape == (2, 3, 256) and float(tiles[1, 2, 3]) == float(values[16 + 9, 32])
    assert torch.equal(trellis.from_tiles(tiles), values)


def every_path(wanted: Tensor, bits: int, context: int) -> float:
    """Least squared error over all symbols that lead from a context back to it: they end with it."""
    values, width, best = trellis.table("mul1"), 16 - bits, torch.inf
    free, tied = len(wanted) * bits - width, f"{context:0{width}b}"
    for number in range(1 << free):
        stream = tied + (f"{number:0{free}b}" if free else "") + tied
        states = [int(stream[place : place + 16], 2) for place in range(0, len(wanted) * bits, bits)]
        best = min(best, float((values[states] - wanted).square().sum()))
    return best


@pytest.mark.parametrize(("bits", "length"), [(1, 22), (2, 11), (4, 5), (8, 2)])
def test_a_walk_finds_the_best_of_all_paths_that_bite_their_tail(bits: int, length: int) -> None:
    wanted, width = gaussian(length), 16 - bits
    context = 0b1011001110001111 & ((1 << width) - 1)
    found = trellis._walk(wanted[None], bits, trellis.table("mul1"), torch.tensor([context]))[0]
    stream = f"{context:0{width}b}" + bits_of(found, bits)
    assert stream.endswith(stream[:width])
    states = [int(stream[place : place + 16], 2) for place in range(0, length * bits, bits)]
    error = float((trellis.table("mul1")[states] - wanted).square().sum())
    assert error == pytest.approx(every_path(wanted, bits, context), rel=1e-5)


def test_a_free_walk_finds_the_best_of_all_paths_there_are() -> None:
    wanted, bits = gaussian(2), 8
    found = trellis._walk(wanted[None], bits, trellis.table("mcg"), None)[0].tolist()
    rows = trellis.table("mcg").reshape(256, 256)
    paths = {pair: (rows[:, pair[0]] - wanted[0]).square().min() + (rows[pair] - wanted[1]).square()
             for pair in product(range(256), repeat=2)}  # fmt: skip
    assert float(paths[tuple(found)]) == pytest.approx(float(min(paths.values())), abs=1e-9)


@compiled
@pytest.mark.parametrize("bits", [1, 2, 3, 6, 8])
def test_the_compiled_search_finds_what_torch_finds_on_every_path(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, values = gaussian(1, 256, seed=bits), trellis.table("mul1")
    expected = trellis.decode(trellis.search(wanted, bits, values), bits, "mul1")
    for path in kernel_paths()[:-1]:
        monkeypatch.setenv("COMPRESS_KERNELS", path)
        found = trellis.decode(kernel.search(wanted, bits, values), bits, "mul1")
        assert float((found - wanted).square().sum()) == pytest.approx(float((expected - wanted).square().sum()), 1e-4)


@compiled
def test_the_number_of_threads_changes_nothing() -> None:
    wanted, before = gaussian(5, 256), torch.get_num_threads()
    alone = search(wanted, 2)
    try:
        torch.set_num_threads(3)
        assert torch.equal(search(wanted, 2), alone)
    finally:
        torch.set_num_threads(before)


# of a trellis of 2^12 states (QTIP, arXiv 2406.11235, Table 1); no code of so many bits goes below 4^-bits
PUBLISHED = {2: 0.0733, 3: 0.0198, 4: 0.0055}


@compiled
@pytest.mark.parametrize("bits", PUBLISHED)
@pytest.mark.parametrize("code", ["mul1", "mcg"])
def test_gaussian_noise_loses_less_than_with_fewer_states(bits: int, code: str) -> None:
    weight = gaussian(128, 128, seed=bits)
    form = Trellis(bits, code)
    values = form.quantize(weight, form.fit(weight), torch.arange(128))[1]
    error = float((values - weight).square().mean() / weight.square().mean())
    assert 4.0**-bits < error < PUBLISHED[bits]


def test_a_weight_decodes_as_the_plain_formula_says() -> None:
    form, weight = Trellis(3, block=16), gaussian(32, 48)
    params = form.fit(weight)
    codes, values = form.quantize(weight, params, torch.arange(48))
    stored = form.pack(codes, params, (32, 48))
    mixer = torch.ones(1, 1)
    for _ in range(4):
        mixer = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), mixer)
    inner = torch.empty(48, 32)
    for down, across in product(range(3), range(2)):
        own = trellis.unpack(stored.tensors["trellis"], 3)[down, across]
        for symbol, state in enumerate(trellis.states(own[None], 3)[0].tolist()):
            row, column = divmod(int(trellis.places()[symbol]), 16)
            inner[down * 16 + row, across * 16 + column] = trellis.table("mul1")[state]
    left, right = torch.block_diag(*[mixer / 4] * 2), torch.block_diag(*[mixer / 4] * 3)
    svh, suh = stored.tensors["svh"].float(), stored.tensors["suh"].float()
    torch.testing.assert_close(values, svh[:, None] * (left @ inner.T @ right) * suh, rtol=1e-5, atol=1e-6)
    assert torch.equal(stored.dequantize(), values)


def test_every_byte_is_counted() -> None:
    assert Trellis(2).stored_bytes((256, 384)) == 256 * 384 * 2 // 8 + 2 * (256 + 384)
    assert Trellis(5, "mcg").stored_bytes((128, 128)) == 128 * 128 * 5 // 8 + 2 * 256


def test_rows_and_columns_of_zeros_stay_zeros_and_a_weight_of_zeros_too() -> None:
    form, weight = Trellis(2, block=16), gaussian(32, 32)
    weight[3], weight[:, 5] = 0, 0
    values = form.quantize(weight, form.fit(weight), torch.arange(32))[1]
    assert not values[3].any() and not values[:, 5].any() and values.any()
    nothing = torch.zeros(32, 32)
    assert not form.quantize(nothing, form.fit(nothing), torch.arange(32))[1].any()


def test_rows_and_columns_of_unlike_sizes_lose_less_than_those_of_one_size() -> None:
    form = Trellis(2, block=32)
    sizes = torch.linspace(-1.5, 1.5, 64).exp()
    weight = gaussian(64, 64) * sizes[:, None] * sizes.flip(0)
    lost = []
    for each in (weight, gaussian(64, 64)):
        values = form.quantize(each, form.fit(each), torch.arange(64))[1]
        lost.append(float((values - each).square().sum() / each.square().sum()))
    assert lost[0] < 0.9 * lost[1]


@pytest.mark.parametrize(
    ("shape", "advice"),
    [((64, 256), "Give block=64, "), ((256, 96), "Give block=32, "), ((127, 128), "No block fits it: give another")],
)
def test_sizes_that_are_no_multiples_of_the_block_are_refused_by_name(shape: tuple[int, int], advice: str) -> None:
    with pytest.raises(UsageError, match=rf"{shape[0]}x{shape[1]} is not made of blocks of 128 by 128. {advice}"):
        Trellis(2).tensor_specs(shape)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("trellis(bits=0)", "bits=0 is not allowed.*1 to 8"),
        ("trellis(bits=9)", "bits=9 is not allowed"),
        ("trellis(bits=2, mul)", "code='mul' is not allowed.*mul1"),
        ("trellis(bits=2, mcg, code=mul1)", "the code is given twice"),
        ("trellis(bits=2, block=48)", "block=48 is not allowed.*power of two"),
        ("trellis(bit=2)", "unknown setting 'bit'.*bits"),
    ],
)
def test_settings_that_make_no_sense_are_refused(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_format(text)
