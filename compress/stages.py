"""Cut a recipe into stages (design §3): neighbouring layer and block passes walk together, a whole-model pass alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress import store
from compress.data import Calibration
from compress.layerpass import Pass
from compress.matching import Resolution
from compress.model import Model
from compress.modelpass import ModelPass, Stage
from compress.progress import Progress
from compress.records import LayerResult
from compress.walk import Found, Walk
from compress.workspace import Journal

DONE = "done"


@dataclass(frozen=True)
class Steps:
    """A stage's part of the journal: the steps of different stages have different names."""

    journal: Journal
    prefix: str

    def __contains__(self, step: str) -> bool:
        return self.prefix + step in self.journal

    def get(self, step: str) -> Any:
        """The data of a finished step, or None."""
        return self.journal.get(self.prefix + step)

    def add(self, step: str, data: Any = None) -> None:
        """Note a step as finished."""
        self.journal.add(self.prefix + step, data)


@dataclass(frozen=True)
class Stages:
    """Runs the stages of one pipeline.

    original: the source; resolution: the passes laid over it; folder: of the last stage's store, with the earlier ones'
    beside the segments in `stage-0`, `stage-1` … until all is done.
    """

    passes: tuple[Pass, ...]
    original: Model
    resolution: Resolution
    calibration: Calibration | None
    folder: Path
    journal: Journal | None
    device: str
    progress: Progress

    def run(self) -> list[Found]:
        """All stages in order; those that the journal names as done are taken as they are."""
        groups = cut(self.passes)
        model = replace(self.original, structure=self.resolution.structure)
        found: list[Found] = []
        for number, places in enumerate(groups):
            is_last = number == len(groups) - 1
            folder = self.folder if is_last else self.folder / f"stage-{number}"
            steps = Steps(self.journal, "" if is_last else f"stage-{number}/") if self.journal is not None else None
            found += self._stage(places, model, folder, steps)
            if not is_last:
                model = store.open_store(folder)
                shutil.rmtree(self.folder / f"stage-{number - 1}", ignore_errors=True)
        for number in range(len(groups) - 1):
            shutil.rmtree(self.folder / f"stage-{number}", ignore_errors=True)
        return found

    def _stage(self, places: Sequence[int], model: Model, folder: Path, steps: Steps | None) -> list[Found]:
        if steps is not None and DONE in steps:
            return [(place, LayerResult.model_validate(item)) for place, item in steps.get(DONE)]
        folder.mkdir(parents=True, exist_ok=True)
        first = self.passes[places[0]]
        config: dict[str, Any] = {}
        if isinstance(first, ModelPass):
            found, config = self._whole(first, places[0], model, folder)
        else:
            chosen = {place: self.passes[place] for place in places}
            calibration = self.calibration if any(item.needs_data for item in chosen.values()) else None
            walk = Walk(chosen, model, self.resolution, calibration, folder, steps, self.device)
            found = walk.run(self.progress)
        done = [str(item) for item in self.passes[: places[-1] + 1]]
        store.write_structure(folder, model, done, self.original.digest, config)
        if steps is not None and folder != self.folder:
            steps.add(DONE, [[place, result.model_dump(mode="json")] for place, result in found])
        return found

    def _whole(self, item: ModelPass, place: int, model: Model, folder: Path) -> tuple[list[Found], dict[str, Any]]:
        chosen = {name: one for name, passes in self.resolution.passes.items() for at, one in passes if at == place}
        calibration = self.calibration if item.needs_data else None
        stage = Stage(item, model, self.original, chosen, calibration, folder, self.device, self.progress)
        item.apply(stage)
        missing = set(model.structure.segments) - stage.written
        assert not missing, f"{item.name} left segment {min(missing)} out"
        return [(place, result) for result in stage.results], stage.config


def cut(passes: Sequence[Pass]) -> list[list[int]]:
    """Places of the passes, stage by stage."""
    groups: list[list[int]] = []
    for place, item in enumerate(passes):
        alone = isinstance(item, ModelPass)
        if groups and not alone and not isinstance(passes[groups[-1][-1]], ModelPass):
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups
