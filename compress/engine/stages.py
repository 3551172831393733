"""Cut a recipe into stages (design §3): neighbouring layer and block passes walk together, a whole-model pass alone."""

from __future__ import annotations

import shutil
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compress.engine import store
from compress.engine.journal import Journal, Steps
from compress.engine.kv_pass import KvPass, Settled, carried, refilled, rows
from compress.engine.layerpass import Pass
from compress.engine.matching import Resolution
from compress.engine.modelpass import ModelPass, Stage
from compress.engine.originals import Sources, folder_of
from compress.engine.part import LOSSY
from compress.engine.reshape import Section, places_of, section
from compress.engine.segment import Found, as_data, from_data
from compress.engine.segment_files import segment_file
from compress.engine.shared_stages import SharedStages, stage_key
from compress.engine.walk import Walk
from compress.engine.zeros import pruner
from compress.inputs.datasets import Calibration
from compress.models.edits import reshaped
from compress.models.model import Model
from compress.models.skeleton import Structure
from compress.progress import Progress

DONE = "done"
SHAPE = "shape"
"""The step that a stage adds which changes the shape of the model; its data are what it made (`store.read_shape`)."""
SHARED = "shared"
"""The step of a stage that another recipe had finished; its data are the passes."""


@dataclass
class Stages:
    """Runs the stages of one pipeline.

    original: the source; folder: of the last stage's store, with the earlier ones' beside the segments in `stage-0`,
    `stage-1` … until all is done, and what errors are taken against (Sources). A store is removed only once the journal
    names the stage after it as done, so a run may be killed at any moment; that of a changed shape (`Section`) stays to
    the end. sections: as the stages met them; the first, over the source, is given.
    """

    passes: tuple[Pass, ...]
    original: Model
    calibration: Calibration | None
    folder: Path
    journal: Journal | None
    device: str
    progress: Progress
    sections: list[Section]
    shared: SharedStages | None = None
    _bases: list[int] = field(default_factory=list)

    def run(self) -> list[Found]:
        """All stages in order; those that the journal names as done are taken as they are, and need not be there."""
        groups = cut(self.passes)
        found: list[Found] = []
        self._tell_resumed(groups)
        ends = places_of(self.passes)[1:]
        for number, places in enumerate(groups):
            is_last = number == len(groups) - 1
            steps = self._steps(number, is_last)
            done = None if steps is None else steps.get(DONE)
            if done is None:
                done = as_data(self._computed(number, places, is_last, steps))
                if steps is not None:
                    steps.add(DONE, done)
                if not is_last:  # only now does nothing read what this stage started from
                    self._remove(number - 1)
            found += from_data(done)
            if self.passes[places[-1]].reshapes:
                self._enter(number, ends.pop(0), is_last, steps)
        for number in range(len(groups)):
            _remove(self._folder(number))
            _remove(folder_of(self.folder, number))
        return found

    def _steps(self, number: int, is_last: bool) -> Steps | None:
        return None if self.journal is None else Steps(self.journal, "" if is_last else f"stage-{number}/")

    def _computed(self, number: int, places: Sequence[int], is_last: bool, steps: Steps | None) -> list[Found]:
        folder = self.folder if is_last else self._folder(number)
        if is_last or self.shared is None:
            results = self._stage(number, places, folder, steps)
        else:
            results = self._taken(self.shared, number, places, steps)
        if steps is not None and self.passes[places[-1]].reshapes:
            steps.add(SHAPE, store.read_shape(folder))
        return results

    def _enter(self, number: int, places: range, is_last: bool, steps: Steps | None) -> None:
        """The section after a stage that changed the shape of the model, whose store may be gone by now."""
        folder = self.folder if is_last else self._folder(number)
        data = store.read_shape(folder) if steps is None else steps.get(SHAPE)
        model = reshaped(self.sections[-1].model, store.shape_of(data))
        self.sections.append(section(self.passes, places, model))
        self._bases.append(number)

    @property
    def resolution(self) -> Resolution:
        """Of the section under way."""
        return self.sections[-1].resolution

    def _tell_resumed(self, groups: Sequence[Sequence[int]]) -> None:
        """At once, where an earlier try finished anything: what is not computed again."""
        if self.journal is None or not self.journal.steps:
            return
        prefixes = [f"stage-{number}/" for number in range(len(groups) - 1)] + [""]
        number = next((place for place, each in enumerate(prefixes) if each + DONE not in self.journal), None)
        where, count = f"Resuming {self.journal.path.parent}", len(self.original.structure.blocks)
        for prefix in prefixes[:number]:
            count = len((self.journal.get(prefix + SHAPE) or {}).get("origin", ())) or count
        if number is None:
            self.progress.note(f"{where}: all passes are done")
            return
        steps = Steps(self.journal, prefixes[number])
        kept = sum(segment_file(index) in steps for index in range(count))
        stage = f"in stage {number + 1} of {len(groups)} " if len(groups) > 1 else ""
        under_way = [self.passes[place] for place in groups[number]]
        if kept or not any(isinstance(item, ModelPass) for item in under_way):
            self.progress.note(f"{where}: {stage}{kept} of {count} blocks are done")
        else:  # it has the whole model at once, and so no blocks that are done before others
            names = ", ".join(item.name for item in under_way)
            self.progress.note(f"{where}: at stage {number + 1} of {len(groups)} ({names})")

    def _taken(self, shared: SharedStages, number: int, places: Sequence[int], steps: Steps | None) -> list[Found]:
        """A stage that another recipe has finished, or its result for those that come after."""
        passes = self.passes[: places[-1] + 1]
        key = stage_key(self.original.digest, passes, self.resolution, self.calibration, self.device)
        folders = [self._folder(number), folder_of(self.folder, number)]
        known = shared.take(key, folders)
        if known is not None:
            if steps is not None:
                steps.add(SHARED, ", ".join(map(str, passes)))
            return from_data(known)
        results = self._stage(number, places, self._folder(number), steps)
        shared.give(key, folders, as_data(results))
        return results

    def _folder(self, number: int) -> Path:
        return self.folder / f"stage-{number}"

    def _remove(self, last: int) -> None:
        """Remove the stores of the stages up to `last`, with what a kill left of them."""
        for number in set(range(last + 1)) - set(self._bases):
            _remove(self._folder(number))

    def _stage(self, number: int, places: Sequence[int], folder: Path, steps: Steps | None) -> list[Found]:
        base = self._bases[-1] if self._bases else None
        first = self.original if base is None else store.open_store(self._folder(base), hashed=False)
        original = replace(first, structure=self._as_laid(first.structure))
        begins = number == (0 if base is None else base + 1)
        model = original if begins else store.open_store(self._folder(number - 1), hashed=False)
        later = {name for name, found in self.resolution.passes.items() if found and found[-1][0] > places[-1]}
        before, now = self._lossy(range(places[0])), self._lossy(places)
        sources = Sources(original, self.folder, number, before, now, later)
        folder.mkdir(parents=True, exist_ok=True)
        item = self.passes[places[0]]
        made: Model | None = None
        config: dict[str, Any] = {}
        if isinstance(item, ModelPass):
            results, config, made = self._whole(item, places[0], model, folder, sources)
        else:
            chosen = {place: self.passes[place] for place in places}
            calibration = self.calibration if any(item.needs_data for item in chosen.values()) else None
            walk = Walk(chosen, model, self.resolution, calibration, folder, steps, self.device, sources)
            results = walk.run(self.progress)
        done = [str(item) for item in self.passes[: places[-1] + 1]]
        caches = model.kv
        if made is not None:
            caches = carried(model, made)
            model = replace(model, structure=made.structure, edits=made.edits, origin=made.origin)
        for place in places:
            each = self.passes[place]
            if isinstance(each, KvPass):
                caches = refilled(each, caches, model)
                if not each.measures:  # those that do tell what data settled, in the end
                    results += [(place, row) for row in rows(each, model, [Settled(spec) for spec in caches])]
        store.write_structure(folder, replace(model, kv=caches), done, self.original.digest, config)
        return results

    def _as_laid(self, structure: Structure) -> Structure:
        """The structure of a section's first model with its weights, with tied layers parted as the passes ask for; of
        types as they are stored."""
        laid, stored = self.resolution.structure, structure.layers
        layers = {
            name: replace(spec, source_dtype=stored[name].source_dtype) if name in stored else spec
            for name, spec in laid.layers.items()
        }
        return replace(laid, layers=layers)

    def _lossy(self, places: Container[int]) -> set[str]:
        """Layers that passes at some places lose something of, after the last of these that renews them."""
        lossy: set[str] = set()
        for name, found in self.resolution.passes.items():
            for at, one in found:
                if at in places and one.renews:
                    lossy.discard(name)
                elif at in places and LOSSY & one.fills():
                    lossy.add(name)
        return lossy

    def _pruned(self, place: int) -> frozenset[str]:
        """Layers that passes before some place prune."""
        found = self.resolution.passes.items()
        return frozenset(name for name, passes in found if pruner(one for at, one in passes if at < place))

    def _whole(
        self, item: ModelPass, place: int, model: Model, folder: Path, sources: Sources
    ) -> tuple[list[Found], dict[str, Any], Model | None]:
        chosen = {name: one for name, passes in self.resolution.passes.items() for at, one in passes if at == place}
        calibration = self.calibration if item.needs_data else None
        pruned = self._pruned(place)
        stage = Stage(
            item, model, self.original, chosen, calibration, folder, self.device, self.progress, sources, pruned
        )
        self.progress.begin(f"Pass over the whole model: {item.name}")
        item.apply(stage)
        missing = set((stage.made or model).structure.segments) - stage.written
        assert not missing, f"{item.name} left segment {min(missing)} out"
        return [(place, result) for result in stage.results], stage.config, stage.made


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


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
