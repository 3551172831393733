"""Energy from counters: files made for the test, a meter that is told what to say, and words where there is none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from compress.errors import UnsupportedError
from compress.records import Footprint, Speed
from compress.records.speed import Energy
from compress.report.end_to_end_rows import energy_table
from compress.speed.energy import Nvml, Rapl, find_meter, measure_energy


def zone(root: Path, number: str, name: str, microjoules: int) -> Path:
    folder = root / "sys/class/powercap" / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("1000000\n")
    return folder


class Machine:
    """A clock and a counter that only work moves."""

    name, least_s = "test counter", 0.5

    def __init__(self) -> None:
        self.now, self.spent, self.random = 0.0, 0.0, np.random.default_rng(0)

    def clock(self) -> float:
        return self.now

    def joules(self) -> float:
        return self.spent

    def arm(self, seconds: float, joules: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds
            self.spent += joules * (1 + 0.02 * self.random.standard_normal())

        return call


def measured(baseline: tuple[float, float], variant: tuple[float, float]) -> Energy:
    machine = Machine()
    arms = {"baseline": machine.arm(*baseline), "variant": machine.arm(*variant)}
    return measure_energy(
        arms, machine, setting="decode", unit="token", units_per_call=4, seed=0, budget_s=30, clock=machine.clock
    )


def test_packages_and_memory_are_counted_once_and_a_counter_may_begin_again(tmp_path: Path) -> None:
    first = zone(tmp_path, "0", "package-0", 900_000)
    second = zone(tmp_path, "0:0", "dram", 100)
    zone(tmp_path, "0:1", "core", 5)  # a part of its package
    zone(tmp_path, "1", "psys", 7)  # the package is a part of it
    meter = find_meter("cpu", tmp_path)
    assert isinstance(meter, Rapl) and list(meter.zones) == [first, second] and "package-0, dram" in meter.name
    assert meter.joules() == 0
    (first / "energy_uj").write_text("200000")
    (second / "energy_uj").write_text("400100")
    assert meter.joules() == pytest.approx(0.3 + 0.4)
    assert meter.joules() == pytest.approx(0.7)


def test_without_a_counter_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="has no energy counter"):
        find_meter("cpu", tmp_path)
    (zone(tmp_path, "0", "package-0", 1) / "energy_uj").unlink()
    with pytest.raises(UnsupportedError, match="may not be read"):
        find_meter("cpu", tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(UnsupportedError, match="nvidia-ml-py"):
        find_meter("cuda")


def test_devices_are_counted_together_in_joules() -> None:
    library = SimpleNamespace(nvmlDeviceGetTotalEnergyConsumption=lambda device: 1000 * device)
    assert Nvml(library, [1, 2]).joules() == 3


def test_a_variant_that_takes_two_thirds_of_the_joules_saves_a_factor_of_one_and_a_half() -> None:
    # it is the slower one: time does not count here
    found = measured((0.010, 0.6), (0.013, 0.4))
    assert found.verdict == "less" and found.saving == pytest.approx(1.5, rel=0.01)
    assert found.interval.low < found.saving < found.interval.high < 1.01 * found.interval.low
    assert (found.baseline_j, found.variant_j) == pytest.approx((0.15, 0.1), rel=0.01)
    assert measured((0.01, 0.5), (0.01, 0.5)).verdict in ("same", "inconclusive")
    assert measured((0.01, 0.4), (0.01, 0.6)).verdict == "more"


def test_a_counter_that_stands_still_gives_no_figure() -> None:
    with pytest.raises(UnsupportedError, match="stood still"):
        measured((0.01, 0.5), (0.01, 0.0))


def test_the_report_shows_the_figure_or_the_reason() -> None:
    arm = Footprint(disk_bytes=1)
    speed = Speed(runtime="r", threads=1, machine={}, timings=(), baseline=arm, variant=arm)
    assert not energy_table(speed).rows
    told = energy_table(speed.model_copy(update={"unavailable": {"energy": "no counter"}}))
    assert told.notes == ("Unavailable: no counter",) and not told.rows  # no row of dashes
    table = energy_table(speed.model_copy(update={"energy": measured((0.01, 0.6), (0.01, 0.4))}))
    assert table.rows[0][0] == "decode" and table.rows[0][-1] == "less" and "test counter" in table.notes[0]
