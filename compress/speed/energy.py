"""Joules of a baseline and a variant in the same shuffled rounds, from the machine's own counters; never from a model.

A counter counts whatever its package or device did meanwhile, other programs too, so blocks are long, rounds are
paired, and the baseline is measured against itself beside them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from compress.errors import UnsupportedError
from compress.records.speed import Energy, EnergyVerdict, SpeedVerdict
from compress.speed.disturbance import read_text
from compress.stats.intervals import MIN_ROUNDS, speed_verdict, speedup

MOST_ROUNDS, WARMUP_CALLS = 30, 3
_WORDS: dict[SpeedVerdict, EnergyVerdict] = {
    "faster": "less",
    "slower": "more",
    "same": "same",
    "inconclusive": "inconclusive",
}


class Meter(Protocol):
    """A counter of joules. least_s: blocks must last so long, beside which the steps of its count are small."""

    name: str
    least_s: float

    def joules(self) -> float:
        """Since an arbitrary start; never falling."""
        ...


@dataclass
class Rapl:
    """Running average power limit (Intel, AMD): processor packages and their memory, counted in about a millisecond's
    steps. A count that has reached its range begins again at 0."""

    zones: Sequence[Path]
    name: str = "RAPL"
    least_s: float = 0.25
    _last: dict[Path, int] = field(default_factory=dict)
    _total: float = 0.0

    def joules(self) -> float:
        """See Meter."""
        for zone in self.zones:
            now = int((zone / "energy_uj").read_text())
            grown = now - self._last.get(zone, now)
            if grown < 0:
                grown += int((zone / "max_energy_range_uj").read_text())
            self._last[zone] = now
            self._total += grown / 1e6
        return self._total


@dataclass
class Nvml:
    """Total energy of NVIDIA devices since their driver was loaded, which they bring up to date every 0.1 s or so."""

    library: Any
    devices: Sequence[Any]
    name: str = "NVML"
    least_s: float = 3.0

    def joules(self) -> float:
        """See Meter."""
        return float(sum(self.library.nvmlDeviceGetTotalEnergyConsumption(device) for device in self.devices)) / 1000


def find_meter(device: str, root: Path = Path("/")) -> Meter:
    """What counts the energy of the processor ("cpu") or of NVIDIA devices ("cuda"). root: of /sys.

    Raises: UnsupportedError with the reason where nothing can be read.
    """
    if device == "cuda":
        return _nvml()
    folder = root / "sys/class/powercap"
    zones = [
        zone
        for zone in sorted(folder.glob("intel-rapl:*"))
        if read_text(zone / "name").strip().startswith(("package", "dram"))
    ]
    if not zones:
        raise UnsupportedError(f"{folder} has no energy counter (a virtual machine mostly hides it)")
    closed = [zone for zone in zones if not read_text(zone / "energy_uj").strip().isdigit()]
    if closed:
        raise UnsupportedError(f"{closed[0] / 'energy_uj'} may not be read; root may, or whoever root lets read it")
    return Rapl(zones, name=f"RAPL ({', '.join(read_text(zone / 'name').strip() for zone in zones)})")


def measure_energy(
    arms: Mapping[str, Callable[[], object]],
    meter: Meter,
    *,
    setting: str,
    unit: str,
    units_per_call: int,
    seed: int,
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Energy:
    """Blocks of the arms "baseline" and "variant", and of the baseline once more, in rounds of fresh seeded order.

    Raises: UnsupportedError where the counter stands still during a block.
    """
    random = np.random.default_rng(seed)
    repeats = {name: _repeats(arm, meter.least_s, clock) for name, arm in arms.items()}
    rounds = int(min(MOST_ROUNDS, max(MIN_ROUNDS, budget_s / (3 * meter.least_s))))
    slots = ("baseline", "variant", "control")
    spent: dict[str, list[float]] = {slot: [] for slot in slots}
    for _ in range(rounds):
        for slot in random.permutation(slots):
            name = "baseline" if slot == "control" else str(slot)
            spent[str(slot)].append(_block(arms[name], repeats[name], meter))
    joules = {slot: np.array(values) / units_per_call for slot, values in spent.items()}
    if min(float(values.min()) for values in joules.values()) <= 0:
        raise UnsupportedError(f"{meter.name} stood still during a block of {meter.least_s:g} s")
    ratio, interval = speedup(np.log(joules["baseline"] / joules["variant"]))
    _, control = speedup(np.log(joules["baseline"] / joules["control"]))
    return Energy(
        counter=meter.name,
        setting=setting,
        unit=unit,
        rounds=rounds,
        block_s=meter.least_s,
        baseline_j=float(np.median(joules["baseline"])),
        variant_j=float(np.median(joules["variant"])),
        saving=ratio,
        interval=interval,
        control=control,
        verdict=_WORDS[speed_verdict(interval, control)],
    )


def _block(arm: Callable[[], object], repeats: int, meter: Meter) -> float:
    """Joules per call."""
    before = meter.joules()
    for _ in range(repeats):
        arm()
    return (meter.joules() - before) / repeats


def _repeats(arm: Callable[[], object], least_s: float, clock: Callable[[], float]) -> int:
    """Calls that last as long as a block must."""
    for _ in range(WARMUP_CALLS):
        arm()
    calls, begun = 0, clock()
    while clock() - begun < least_s:
        arm()
        calls += 1
    return math.ceil(1.2 * calls)  # the calls of a slower moment must not make a short block


def _nvml() -> Meter:
    try:
        import pynvml

        pynvml.nvmlInit()
        devices = [pynvml.nvmlDeviceGetHandleByIndex(place) for place in range(pynvml.nvmlDeviceGetCount())]
        meter = Nvml(pynvml, devices, name=f"NVML ({len(devices)} device{'s' if len(devices) != 1 else ''})")
        meter.joules()
    except ImportError as error:
        raise UnsupportedError("NVIDIA devices are read by nvidia-ml-py, which is not installed") from error
    except Exception as error:  # NVMLError, of a library that need not be there
        raise UnsupportedError(f"NVML does not tell the devices' energy ({error})") from error
    if not devices:
        raise UnsupportedError("NVML finds no device")
    return meter
