"""What a sweep was asked for, and all that is known of it before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from compress.defaults import BUDGET_S
from compress.errors import CompressError, UsageError
from compress.hwprofiles import Profile
from compress.inputs.datasets import Calibration, Samples
from compress.models.loading import load
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.plan import make_plan
from compress.quality.metrics import check_gates
from compress.recipe import Recipe
from compress.records import Plan
from compress.run import fingerprint, load_data, refuse
from compress.run_report import Request
from compress.sweep.names import named
from compress.sweep.records import Limits

VARIANTS = "variants"
"""Where in a sweep's folder its artifacts are."""
OWN = ("recipe", "calibration", "calibration dtype")
"""Parts of a fingerprint that variants of one sweep may differ in."""


@dataclass(frozen=True)
class SweepRequest:
    """What `compress run` with several recipes was asked for."""

    model: str
    recipes: tuple[Recipe, ...]
    profile: Profile
    out: Path
    data: str | None = None
    device: str = "cpu"
    overwrite: bool = False
    command: str = ""
    budget_s: float = BUDGET_S
    limits: Limits = field(default_factory=Limits)

    def requests(self) -> dict[str, Request]:
        """By variant, each as `compress run` would take it. Raises: UsageError for recipes that cannot be compared."""
        return {
            name: Request(
                self.model,
                recipe.for_target(self.profile.target),
                self.profile,
                self.out / VARIANTS / name,
                data=self.data,
                device=self.device,
                command=self.command,
                budget_s=self.budget_s,
            )
            for name, recipe in named(self.recipes).items()
        }


@dataclass
class Planned:
    """One variant before any work: what it will do, with which data, or why it will not."""

    request: Request
    pipeline: Pipeline
    plan: Plan
    calibration: Calibration | None
    fingerprint: dict[str, str]


@dataclass
class Setup:
    """All that is known before any work."""

    model: Model
    windows: Samples
    planned: dict[str, Planned]
    failures: dict[str, CompressError]

    @property
    def shared(self) -> dict[str, str]:
        """The fingerprint of what all variants have in common."""
        first = next(iter(self.planned.values())).fingerprint
        return {key: text for key, text in first.items() if key not in OWN}


def prepare(request: SweepRequest) -> Setup:
    """Load the model once, plan every variant, read the data. Raises: UsageError; the first failure if all fail."""
    requests, model = request.requests(), load(request.model)
    data: dict[str, tuple[Calibration | None, Samples]] = {}
    planned: dict[str, Planned] = {}
    failures: dict[str, CompressError] = {}
    parsed = {name: Pipeline.parse(each.recipe.passes) for name, each in requests.items()}  # a typo stops all
    for name, each in requests.items():
        recipe, pipeline = each.recipe, parsed[name]
        try:
            plan = make_plan(model, recipe, each.profile, pipeline)
            refuse(plan)
            _refuse_tasks(name, recipe)
            check_gates(recipe.quality.gates, model.task, generation=recipe.quality.generation > 0)
        except CompressError as error:
            failures[name] = error
            continue
        settings = recipe.calibration.model_dump_json()
        if settings not in data:
            data[settings] = load_data(model, each)
        calibration, windows = data[settings]
        found = fingerprint(model, each, calibration, windows)
        planned[name] = Planned(each, pipeline, plan, calibration, found)
    if not planned:
        raise next(iter(failures.values()))
    _require_one_data_set({name: each.fingerprint["quality"] for name, each in planned.items()})
    return Setup(model, next(iter(data.values()))[1], planned, failures)


def _refuse_tasks(name: str, recipe: Recipe) -> None:
    if recipe.tasks is not None:
        raise UsageError(
            f"Recipe {name} names tasks, which are not scored where several recipes run. Score the variant that you "
            "choose: compress eval OUT --tasks ..."
        )


def _require_one_data_set(digests: Mapping[str, str]) -> None:
    if len(set(digests.values())) > 1:
        first, *others = digests
        other = next(name for name in others if digests[name] != digests[first])
        raise UsageError(
            f"{first} and {other} would be judged by different data, which cannot be compared. Give all recipes of a "
            "sweep the same quality.data, or one --data."
        )
