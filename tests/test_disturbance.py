"""Rounds are voided by what the machine says happened, never by how long they took."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from compress.speed import disturbance
from compress.speed.disturbance import Counters, causes, watch

QUIET = Counters(10.0, steal_s=5.0, switches=100, pages_from_swap=7, throttles=2, clock_khz=3_000_000)


def after(seconds: float = 1.0, **changes: float) -> Counters:
    return replace(QUIET, seconds=10.0 + seconds, **changes)


def test_a_round_in_which_no_counter_moves_is_undisturbed_however_long_it_took() -> None:
    assert causes(QUIET, after(0.1)) == ()
    assert causes(QUIET, after(1000.0)) == ()


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"steal_s": 5.03}, "steal"),
        ({"switches": 151}, "preempted"),
        ({"pages_from_swap": 8}, "swap"),
        ({"throttles": 3}, "throttled"),
        ({"clock_khz": 2_600_000}, "clock"),
        ({"clock_khz": 3_400_000}, "clock"),
    ],
)
def test_each_counter_beyond_its_threshold_is_a_cause_of_its_own(changes: dict[str, float], cause: str) -> None:
    assert causes(QUIET, after(**changes)) == (cause,)
    assert cause in disturbance.WORDS


@pytest.mark.parametrize("changes", [{"steal_s": 5.01}, {"switches": 150}, {"clock_khz": 2_800_000}])
def test_what_stays_within_the_threshold_is_none(changes: dict[str, float]) -> None:
    assert causes(QUIET, after(**changes)) == ()


def test_up_to_three_switches_are_no_disturbance_of_a_short_round() -> None:
    assert causes(QUIET, after(0.01, switches=103)) == ()
    assert causes(QUIET, after(0.01, switches=104)) == ("preempted",)


def test_several_causes_are_all_named() -> None:
    assert causes(QUIET, after(steal_s=6.0, pages_from_swap=9)) == ("steal", "swap")


def test_a_counter_that_cannot_be_read_voids_nothing() -> None:
    assert causes(Counters(10.0), Counters(11.0)) == ()
    assert causes(Counters(10.0), after(steal_s=50.0, clock_khz=1)) == ()


def machine(root: Path, steal: int, swapped: int) -> None:
    lines = [
        "cpu  9 9 9 9 9 9 9 9999 0 0",
        *(f"cpu{n} 1 1 1 1 1 1 1 {steal} 0 0" for n in range(2)),
        "cpu2 1 1 1",
        "x 1",
    ]
    (root / "proc").mkdir(parents=True, exist_ok=True)
    (root / "proc/stat").write_text("\n".join(lines) + "\n")
    (root / "proc/vmstat").write_text(f"pswpinx 5\npswpin {swapped}\npswpout 3\n")
    for number in range(2):
        for name, value in (
            ("cpufreq/scaling_cur_freq", 2_000_000 + number * 1000),
            ("thermal_throttle/core_throttle_count", 4),
        ):
            path = root / f"sys/devices/system/cpu/cpu{number}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")


def test_the_reader_covers_the_processors_that_this_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disturbance, "_processors", lambda: [0, 1])
    monkeypatch.setattr(disturbance.os, "sysconf", lambda name: 100)
    machine(tmp_path, steal=50, swapped=11)
    read = watch(tmp_path)
    first = read()
    assert (first.steal_s, first.pages_from_swap, first.throttles, first.clock_khz) == (1.0, 11, 8, 2_001_000)
    machine(tmp_path, steal=150, swapped=12)
    assert causes(first, replace(read(), seconds=first.seconds + 1.0, switches=first.switches)) == ("steal", "swap")


def test_the_reader_takes_only_its_own_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disturbance, "_processors", lambda: [1])
    monkeypatch.setattr(disturbance.os, "sysconf", lambda name: 100)
    machine(tmp_path, steal=50, swapped=0)
    found = watch(tmp_path)()
    assert (found.steal_s, found.clock_khz) == (0.5, 2_001_000)


def test_a_system_without_these_files_tells_nothing_and_fails_at_nothing(tmp_path: Path) -> None:
    read = watch(tmp_path)
    found = read()
    assert (found.steal_s, found.pages_from_swap, found.throttles, found.clock_khz) == (None, None, None, None)
    assert causes(replace(found, switches=0), replace(read(), switches=0)) == ()


def test_this_machine_can_be_watched() -> None:
    read = watch()
    before, later = read(), read()
    assert later.seconds >= before.seconds
    assert set(causes(before, later)) <= set(disturbance.WORDS)
