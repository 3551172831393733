"""Everything that is measured of an artifact's speed: single calls, footprints and whole requests (design §7)."""

from __future__ import annotations

from pathlib import Path

from compress.hwprofiles import Profile
from compress.models.image_source import fitting, timed_shape
from compress.models.model import Model
from compress.progress import Progress
from compress.records import Speed
from compress.speed.end_to_end import Material, measure_end_to_end, with_end_to_end
from compress.speed.measure import measure


def measure_artifact(
    baseline: Path,
    variant: Path,
    profile: Profile,
    model: Model,
    material: Material,
    *,
    seed: int = 0,
    budget_s: float,
    processes: int = 1,
    progress: Progress,
) -> Speed:
    """Two exported folders of one model, paired: see `measure` and `measure_end_to_end`."""
    machine = fitting(profile, model.image)
    speed = measure(
        baseline,
        variant,
        machine,
        vocabulary=model.vocabulary,
        longest=model.longest,
        image=timed_shape(model.image),
        seed=seed,
        budget_s=budget_s,
        processes=processes,
        progress=progress,
    )
    progress.begin("Timing whole requests")
    return with_end_to_end(
        speed,
        lambda: measure_end_to_end(baseline, variant, machine, model.task, material, seed=seed, budget_s=budget_s),
    )
