"""Codes in machine words, against a slow twin that puts them together bit by bit and against compressed-tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from compress.export.checkpoint.packing import AWQ_ORDER, pack_awq, pack_words
from compress.export.checkpoint.readback import awq_codes, stream_codes
from compress.export.checkpoint.writer import INDEX, SINGLE, ShardWriter, header_bytes

COUNTS = (1, 7, 31, 32, 33, 96, 101)


def codes_of(bits: int, count: int, rows: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits * 1000 + count)
    return torch.randint(0, 2**bits, (rows, count), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", COUNTS)
def test_a_row_of_codes_is_one_stream_of_bits_in_words(bits: int, count: int) -> None:
    codes = codes_of(bits, count)
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (3, -(-count * bits // 32))
    assert torch.equal(stream_codes(words, bits, count), codes.long())
    whole = sum(int(code) << (bits * place) for place, code in enumerate(codes[1].tolist()))
    assert [int(word) & 0xFFFFFFFF for word in words[1]] == [
        (whole >> (32 * place)) & 0xFFFFFFFF for place in range(words.shape[1])
    ]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", COUNTS)
def test_the_installed_compressed_tensors_packs_the_same_words(bits: int, count: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = codes_of(bits, count)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_words(codes, bits), pack_to_int32(signed, bits))
    assert torch.equal(pack_words(codes.T, bits).T, pack_to_int32(signed, bits, packed_dim=0))


def test_awq_words_hold_their_eight_columns_in_its_order() -> None:
    codes = codes_of(4, 24)
    words = pack_awq(codes)
    assert words.shape == (3, 3)
    assert torch.equal(awq_codes(words), codes.long())
    first = int(words[0, 0]) & 0xFFFFFFFF
    assert [(first >> (4 * place)) & 15 for place in range(8)] == [int(codes[0, column]) for column in AWQ_ORDER]


def test_files_are_cut_at_the_limit_and_an_index_says_where_each_tensor_is(tmp_path: Path) -> None:
    import json

    writer = ShardWriter(tmp_path, limit=100)
    for number in range(5):
        writer.add({f"layer.{number}.weight": torch.full((10,), float(number))})
    writer.finish()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [*(f"model-0000{part}-of-00003.safetensors" for part in (1, 2, 3)), INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 200 and len(index["weight_map"]) == 5
    for key, home in index["weight_map"].items():
        with safe_open(tmp_path / home, framework="pt") as handle:
            assert torch.equal(handle.get_tensor(key), torch.full((10,), float(key.split(".")[1])))


def test_one_file_has_the_usual_name_and_the_predicted_header(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.zeros(3, 5), "b.weight": torch.zeros(7)}
    writer = ShardWriter(tmp_path)
    writer.add(tensors)
    writer.finish()
    entries = {name: (tuple(tensor.shape), tensor.nbytes) for name, tensor in tensors.items()}
    assert (tmp_path / SINGLE).stat().st_size == header_bytes(entries) + sum(size for _, size in entries.values())
    assert (tmp_path / SINGLE).stat().st_mode & 0o044  # not for the owner alone
