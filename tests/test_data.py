"""Calibration and quality windows: what they share is found, and both have their own length."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.errors import InputError, UsageError
from compress.hwprofiles import load as load_profile
from compress.inputs import datasets, leaks
from compress.inputs.datasets import check_disjoint
from compress.inputs.documents import read_documents
from compress.inputs.leaks import Text, shared_runs
from compress.inputs.windows import Windows, choose, cut_windows, join
from compress.models.loading import load
from compress.recipe import CalibrationSettings, QualitySettings, Recipe
from compress.run import load_data, run
from compress.run_report import Request


def words(seed: int, count: int, vocabulary: int = 250) -> list[int]:
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def windows(length: int, *documents: list[int]) -> Windows:
    return cut_windows(list(documents), length, "here")


def ids_file(path: Path, *documents: list[int]) -> Path:
    path.write_text(json.dumps(documents))
    return path


@pytest.mark.parametrize(("calibration", "quality"), [(64, 128), (128, 64), (48, 128), (64, 64)])
def test_the_same_text_is_noticed_whatever_the_two_lengths_are(calibration: int, quality: int) -> None:
    text = words(0, 1000)
    with pytest.raises(UsageError, match=f"{min(calibration, quality)} tokens in a row are in both"):
        check_disjoint(windows(calibration, text), windows(quality, text))


def test_a_document_that_joining_moved_to_another_offset_is_noticed() -> None:
    shared = words(1, 128)
    calibration = windows(64, *join([words(2, 77), shared, words(3, 200)]))
    with pytest.raises(UsageError, match="in 2 of 3 quality windows"):
        check_disjoint(calibration, windows(64, words(4, 64), shared))


def test_a_run_one_token_shorter_than_a_window_is_no_leak() -> None:
    shared = words(1, 63)
    check_disjoint(
        windows(64, words(2, 77) + shared + words(3, 200)), windows(64, words(4, 70) + shared + words(5, 90))
    )


def test_a_run_across_windows_that_are_not_neighbours_is_no_leak() -> None:
    text = words(6, 64)
    # the halves of `text` end the first window and begin the third
    whole = windows(64, words(7, 32) + text[:32] + words(8, 64) + text[32:] + words(9, 32))
    apart = Windows(whole.ids[[0, 2]], (0, 0), "", "", (0, 128))
    unknown = Windows(whole.ids[[0, 2]], (0, 0), "", "")
    for quality in (apart, unknown):
        check_disjoint(windows(64, text), quality)
    with pytest.raises(UsageError, match="in both"):
        check_disjoint(windows(64, text), Windows(whole.ids[[0, 2]], (0, 0), "", "", (0, 64)))


def test_the_message_shows_where_and_what_was_found() -> None:
    text = words(1, 64)
    with pytest.raises(UsageError) as caught:
        check_disjoint(windows(64, text), windows(64, words(2, 64), text))
    assert f"First in window 1, tokens {', '.join(map(str, text[:8]))} …" in str(caught.value)


def test_runs_are_found_as_a_twin_with_loops_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "CHUNK_TOKENS", 37)
    rng = np.random.default_rng(0)
    found = []
    for size in (1, 2, 3, 5, 8, 13):
        first, second = (Text(rng.integers(0, 2, 300), np.sort(rng.integers(0, 6, 300))) for _ in range(2))

        def runs(text: Text, size: int = size) -> dict[int, tuple[int, ...]]:
            places = [i for i in range(300 - size + 1) if text.pieces[i] == text.pieces[i + size - 1]]
            return {i: tuple(text.tokens[i : i + size].tolist()) for i in places}

        known = set(runs(first).values())
        found.append([place for place, run in runs(second).items() if run in known])
        assert list(shared_runs(first, second, size)) == found[-1]
    assert len(found[0]) == 300 and 0 < len(found[-1]) < 30


def test_two_runs_of_one_hash_are_told_apart_by_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks, "_FIRST", np.uint64(0))
    monkeypatch.setattr(leaks, "_SECOND", np.uint64(0))
    one, other = (Text(np.array(words(seed, 50)), np.zeros(50, np.int64)) for seed in (1, 2))
    assert not list(shared_runs(one, other, 8))


def test_a_choice_of_windows_keeps_where_each_begins() -> None:
    chosen = choose(windows(8, words(0, 100), words(1, 100)), 5, seed=3)
    whole = [words(0, 100), words(1, 100)]
    for row, place, start in zip(chosen.ids.tolist(), chosen.documents, chosen.starts, strict=True):
        assert row == whole[place][start : start + 8]


def test_one_text_is_split_without_a_false_alarm_and_repeated_text_is_an_error(llama: Path, tmp_path: Path) -> None:
    model, text = load(llama), words(0, 4000)
    settings: dict[str, Any] = {"samples": 99, "quality_samples": 99, "length": 64, "seed": 0}
    calibration, quality = datasets.split(model, ids_file(tmp_path / "a.json", text), **settings)
    assert (len(calibration.windows.ids), len(quality.ids)) == (50, 12)
    repeated = ids_file(tmp_path / "b.json", text[:3500] + text[100:600])
    with pytest.raises(UsageError, match="64 tokens in a row"):
        datasets.split(model, repeated, **settings)


def test_one_file_gives_each_part_windows_of_its_own_length(llama: Path, tmp_path: Path) -> None:
    source = ids_file(tmp_path / "a.json", *(words(seed, 200) for seed in range(20)))
    recipe = Recipe(
        name="r",
        passes="rtn",
        calibration=CalibrationSettings(length=32, samples=7),
        quality=QualitySettings(length=64, samples=5),
    )
    request = Request("", recipe, load_profile("cpu-x86-avx2"), tmp_path / "out", str(source))
    calibration, quality = load_data(load(llama), request)
    assert calibration is not None
    assert calibration.windows.ids.shape == (7, 32)
    assert quality.ids.shape == (5, 64)


def test_lines_of_jsonl_may_hold_every_character_that_json_allows(tmp_path: Path) -> None:
    texts = ["a\u2028b", "c\x85d\u2029"]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode() + b"\n\n")
    assert read_documents(path) == texts


def test_a_folder_is_refused_with_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is a folder; data are one file\. Allowed: \.txt"):
        read_documents(tmp_path)


def test_a_file_of_an_unknown_kind_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    path.write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(UsageError, match=r"of this kind is not read\. Allowed: \.txt"):
        read_documents(path)


def test_an_encoder_with_too_few_windows_is_refused_before_the_work(
    save_random: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    model = load(save_random("bert-few", config, "AutoModel"))
    two = ids_file(tmp_path / "two.json", words(0, 16), words(1, 16))
    with pytest.raises(UsageError, match="2 quality window"):
        datasets.quality_windows(model, two, length=16)
    many = ids_file(tmp_path / "many.json", *(words(seed, 16) for seed in range(20)))
    with pytest.raises(UsageError, match=r"takes at least 3\. Give more"):
        datasets.split(model, many, samples=9, quality_samples=2, length=16, seed=0)
    assert len(datasets.quality_windows(model, many, samples=3, length=16).ids) == 3


def test_a_misspelt_gate_stops_a_run_before_its_data_are_read(llama: Path, tmp_path: Path) -> None:
    recipe = Recipe(name="r", passes="rtn(format=int8(group=32))", quality=QualitySettings(gates={"kld": 0.1}))
    request = Request(str(llama), recipe, load_profile("cpu-x86-avx2"), tmp_path / "out", str(tmp_path / "absent.txt"))
    with pytest.raises(UsageError, match="no quality gate 'kld'"):
        run(request)
    assert not list(tmp_path.iterdir())


def test_a_broken_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n\n{"text": bad}\n')
    with pytest.raises(InputError, match="line 3, is not JSON"):
        read_documents(path)
