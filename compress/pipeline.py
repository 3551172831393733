"""The pass pipeline: read this first.

A pipeline is a tuple of passes (compress/layerpass.py). `run` walks the model block by block: per block and per pass,
in recipe order, it collects the statistics the pass asks for with the block as it now is, applies the pass to its
layers, and drops them; then the block runs again, so that the next one sees what this one really puts out. Each
finished block is written to the store (compress/store.py) and noted in the journal, from which a stopped run resumes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import store
from compress.collect import LayerStats
from compress.data import Calibration, calibrate
from compress.errors import InputError, UsageError
from compress.hessian import weighted_error
from compress.layer import Layer, LayerKind, LayerSpec
from compress.layerpass import LayerPass
from compress.matching import Resolution, resolve
from compress.model import Model
from compress.passes import find
from compress.progress import Progress
from compress.records import LayerResult, PassResult
from compress.skeleton import OUTER
from compress.spec import Call, parse_pipeline
from compress.stream import BlockStream
from compress.workspace import Journal, disk_errors

Found = tuple[int, LayerResult]
"""A layer's result with the place of its pass in the pipeline."""


@dataclass(frozen=True)
class Result:
    """A compressed model and what each pass did."""

    model: Model
    source: Model
    passes: tuple[PassResult, ...]
    pipeline: Pipeline
    calibration: Calibration | None
    untied: tuple[str, ...] = ()


class Pipeline:
    """Passes in order. `Pipeline(Rtn(bits=8))`, or `Pipeline.parse("gptq(bits=4), act_quant")`."""

    def __init__(self, *passes: LayerPass) -> None:
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
        """Lay the passes over a model and check the whole order. Raises: UsageError."""
        return resolve(self.passes, model.structure)

    @property
    def needs_data(self) -> bool:
        """Whether any pass asks for statistics."""
        return any(item.needs for item in self.passes)

    def run(
        self,
        model: Model,
        calibration: Calibration | str | Path | None = None,
        *,
        folder: Path | None = None,
        journal: Journal | None = None,
        device: str = "cpu",
        progress: Progress | None = None,
    ) -> Result:
        """Compress a model.

        Args: calibration: data (a file, see compress/data.py) for passes that need it; folder: where the store is
        written (a temporary one by default); journal: finished blocks of an earlier try; device: where blocks run
        while statistics are collected (passes compute on the CPU).
        Raises: UsageError, InputError, ResourceError, Interrupted.
        """
        if isinstance(calibration, str | Path):
            calibration = calibrate(model, calibration)
        if self.needs_data and calibration is None:
            raise UsageError(f"{self}: needs calibration data. Give --data FILE (in Python: calibration=FILE).")
        resolution = self.resolve(model)
        laid = replace(model, structure=resolution.structure)
        keeper = tempfile.TemporaryDirectory(prefix="compress-") if folder is None else None
        target = Path(keeper.name) if keeper else folder
        assert target is not None
        with disk_errors(target):
            target.mkdir(parents=True, exist_ok=True)
            walk = _Walk(self, laid, resolution, calibration if self.needs_data else None, target, journal, device)
            results = walk.run(progress or Progress(quiet=True))
            store.write_structure(target, model, [str(item) for item in self.passes])
        passes = tuple(self._gather(index, results, resolution) for index in range(len(self.passes)))
        return Result(store.open_store(target, keeper), model, passes, self, calibration, resolution.untied)

    def _gather(self, index: int, results: Sequence[Found], resolution: Resolution) -> PassResult:
        text = str(self.passes[index])
        done = [result for place, result in results if place == index]
        layers = resolution.structure.layers
        skipped = [
            LayerResult(layer=name, users=layers[name].users, pass_text=text, changed=False, reason=reason)
            for name, reason in resolution.skipped[index].items()
        ]
        seconds = sum(result.seconds or 0.0 for result in done)
        return PassResult(pass_text=text, matches=resolution.matches[index], layers=(*done, *skipped), seconds=seconds)


