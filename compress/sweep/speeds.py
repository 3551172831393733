"""The speed of every variant of a sweep: what was timed beside the others, and what is measured of each alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compress import hwprofiles
from compress.models.model import Model
from compress.progress import Progress
from compress.records import Footprint, Speed
from compress.speed import energy
from compress.speed.end_to_end import Material, measure_end_to_end, with_end_to_end
from compress.speed.measure import thread_count, with_energy, with_operators
from compress.speed.timing_process import TimingRequest
from compress.speed.timing_record import best_against_best
from compress.sweep.judge import Stand, Timed


@dataclass(frozen=True)
class Alone:
    """What the measurements of one variant beside the baseline take. image: shape that the model takes in place of
    tokens; material: what a whole request begins with."""

    stand: Stand
    model: Model
    image: tuple[int, ...] | None
    material: Material
    budget_s: float


def speeds_of(
    found: Timed, footprints: Mapping[str, Footprint], folders: Mapping[str, Path], alone: Alone, progress: Progress
) -> dict[str, Speed]:
    """By variant; footprints: of the baseline too, under ''. Energy, operators and whole requests are of each variant
    alone beside the baseline: blocks of many seconds would not share a round."""
    speeds = {}
    for place, (name, folder) in enumerate(folders.items()):
        progress.tick("Measuring each variant", place, len(folders))
        timings = found.timings[name]
        speed = Speed(
            runtime=found.runtime,
            threads=thread_count(alone.stand.profile),
            machine=hwprofiles.machine_summary(),
            timings=timings,
            best=best_against_best(timings),
            baseline=footprints[""],
            variant=footprints[name],
        )
        speeds[name] = _alone(speed, folder, alone)
    progress.tick("Measuring each variant", len(folders), len(folders))
    return speeds


def _alone(speed: Speed, folder: Path, alone: Alone) -> Speed:
    stand, model = alone.stand, alone.model
    request = TimingRequest(
        baseline=stand.baseline,
        variant=folder,
        profile=stand.profile,
        vocabulary=model.vocabulary,
        longest=model.longest,
        image=alone.image,
        seed=stand.seed,
        budget_s=alone.budget_s,
    )
    return with_end_to_end(
        with_operators(with_energy(speed, request, energy.find_meter), request),
        lambda: measure_end_to_end(
            stand.baseline, folder, stand.profile, model.task, alone.material, seed=stand.seed, budget_s=alone.budget_s
        ),
    )
