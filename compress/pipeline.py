"""The pass pipeline: read this first.

A pipeline is a tuple of passes (compress/engine/layerpass.py, compress/engine/blockpass.py,
compress/engine/modelpass.py), cut into stages (compress/engine/stages.py): a pass that needs the whole model is one of
its own, all others walk the model block by block (compress/engine/walk.py). Per block and per pass, in recipe order,
the walk collects the statistics the pass asks for with the block as it now is, applies the pass
(compress/engine/applying.py), and drops them; then the block runs again, so that the next one sees what this one really
puts out. Each finished block is written to the store (compress/engine/store.py) and noted in the journal, from which a
stopped run resumes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from compress.engine import kv_fit, output_grids, sparsity, store
from compress.engine.applying import left
from compress.engine.disk import disk_errors
from compress.engine.journal import Journal
from compress.engine.kv_pass import KvPass, cached_blocks, carried, check_filled, refilled
from compress.engine.layerpass import Pass
from compress.engine.matching import Resolution
from compress.engine.reshape import Section, lay
from compress.engine.segment import Found
from compress.engine.shared_stages import SharedStages
from compress.engine.stages import Stages
from compress.errors import UnsupportedError, UsageError
from compress.inputs.datasets import Calibration, calibrate
from compress.kv.spec import KvSpec
from compress.layer import LayerSpec
from compress.models.model import Model
from compress.passes import PASSES, find
from compress.progress import Progress
from compress.records import PassResult
from compress.records.sparsity import Sparsity
from compress.spec import Call, parse_pipeline


@dataclass(frozen=True)
class Result:
    """A compressed model and what each pass did."""

    model: Model
    source: Model
    passes: tuple[PassResult, ...]
    pipeline: Pipeline
    calibration: Calibration | None
    untied: tuple[str, ...] = ()
    sparsity: Sparsity | None = None


class Pipeline:
    """Passes in order. `Pipeline(Rtn(bits=8))`, or `Pipeline.parse("gptq(bits=4), act_quant")`."""

    def __init__(self, *passes: Pass) -> None:
        if not passes:
            raise UsageError("A pipeline needs at least one pass; `compress passes` lists them.")
        self.passes = passes

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """From the one-line text. Raises: UsageError."""
        return cls.of_calls(parse_pipeline(text))

    @classmethod
    def of_calls(cls, calls: Sequence[Call]) -> Pipeline:
        """From parsed passes. Raises: UsageError."""
        for call in calls:
            if call.args:
                raise UsageError(f"{call.text()}: settings are given by name, as {call.name}(name=value).")
        return cls(*(find(call.name).build(call.kwargs) for call in calls))

    def __str__(self) -> str:
        return ", ".join(str(item) for item in self.passes)

    def resolve(self, model: Model) -> Resolution:
        """Lay the passes over a model, those after a change of its shape over what will be left of it, and check the
        whole order. Returns: of the last section. Raises: see `lay`."""
        return self.lay(model)[-1].resolution

    def lay(self, model: Model) -> list[Section]:
        """All sections of the recipe, as far as is known without data. Raises: UsageError; UnsupportedError for a kind
        of model that a pass cannot treat."""
        for item in self.passes:
            if model.image is not None and model.image.graph and not item.opaque:
                raise UnsupportedError(
                    f"{item.name}: {model.source} is an ONNX graph, which can be run but neither traced nor "
                    "differentiated. Passes that take it layer by layer work: "
                    f"{', '.join(name for name in PASSES if find(name).opaque)}."
                )
        found = lay(self.passes, model)
        if any(item.caches for item in self.passes):
            check_filled(self.passes, len(cached_blocks(model)))
        return found

    def check_dtype(self, model: Model, dtype: torch.dtype | None) -> None:
        """Raises: UsageError where blocks may not compute in a calibration's type."""
        if dtype in (None, torch.float32):
            return
        found = next((item.name for item in self.passes if not item.any_dtype), None)
        if model.image is not None or found:
            who = f"the pass {found}" if found else "an image classifier"
            raise UsageError(
                f"calibration dtype {str(dtype).removeprefix('torch.')}: {who} computes with whole blocks in float32. "
                "Leave it at float32."
            )

    @property
    def needs_data(self) -> bool:
        """Whether any pass asks for statistics of real inputs; how layers are wired shows on any."""
        return any(item.needs_data for item in self.passes)

    def run(
        self,
        model: Model,
        calibration: Calibration | str | Path | None = None,
        *,
        folder: Path | None = None,
        journal: Journal | None = None,
        device: str = "cpu",
        progress: Progress | None = None,
        shared: SharedStages | None = None,
    ) -> Result:
        """Compress a model.

        Args: calibration: data (a file, see compress/inputs/datasets.py) for passes that need it; folder: where the
        store is written (a temporary one by default); journal: finished blocks of an earlier try; device: where blocks
        run while statistics are collected (passes compute on the CPU); shared: finished stages of recipes that begin
        alike.
        Raises: UsageError, InputError, ResourceError, Interrupted.
        """
        if isinstance(calibration, str | Path):
            calibration = calibrate(model, calibration, rest=any(item.trains_rest for item in self.passes))
        if self.needs_data and calibration is None:
            raise UsageError(f"{self}: needs calibration data. Give --data FILE (in Python: calibration=FILE).")
        self.check_dtype(model, None if calibration is None else calibration.dtype)
        laid = self.lay(model)
        planned(laid[-1].resolution)  # refuses what a layer's shape does not allow, before any work
        kv_fit.check(self.passes, calibration)
        keeper = tempfile.TemporaryDirectory(prefix="compress-") if folder is None else None
        target = Path(keeper.name) if keeper else folder
        assert target is not None
        with disk_errors(target):
            target.mkdir(parents=True, exist_ok=True)
            quiet = progress or Progress(quiet=True)
            stages = Stages(self.passes, model, calibration, target, journal, device, quiet, laid[:1], shared)
            results = stages.run()
            output_grids.fit(stages.resolution, calibration, target, device)
            results += kv_fit.fit(self.passes, model, calibration, target, device, quiet, journal)
        passes = tuple(self._gather(place, results, part) for part in stages.sections for place in part.places)
        untied = tuple(name for part in stages.sections for name in part.resolution.untied)
        made = store.open_store(target, keeper)
        zeros = sparsity.measured(made, stages.resolution)
        return Result(made, model, passes, self, calibration, untied, zeros)

    def _gather(self, index: int, results: Sequence[Found], part: Section) -> PassResult:
        text, resolution, number = str(self.passes[index]), part.resolution, index - part.places.start
        done = [result for place, result in results if place == index]
        layers = resolution.structure.layers
        touched = {result.layer for result in done}  # a rescaling reaches layers that the pass was not asked to treat
        skipped = [
            left(layers[name], text, reason)
            for name, reason in resolution.skipped[number].items()
            if name not in touched
        ]
        seconds = sum(result.seconds or 0.0 for result in done)
        return PassResult(pass_text=text, matches=resolution.matches[number], layers=(*done, *skipped), seconds=seconds)


def planned_caches(passes: Sequence[Pass], sections: Sequence[Section]) -> tuple[KvSpec, ...]:
    """How each layer's cache will be kept; empty where no pass is about it."""
    caches: tuple[KvSpec, ...] = ()
    for number, part in enumerate(sections):
        if number:
            caches = carried(replace(sections[number - 1].model, kv=caches), part.model)
        for place in part.places:
            item = passes[place]
            caches = refilled(item, caches, part.model) if isinstance(item, KvPass) else caches
    return caches


def possible_caches(passes: Sequence[Pass], caches: Sequence[KvSpec]) -> tuple[KvSpec, ...]:
    """Planned caches, and those that data may make of them instead; each once."""
    ours = [item for item in passes if isinstance(item, KvPass)]
    return tuple(
        dict.fromkeys([*caches, *(other for item in ours for spec in caches for other in item.alternatives(spec))])
    )


def planned(resolution: Resolution) -> dict[str, LayerSpec]:
    """The specs that a run would end with: formats and input grids filled in, no weights needed."""
    specs = {}
    for name, spec in resolution.structure.layers.items():
        for _, item in resolution.passes[name]:
            spec = item.plan(spec)
        specs[name] = spec
    return specs
