"""Short documents as windows of their own: what an encoder is calibrated and judged on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import compress
from compress.errors import UsageError
from compress.inputs import datasets
from compress.inputs.windows import Windows, check_disjoint, choose, cut_windows
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.quality.evaluate import stream_logits

SHORT = [[1, 2, 3], [4, 5], [6, 7, 8], [4, 5], [9] * 12, []]


def test_each_short_document_is_a_window_once_and_longer_ones_are_cut() -> None:
    found = cut_windows(SHORT, 5, "data", short=True)
    assert [row.tolist() for row in found.rows()] == [[1, 2, 3], [4, 5], [6, 7, 8], [9] * 5, [9] * 5]
    assert found.documents == (0, 1, 2, 4, 4) and found.lengths == (3, 2, 3, 5, 5)
    assert found.ids.shape == (5, 5) and int(found.ids[1, 2:].abs().sum()) == 0


def test_batches_hold_rows_of_one_length_and_nothing_else() -> None:
    found = cut_windows(SHORT, 5, "data", short=True)
    assert [batch.tolist() for batch in found.batches()] == [[[4, 5]], [[1, 2, 3], [6, 7, 8]], [[9] * 5, [9] * 5]]
    assert [len(batch) for batch in found.batches(tokens=3)] == [1, 1, 1, 1, 1]
    even = cut_windows([[1, 2], [3, 4]], 2, "data", short=True)
    assert even.lengths == () and [batch.tolist() for batch in even.batches()] == [[[1, 2], [3, 4]]]


def test_a_choice_keeps_lengths_and_the_digest_tells_padding_from_tokens() -> None:
    found = cut_windows(SHORT, 5, "data", short=True)
    few = choose(found, 3, seed=0)
    assert len(few.lengths) == 3
    rows = [row.tolist() for row in found.rows()]
    assert all(row.tolist() in rows for row in few.rows())
    first, second = (cut_windows([[1, 2, 3], last], 3, "data", short=True) for last in ([7, 0], [7, 0, 0]))
    assert torch.equal(first.ids, second.ids) and first.digest != second.digest


def test_a_sentence_in_both_parts_is_an_error() -> None:
    one, two = cut_windows(SHORT, 5, "data", short=True), cut_windows([[1, 2], [6, 7, 8]], 5, "data", short=True)
    with pytest.raises(UsageError, match=r"1 of 2 quality windows .* tokens 6, 7, 8"):
        check_disjoint(one, two)
    check_disjoint(one, cut_windows([[1, 2], [6, 7]], 5, "data", short=True))


@pytest.fixture(scope="module")
def encoder(save_random: Callable[..., Path]) -> Model:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    folder = save_random("bert-windows", transformers.BertConfig(**sizes, num_attention_heads=2), "AutoModel")
    return compress.load(folder)


def sentences(path: Path, count: int) -> Path:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
    rows = [torch.randint(0, 64, (length,), generator=generator).tolist() for length in lengths]
    path.write_text("\n".join(json.dumps({"ids": row}) for row in [*rows, *rows[:5]]))
    return path


def test_an_encoder_is_calibrated_and_judged_sentence_by_sentence(encoder: Model, tmp_path: Path) -> None:
    source = sentences(tmp_path / "sentences.jsonl", 60)
    calibration, held = datasets.split(encoder, source, samples=40, quality_samples=None, length=16, seed=0)
    assert isinstance(calibration.windows, Windows) and isinstance(held, Windows)
    assert len(calibration.windows.ids) == 40 and len(held.ids) == 12  # a fifth of the 60 that differ
    assert set(calibration.windows.lengths) == set(range(3, 12))
    made = Pipeline.parse("gptq(format=int8(channel)), act_quant(static=true)").run(encoder, calibration).model
    pairs = zip(stream_logits(encoder, held.rows()), stream_logits(made, held.rows()), held.lengths, strict=True)
    for reference, output, length in pairs:
        assert reference.shape == output.shape == (length, 32)
        cosine = torch.cosine_similarity(reference.mean(0), output.mean(0), dim=0)
        assert 0.98 < float(cosine) < 1


def test_padding_would_change_what_is_collected(encoder: Model, tmp_path: Path) -> None:
    source = sentences(tmp_path / "sentences.jsonl", 60)
    calibration = datasets.calibrate(encoder, source, samples=40, length=16)
    assert isinstance(calibration.windows, Windows)
    assert sum(batch.numel() for batch in calibration.batches()) == sum(calibration.windows.lengths)


def test_a_language_model_still_takes_documents_joined(llama: Path, tmp_path: Path) -> None:
    source = sentences(tmp_path / "sentences.jsonl", 60)
    calibration = datasets.calibrate(compress.load(llama), source, samples=8, length=16)
    assert isinstance(calibration.windows, Windows)
    assert calibration.windows.ids.shape == (8, 16) and calibration.windows.lengths == ()
