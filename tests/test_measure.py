"""The whole measurement of a small model in its runtime: what the record holds, not how fast anything is."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

import compress
from compress import hwprofiles
from compress.errors import InputError, Interrupted, UsageError
from compress.export.onnx import target
from compress.hwprofiles import Profile
from compress.profiles import as_profile
from compress.progress import Progress
from compress.records import Speed
from compress.records.speed import leading
from compress.speed.footprint import footprint
from compress.speed.measure import measure, settings_of
from compress.speed.timing_process import TimingRequest, last_line, time_in_process


@pytest.fixture(scope="module")
def profile() -> Profile:
    found = as_profile(hwprofiles.load("cpu-x86-avx2"), "onnx")
    grid = found.grid.model_copy(update={"decode": ((1, 16), (2, 16)), "prefill": ((1, 16),)})
    return found.model_copy(update={"grid": grid})


@pytest.fixture(scope="module")
def exported(llama: Path, profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    target.write(compress.load(llama), profile, folder)
    return folder


def timed(exported: Path, profile: Profile, processes: int = 1) -> Speed:
    return measure(
        exported,
        exported,
        profile,
        vocabulary=256,
        longest=64,
        budget_s=0.2,
        processes=processes,
        progress=Progress(quiet=True),
    )


def test_the_record_holds_first_calls_first_token_per_token_percentiles_and_disturbance(
    exported: Path, profile: Profile
) -> None:
    found = timed(exported, profile)
    assert [timing.name for timing in found.timings] == [
        "decode batch 1 prompt 16",
        "decode batch 2 prompt 16",
        "prefill batch 1 prompt 16",
    ]
    for timing in found.timings:
        for arm, median_s in ((timing.baseline_arm, timing.baseline_s), (timing.variant_arm, timing.variant_s)):
            assert arm is not None
            assert arm.first_call_s > 0
            assert arm.per_token_s == (median_s if timing.phase == "decode" else None)
            assert arm.first_token_s == (median_s if timing.phase == "prefill" else None)
        assert timing.every_round is not None and timing.every_round.rounds >= timing.rounds
    (best,) = found.best
    assert set(best.same_setting) == {1, 2}
    assert found.baseline.load_s and found.baseline.first_call_s and found.variant.peak_memory_bytes
    assert Speed.model_validate_json(found.model_dump_json()) == found


def test_several_processes_give_one_record_per_setting_with_the_speed_up_of_each(
    exported: Path, profile: Profile
) -> None:
    one = profile.grid.model_copy(update={"decode": ((1, 16),), "prefill": ()})
    found = timed(exported, profile.model_copy(update={"grid": one}), processes=3)
    assert found.processes == 3
    (timing,) = found.timings
    assert len(set(timing.process_speedups)) == 3
    assert timing.interval.low < timing.speedup < timing.interval.high
    assert timing.speedup == pytest.approx(math.prod(timing.process_speedups) ** (1 / 3))


@pytest.mark.parametrize("processes", [0, 2])
def test_too_few_processes_to_tell_how_they_differ_are_refused(
    exported: Path, profile: Profile, processes: int
) -> None:
    with pytest.raises(UsageError, match=f"{processes} processes: give 1, or at least 3"):
        timed(exported, profile, processes)


def test_a_process_that_fails_or_does_not_end_is_named_with_its_reason(
    exported: Path, profile: Profile, tmp_path: Path
) -> None:
    request = TimingRequest(
        baseline=tmp_path, variant=exported, profile=profile, vocabulary=256, longest=64, budget_s=0.2
    )
    with pytest.raises(InputError, match=r"could not be timed in a process of its own: .*cannot load"):
        time_in_process(request, 60.0)
    with pytest.raises(InputError, match="did not end in 0 s"):
        time_in_process(request, 0.01)


def test_an_arm_that_does_not_load_in_time_is_told_of(
    exported: Path, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.speed.footprint.PROBE_S", 0.01)
    with pytest.raises(InputError, match=r"could not be run in a process of its own: it did not end in 0 s"):
        footprint(target, exported, 1, 64)


def test_a_process_that_says_nothing_is_no_success() -> None:
    with pytest.raises(InputError, match="it failed: exit code 0"):
        last_line([sys.executable, "-c", "pass"], 60.0, "it failed")


@pytest.mark.parametrize(("name", "number"), [("SIGINT", 2), ("SIGTERM", 15)])
def test_a_process_that_a_signal_stops_is_an_interruption_and_no_failure(name: str, number: int) -> None:
    code = f"import os, signal; signal.signal(signal.{name}, signal.SIG_DFL); os.kill(os.getpid(), signal.{name})"
    with pytest.raises(Interrupted) as caught:
        last_line([sys.executable, "-c", code], 60.0, "it failed")
    assert caught.value.signal_number == number


def test_settings_lead_with_decode_and_are_cut_to_what_the_model_reads(profile: Profile) -> None:
    assert settings_of(profile, True, 10) == [("decode", 1, 9), ("decode", 2, 9), ("prefill", 1, 10)]
    assert settings_of(profile, False, 64) == [("encode", 1, 16)]
    assert settings_of(profile, False, 64, is_image=True) == [("infer", 1, 1), ("infer", 2, 1)]


def test_decoding_with_the_smallest_batch_leads_in_whatever_order_settings_are_timed() -> None:
    assert leading([("prefill", 1, 16), ("decode", 4, 128), ("decode", 1, 128)]) == ("decode", 1, 128)
    assert leading([("prefill", 4, 16), ("prefill", 1, 16)]) == ("prefill", 4, 16)
