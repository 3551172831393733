"""The verdict sentence: what it leads with, and what it does not hide."""

from __future__ import annotations

import pytest

from compress.records import Gate, SpeedVerdict
from compress.report import verdict_sentence
from compress.report.rows import build_page
from helpers.full_report import pieces, report, speed, timing, verification


def test_the_sentence_says_it_all() -> None:
    only_faster = pieces(speed=speed(timing()))
    assert verdict_sentence(**only_faster) == (
        "decode batch 1 prompt 128 is 1.62x faster (95% 1.55 to 1.69), 3.13x smaller than the source (4.7 MB from "
        "14.7 MB), KL 0.0052 nats/token (95% 0.0048 to 0.0056), perplexity 21.8 against 21.4; "
        "the artifact ran in onnxruntime and agreed."
    )


def test_the_headline_is_the_decode_setting_of_the_smallest_batch() -> None:
    mixed = speed(timing("prefill"), timing("decode", 8), timing("decode", 2))
    assert verdict_sentence(**pieces(speed=mixed)).startswith("decode batch 2 ")
    assert verdict_sentence(**pieces(speed=speed(timing("encode", 4)))).startswith("encode batch 4 ")


def test_slower_and_open_settings_are_named_beside_a_faster_headline() -> None:
    sentence = verdict_sentence(**pieces())
    assert "slower at prefill batch 1 prompt 128 (0.82x), inconclusive at 1 other setting" in sentence


@pytest.mark.parametrize(
    ("verdict", "ratio", "words"),
    [
        ("slower", 0.8, "is slower, 0.80x the baseline's speed (95% 0.77 to 0.83), no setting was faster"),
        ("inconclusive", 1.03, "128 is inconclusive (1.03x, 95% 1.00 to 1.06), no setting was faster"),
        ("same", 1.0, "is as fast as the baseline, 1.00x (95% 0.97 to 1.03), no setting was faster"),
    ],
)
def test_no_speed_up_is_said(verdict: SpeedVerdict, ratio: float, words: str) -> None:
    sentence = verdict_sentence(**pieces(speed=speed(timing(speedup=ratio, half=0.032, verdict=verdict))))
    assert words in sentence
    assert ("from 14.7 MB): size only, " in sentence) == (verdict != "inconclusive")
    same_size = pieces(speed=speed(timing(speedup=ratio, half=0.032, verdict=verdict)), artifact_bytes=14_700_000)
    assert "size only" not in verdict_sentence(**same_size)


def test_a_slower_headline_does_not_hide_a_faster_setting() -> None:
    found = speed(timing(speedup=0.8, half=0.03, verdict="slower"), timing("prefill", 4, 1.2, 0.03))
    sentence = verdict_sentence(**pieces(speed=found))
    assert "faster at prefill batch 4 prompt 128 (1.20x)" in sentence
    assert "no setting was faster" not in sentence and "size only" not in sentence


def test_failed_gates_come_before_the_good_news() -> None:
    failed = (
        Gate(name="kl", bound=0.005, found=0.0056, met=False),
        Gate(name="accuracy", bound=0.9, found=0.95, met=True),
    )
    sentence = verdict_sentence(**pieces(gates=failed))
    assert sentence.startswith("gate FAILED: KL (found 0.0056, bound 0.005); decode")
    assert build_page(report(changes={"gates": failed})).failed


def test_a_gate_missed_by_a_hair_shows_the_hair() -> None:
    failed = (Gate(name="top1_agreement", bound=0.98, found=0.9799996, met=False),)
    assert "found 0.9799996, bound 0.98)" in verdict_sentence(**pieces(gates=failed))


def test_disagreement_comes_first() -> None:
    sentence = verdict_sentence(**pieces(verification=verification(agrees=False)))
    assert sentence.startswith("the artifact ran in onnxruntime and did NOT agree with the model (largest relative")
    assert "0.31, bound 0.001, same top token at 99.4% of 512 positions" in sentence
    assert "and agreed" not in sentence


@pytest.mark.parametrize(
    ("level", "words"),
    [("built", "was built for onnxruntime but not run there"), ("checked", "was only checked against the rules")],
)
def test_a_weaker_check_is_not_called_a_run(level: str, words: str) -> None:
    sentence = verdict_sentence(**pieces(verification=verification(level=level)))
    assert words in sentence
    assert "ran in onnxruntime" not in sentence


def test_parts_that_were_not_measured_are_said_in_the_sentence() -> None:
    assert verdict_sentence(source_bytes=0, artifact_bytes=5) == (
        "speed not measured, size not measured, quality not measured; "
        "agreement of the artifact with the model not measured."
    )
    in_memory = verdict_sentence(**pieces(artifact_quality=None, baseline_quality=None))
    assert "in memory before lowering KL 0.0049 nats/token" in in_memory
    assert "perplexity 21.7 against a baseline not measured, quality of the artifact not measured" in in_memory


def test_a_larger_artifact_is_called_larger() -> None:
    sentence = verdict_sentence(source_bytes=10_000_000, artifact_bytes=15_000_000)
    assert "1.5x larger than the source (15 MB from 10 MB)" in sentence
    alike = verdict_sentence(source_bytes=10_000_000, artifact_bytes=10_010_000)
    assert "the same size as the source (10 MB from 10 MB)" in alike
