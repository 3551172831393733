"""Caches fitted to data: last of all, to the attention of the finished model (see compress/engine/kv_pass.py)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.engine import store
from compress.engine.journal import Journal
from compress.engine.kv_pass import KvPass, Settled, cached_blocks, carried_tensors, rows
from compress.engine.layerpass import Pass
from compress.engine.segment import Found
from compress.engine.stream import BlockStream
from compress.errors import InputError
from compress.files import whole_file
from compress.inputs.datasets import Calibration
from compress.kv.observed import Attended, attention_of, use_seen, watching
from compress.kv.spec import KvSpec
from compress.maths import products
from compress.models.model import Model
from compress.models.skeleton import OUTER
from compress.models.weight_files import library_errors
from compress.progress import Progress


def fit(
    passes: Sequence[Pass],
    source: Model,
    calibration: Calibration | None,
    folder: Path,
    device: str,
    progress: Progress,
    journal: Journal | None,
) -> list[Found]:
    """Let the passes that measure settle the caches of a finished store, which keep what the source's had from data as
    far as they still want it. Returns: their rows for the report.

    A stopped run takes up what was observed of each layer; the rest depends on the finished model alone, so it ends
    with the same bytes.
    """
    asking = _asking(passes) if calibration is not None else []
    if not asking and not any(spec.wants for spec in source.kv):
        return []
    model = store.open_store(folder, hashed=False)
    settled = [
        Settled(spec, {name: tensor for name, tensor in held.items() if name in spec.wants})
        for spec, held in zip(model.kv, carried_tensors(source, model), strict=True)
    ]
    results: list[Found] = []
    kept: list[Path] = []
    for place, item in asking:
        assert calibration is not None
        started = time.perf_counter()
        layers = _Layers(item, model, calibration, folder, f"cache-{place}", device, journal)
        found = layers.run([each.spec for each in settled], progress)
        kept += layers.files
        again = item.conclude([each.spec for each in settled], found)
        settled = [
            Settled(new.spec, {**old.tensors, **new.tensors}, new.notes)
            for old, new in zip(settled, again, strict=True)
        ]
        done = rows(item, model, settled)
        seconds = (time.perf_counter() - started) / max(len(done), 1)
        results += [(place, row.model_copy(update={"seconds": seconds})) for row in done]
    store.write_caches(folder, [each.spec for each in settled], [each.tensors for each in settled])
    for path in kept:
        path.unlink(missing_ok=True)
    return results


def check(passes: Sequence[Pass], calibration: Calibration | None) -> None:
    """Raises: UsageError for windows that a pass cannot measure on, before any work."""
    for _, item in _asking(passes):
        if calibration is not None:
            item.windows(calibration.batches())


def _asking(passes: Sequence[Pass]) -> list[tuple[int, KvPass]]:
    return [(place, item) for place, item in enumerate(passes) if isinstance(item, KvPass) and item.measures]


class _Layers:
    """The walk of one pass. files: what was observed of each layer, beside the store until all is done."""

    def __init__(
        self,
        item: KvPass,
        model: Model,
        calibration: Calibration,
        folder: Path,
        step: str,
        device: str,
        journal: Journal | None,
    ) -> None:
        self.item, self.model, self.journal = item, model, journal
        self.blocks = cached_blocks(model)
        self.steps = [f"{step}-{layer}" for layer in range(len(self.blocks))]
        self.files = [folder / f"{each}.tmp" for each in self.steps]
        batches = item.windows(calibration.batches())
        self.stream = BlockStream(model, batches, device=device, spill=folder, dtype=calibration.dtype)

    def run(self, caches: Sequence[KvSpec], progress: Progress) -> list[Mapping[str, Tensor]]:
        """What is observed of each layer, in their order."""
        found: list[Mapping[str, Tensor]] = [
            load_file(path) if self._is_kept(layer) else {} for layer, path in enumerate(self.files)
        ]
        if all(self._is_kept(layer) for layer in range(len(self.files))):
            return found
        use_seen(self.stream.module)
        self.stream.start(self.model.layers(OUTER))
        for index in range(self.blocks[-1] + 1):
            progress.tick("Fitting caches", index, self.blocks[-1] + 1)
            self.stream.load(index, self.model.layers(index), self.model.plain(index))
            layer = self.blocks.index(index) if index in self.blocks else None
            if layer is not None and not self._is_kept(layer):
                found[layer] = self._observed(index, layer, caches[layer])
            if index < self.blocks[-1]:
                with products.fast():
                    self.stream.advance(index)
            self.stream.release(index)
        progress.tick("Fitting caches", self.blocks[-1] + 1, self.blocks[-1] + 1)
        return found

    def _is_kept(self, layer: int) -> bool:
        """Of a run that stopped after its caches were fitted, what was observed is gone, and is observed anew."""
        return self.journal is not None and self.steps[layer] in self.journal and self.files[layer].is_file()

    def _observed(self, index: int, layer: int, spec: KvSpec) -> Mapping[str, Tensor]:
        found = self.item.observe(spec, layer, _Observed(self.stream, index))
        found = {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
        if self.journal is not None:
            with whole_file(self.files[layer]) as beside, library_errors(self.files[layer]):
                save_file(found, beside)
            self.journal.add(self.steps[layer])
        return found


class _Observed:
    """See `kv_pass.Observed`: the loaded block of a stream."""

    def __init__(self, stream: BlockStream, index: int) -> None:
        self._stream, self._index = stream, index
        self._attention = attention_of(stream.module.get_submodule(stream.model.structure.blocks[index]))

    def __len__(self) -> int:
        return len(self._stream.hidden)

    def __iter__(self) -> Iterator[Attended]:
        for hidden in self._stream.hidden:
            with torch.no_grad(), watching(self._attention) as seen:
                self._stream.call(self._index, hidden)
            self._require_finite(seen[0])
            yield seen[0]

    def _require_finite(self, batch: Attended) -> None:
        states = {"queries": batch.query, "keys": batch.key, "values": batch.value}
        odd = next((name for name, each in states.items() if not products.all_finite(each)), None)
        if odd is not None:
            name = self._stream.model.structure.blocks[self._index]
            raise InputError(
                f"{name}: its {odd} are NaN or infinite on calibration data, so no cache can be fitted to them. Check "
                "model and recipe."
            )
