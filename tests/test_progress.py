"""What a user sees while a step works: what is finished, how long the rest may take, and which step a signal ends."""

from __future__ import annotations

import os
import signal

import pytest

from compress import progress
from compress.errors import Interrupted
from compress.progress import Named, Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that `Progress` reads; the last one stands for ever."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_the_time_left_is_told_once_two_units_are_done_and_counts_no_set_up(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    told = Progress()
    told.begin("Loading the models")
    clock[0] += 600
    for done in range(4):
        told.tick("Evaluating windows", done, 48)
        clock[0] += 40
    found = lines(capsys)
    assert found[:2] == ["Loading the models", "Evaluating windows: 0/48 (0 s)"]
    assert found[2] == "Evaluating windows: 1/48 (40 s)"
    assert found[3] == "Evaluating windows: 2/48 (80 s, about 1840 s left)"


def test_units_of_an_earlier_try_do_not_speed_up_the_estimate(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    told = Progress()
    for done in (6, 7, 8):
        told.tick("Compressing blocks", done, 10)
        clock[0] += 100
    assert lines(capsys)[-1] == "Compressing blocks: 8/10 (200 s, about 200 s left)"


@pytest.mark.parametrize(
    ("number", "again"),
    [(signal.SIGINT, "Press Ctrl-C again"), (signal.SIGTERM, "Send it again"), (signal.SIGHUP, "Send SIGTERM")],
)
def test_a_signal_is_told_with_the_step_that_ends_and_how_to_stop_at_once(
    number: signal.Signals, again: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told, before = Progress(), signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with told.catching_signals():
            told.begin("Exporting")
            os.kill(os.getpid(), number)
            with pytest.raises(Interrupted):
                told.begin("Loading the models")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert f"Stopping after this step (Exporting). {again} to stop at once." in lines(capsys)


def test_a_stage_without_units_of_one_of_several_begins_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    Named(Progress(), "w4a16").begin("Exporting")
    Named(Progress(quiet=True), "w4a16").begin("Exporting")
    assert lines(capsys) == ["w4a16: Exporting"]