class _Walk:
    """One walk over the segments: outer layers that need no data, blocks, then the outer rest."""

    def __init__(
        self,
        pipeline: Pipeline,
        model: Model,
        resolution: Resolution,
        calibration: Calibration | None,
        folder: Path,
        journal: Journal | None,
        device: str,
    ) -> None:
        self.pipeline = pipeline
        self.model = model
        self.resolution = resolution
        self.folder = folder
        self.journal = journal
        self.device = device
        self.stream: BlockStream | None = None
        if calibration is not None:
            self.stream = BlockStream(model, calibration.batches(), device=device, spill=folder)
        self.results: list[Found] = []

    def run(self, progress: Progress) -> list[Found]:
        """All segments in order; what the journal names is read back instead of computed."""
        outer = self.model.layers(OUTER)
        early, late = self._split_outer()
        found = self._apply_all(outer, early)
        if self.stream is not None:
            self.stream.start(outer)
        count = len(self.model.structure.blocks)
        for index in range(count):
            self._block(index)
            progress.tick("Compressing blocks", index + 1, count)
        found += self._apply_all(outer, late)
        store.write_segment(self.folder, OUTER, outer, self.model.plain(OUTER))
        return found + self.results

    def _split_outer(self) -> tuple[list[str], list[str]]:
        """Layers before the blocks (embeddings, with what is tied to them) and after (the rest)."""
        specs = self.model.structure.segment_layers(OUTER)
        early = [spec.name for spec in specs if spec.kind is LayerKind.EMBEDDING]
        return early, [spec.name for spec in specs if spec.name not in early]

    def _block(self, index: int) -> None:
        step = store.segment_file(index)
        if self.journal is not None and step in self.journal:
            self._replay(index, self.journal.get(step))
            return
        layers, plain = self.model.layers(index), self.model.plain(index)
        if self.stream is not None:
            self.stream.load(index, layers, plain)
        found = self._apply_all(layers, list(layers), index)
        store.write_segment(self.folder, index, layers, plain)
        if self.journal is not None:
            self.journal.add(step, [[place, result.model_dump(mode="json")] for place, result in found])
        self.results += found
        self._advance(index)

    def _replay(self, index: int, data: list[Any]) -> None:
        """A block that an earlier try finished: its results from the journal, its outputs by running it."""
        self.results += [(place, LayerResult.model_validate(item)) for place, item in data]
        if self.stream is None:
            return
        layers, plain = store.read_segment(self.folder, index, self.model.structure)
        self.stream.load(index, layers, plain)
        self._advance(index)

    def _advance(self, index: int) -> None:
        if self.stream is not None:
            self.stream.advance(index)
            self.stream.release(index)

    def _apply_all(self, layers: dict[str, Layer], names: list[str], index: int = OUTER) -> list[Found]:
        """Apply every pass, in order, to some layers of a segment; `layers` is updated."""
        source = {name: layers[name] for name in names}
        found: list[Found] = []
        for place, item in enumerate(self.pipeline.passes):
            chosen = {name: found_pass for name in names if (found_pass := self._pass_for(name, place)) is not None}
            if not chosen:
                continue
            stats = self._collect(item, list(chosen), index)
            for name, one in chosen.items():
                layer, result = apply_one(one, layers[name], source[name], stats.get(name, LayerStats()), str(item))
                layers[name] = layer
                found.append((place, result))
                if self.stream is not None and index != OUTER:
                    self.stream.put(layer)
        return found

    def _pass_for(self, name: str, place: int) -> LayerPass | None:
        return next((item for index, item in self.resolution.passes[name] if index == place), None)

    def _collect(self, item: LayerPass, names: list[str], index: int) -> dict[str, LayerStats]:
        if not item.needs:
            return {}
        assert self.stream is not None
        if index != OUTER:
            return self.stream.collect(index, names)
        return self.stream.collect_head(names)


def apply_one(item: LayerPass, layer: Layer, source: Layer, stats: LayerStats, text: str) -> tuple[Layer, LayerResult]:
    """Apply one pass to one layer and check what it returns.

    Args: source: the layer as the walk found it, against which errors are taken; text: the pass as it was written.
    Raises: InputError when the result is not finite.
    """
    started = time.perf_counter()
    changed = item.layer(layer, stats)
    seconds = time.perf_counter() - started
    assert (changed.name, changed.users, changed.shape) == (layer.name, layer.users, layer.shape), item.name
    reference, weight = source.float_weight(), changed.float_weight()
    if not bool(torch.isfinite(weight).all()):
        raise InputError(f"{item.name} made NaN or infinite values in layer {layer.name}. The run stops here.")
    error_after, output_error = _errors(weight, reference, stats)
    error_before, _ = _errors(layer.float_weight(), reference, LayerStats())
    return replace(changed, notes=()), LayerResult(
        layer=layer.name,
        users=layer.users,
        pass_text=text,
        changed=True,
        format=describe(changed),
        bits_per_weight=changed.bits_per_weight,
        error_before=error_before,
        error_after=error_after,
        output_error=output_error,
        seconds=seconds,
        notes=changed.notes,
    )


def _errors(weight: Tensor, reference: Tensor, stats: LayerStats) -> tuple[float, float | None]:
    """Relative squared error of the weight, and of the layer's output where its inputs are known."""
    difference = weight - reference
    error = _power(difference) / (_power(reference) or 1.0)
    if stats.hessian is None:
        return error, None
    whole = weighted_error(reference, stats.hessian) or 1.0
    return error, weighted_error(difference, stats.hessian) / whole


def _power(tensor: Tensor) -> float:
    """Sum of squares, added up in float64."""
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def describe(layer: Layer | LayerSpec) -> str:
    """`int4(group=32)`, `float16`, `int8(channel) with int8(tensor, asymmetric) inputs`."""
    if layer.format is not None:
        text = str(layer.format)
    elif isinstance(layer, Layer):
        assert isinstance(layer.weight, Tensor)
        text = str(layer.weight.dtype).removeprefix("torch.")
    else:
        text = str(layer.source_dtype).removeprefix("torch.")
    return f"{text} with {layer.act.format} inputs" if layer.act else text


def planned(resolution: Resolution) -> dict[str, LayerSpec]:
    """The specs that a run would end with: formats and input grids filled in, no weights needed."""
    specs = {}
    for name, spec in resolution.structure.layers.items():
        for _, item in resolution.passes[name]:
            spec = item.plan(spec)
        specs[name] = spec
    return specs
