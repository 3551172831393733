"""Whole requests: spans that add up, two speed-ups and the ceiling, and the words where they cannot be had."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import compress
from compress import artifact as artifacts
from compress.errors import UnsupportedError, UsageError
from compress.hwprofiles import Profile
from compress.inputs.prompts import read_reader
from compress.models.model import Task
from compress.records import Footprint, Speed
from compress.records.speed import END_TO_END
from compress.report.end_to_end_rows import end_to_end_table
from compress.runtime.generation import continue_prompts
from compress.runtime.sampling import Sampling
from compress.speed.end_to_end import (
    OUTPUT_TOKENS,
    Material,
    measure_end_to_end,
    picture_of,
    read_material,
    with_end_to_end,
)
from compress.speed.spans import AFTER, BEFORE, COMPUTE, NAMES, Request, Stopwatch, end_to_end_record, time_requests
from compress.speed.timed_requests import text_request

PARTS = {BEFORE: "reading", COMPUTE: "the model", AFTER: "writing"}


class Clock:
    """Stands still until a request takes its time."""

    def __init__(self) -> None:
        self.now, self.random = 0.0, np.random.default_rng(0)

    def __call__(self) -> float:
        return self.now

    def request(self, before: float, compute: float, after: float) -> Request:
        """One that takes so many seconds, within a percent."""

        def request(watch: Stopwatch) -> None:
            watch.begin()
            for name, seconds in zip(NAMES, (before, compute, after), strict=True):
                self.now += seconds * (1 + 0.01 * self.random.standard_normal())
                watch.lap(name)

        return request


def timed(baseline: tuple[float, float, float], variant: tuple[float, float, float]) -> object:
    clock = Clock()
    requests = {"baseline": clock.request(*baseline), "variant": clock.request(*variant)}
    return time_requests(requests, seed=0, budget_s=60, clock=clock)


def speed(**changes: object) -> Speed:
    arm = Footprint(disk_bytes=1)
    return Speed(runtime="r", threads=1, machine={}, timings=(), baseline=arm, variant=arm, **changes)  # type: ignore[arg-type]


def test_a_model_that_is_four_times_as_fast_makes_the_request_as_fast_as_amdahl_says() -> None:
    found = end_to_end_record(timed((0.03, 0.04, 0.01), (0.03, 0.01, 0.01)), "a request", PARTS)  # type: ignore[arg-type]
    assert found.compute_speedup == pytest.approx(4, rel=0.01)
    assert found.speedup == pytest.approx(0.08 / 0.05, rel=0.01)
    assert found.ceiling == pytest.approx(0.08 / 0.04, rel=0.01)
    for value, interval in (
        (found.speedup, found.interval),
        (found.compute_speedup, found.compute_interval),
        (found.ceiling, found.ceiling_interval),
    ):
        assert interval.low < value < interval.high < 1.03 * interval.low
    assert found.verdict == "faster"


def test_the_spans_of_each_round_add_up_to_the_whole_request() -> None:
    found = timed((0.03, 0.04, 0.01), (0.02, 0.01, 0.005))
    whole = found.samples.seconds["variant"]  # type: ignore[attr-defined]
    spans = sum(found.seconds["variant"][name] for name in NAMES)  # type: ignore[attr-defined]
    assert len(whole) == len(spans) == found.samples.rounds  # type: ignore[attr-defined]
    np.testing.assert_allclose(spans, whole, rtol=1e-9)


def test_time_outside_the_model_is_not_gained_by_a_faster_model() -> None:
    found = end_to_end_record(timed((0.09, 0.0002, 0.01), (0.09, 0.00002, 0.01)), "a request", PARTS)  # type: ignore[arg-type]
    assert found.compute_speedup > 9
    assert found.verdict in ("same", "inconclusive") and found.speedup < 1.02 and found.ceiling < 1.02


def test_a_text_request_makes_the_tokens_that_generating_makes(lm_out: Path) -> None:
    engine = compress.load(lm_out)
    folder = lm_out / "onnx"
    reader = read_reader(folder)
    watch = Stopwatch(Clock())
    made = text_request(engine._runner, reader, "the blue river", 8)(watch)  # type: ignore[union-attr]
    rows, _ = continue_prompts(
        engine._runner,
        reader,
        [reader.prompt("the blue river")],
        count=8,
        sampling=Sampling(),  # type: ignore[union-attr]
    )
    assert made == reader.decode(rows[0].tokens)


@pytest.fixture
def lm_profile(lm_out: Path) -> Profile:
    return artifacts.open_artifact(lm_out).profile


def test_a_language_model_is_measured_from_text_to_text(lm_out: Path, lm_profile: Profile) -> None:
    folder = lm_out / "onnx"
    ids = Material(ids=tuple(read_reader(folder).prompt("the blue river runs over")))
    found = measure_end_to_end(folder, folder, lm_profile, Task.CAUSAL_LM, ids, budget_s=1.0)
    assert found.what == f"a text of 24 tokens in, {OUTPUT_TOKENS} tokens as text out, batch 1"
    assert [span.name for span in found.spans] == list(NAMES)
    assert all(span.baseline_s > 0 and span.variant_s > 0 for span in found.spans)
    assert found.ceiling > 1
    table = end_to_end_table(speed(end_to_end=found))
    assert [row[0] for row in table.rows][-2:] == ["whole request", "ceiling"]


def test_a_model_without_a_tokenizer_says_why_there_is_no_request(
    lm_out: Path, lm_profile: Profile, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(lm_out / "onnx", tmp_path / "onnx"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    found = with_end_to_end(
        speed(),
        lambda: measure_end_to_end(folder, folder, lm_profile, Task.CAUSAL_LM, Material(ids=(1, 2)), budget_s=1.0),
    )
    assert found.end_to_end is None and "no tokenizer" in found.unavailable[END_TO_END]
    table = end_to_end_table(found)
    assert "no tokenizer" in table.notes[0] and table.rows[0][1] == "not measured"


def test_requests_that_are_too_long_for_the_budget_name_one_that_would_do(lm_out: Path, lm_profile: Profile) -> None:
    folder = lm_out / "onnx"
    with pytest.raises(UnsupportedError, match=r"one request takes .* --budget \d"):
        measure_end_to_end(folder, folder, lm_profile, Task.CAUSAL_LM, Material(ids=(65, 66)), budget_s=1e-6)


def test_of_a_folder_of_images_the_one_of_median_size_is_taken(tmp_path: Path) -> None:
    for name, size in (("a.png", 300), ("b.jpg", 100), ("c.png", 200), ("d.txt", 150)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert picture_of(tmp_path) == tmp_path / "c.png"
    assert picture_of(tmp_path / "d.txt") is None
    with pytest.raises(UsageError, match="holds no image file"):
        read_material(tmp_path / "d.txt", tmp_path, Task.IMAGE)


def test_a_text_is_read_by_the_artifacts_own_tokenizer(lm_out: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a stone")
    found = read_material(text, lm_out / "onnx", Task.CAUSAL_LM)
    assert read_reader(lm_out / "onnx").decode(found.ids) == "a stone"


def test_an_image_is_measured_from_its_file_to_its_class(
    cnn: str, make_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    out = make_artifact(cnn, "onnx")
    profile, folder = artifacts.open_artifact(out).profile, out / "onnx"
    found = measure_end_to_end(folder, folder, profile, Task.IMAGE, Material(picture=tmp_path / "a.png"), budget_s=1.0)
    assert "(a.png) in, its class out" in found.what and found.spans[0].baseline_s > 0
    with pytest.raises(UnsupportedError, match="no image file"):
        measure_end_to_end(folder, folder, profile, Task.IMAGE, Material(), budget_s=1.0)


def test_an_encoder_is_measured_from_text_to_embedding(
    save_random: Callable[..., Path], llama: Path, make_artifact: Callable[..., Path]
) -> None:
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    source = save_random("encoder", config, "AutoModel")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / name, source / name)
    out = make_artifact(source, "onnx")
    profile, folder = artifacts.open_artifact(out).profile, out / "onnx"
    found = measure_end_to_end(folder, folder, profile, Task.ENCODER, Material(ids=tuple(range(60, 80))), budget_s=1.0)
    assert "one embedding out" in found.what and found.spans[2].what == "pooling"
