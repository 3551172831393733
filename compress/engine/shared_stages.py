"""Finished stages that recipes of one sweep share: what begins alike is computed once.

A stage is found by a digest of all that decides its store. The code and the versions are not part of it: the folder
belongs to one sweep, which does not go on under others.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.engine.layerpass import Pass
from compress.engine.matching import Resolution
from compress.files import copy_folder, read_json, write_text
from compress.inputs.datasets import Calibration

RESULTS = "results.json"


@dataclass(frozen=True)
class SharedStages:
    """Stores of finished stages in `folder`, each with its results. Files are linked, not copied, where possible: no
    file of a store is ever changed in place."""

    folder: Path

    def take(self, key: str, places: Sequence[Path]) -> Any:
        """Put a known stage's folders in these places. Returns: its results, or None where nobody has done it yet."""
        known = self.folder / key
        if not (known / RESULTS).is_file():
            return None
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
            if (known / place.name).is_dir():
                copy_folder(known / place.name, place, _link)
        return read_json(known / RESULTS)

    def give(self, key: str, places: Sequence[Path], results: Any) -> None:
        """Keep a stage that was just finished, for those that come after. places: its folders, as far as they are."""
        known, making = self.folder / key, self.folder / f"{key}.{os.getpid()}"
        if known.exists():
            return
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        for place in places:
            if place.is_dir():
                copy_folder(place, making / place.name, _link)
        write_text(making / RESULTS, json.dumps(results))
        try:
            making.rename(known)
        except OSError:  # another worker was faster with the same
            shutil.rmtree(making)


def stage_key(
    model_digest: str, passes: Sequence[Pass], resolution: Resolution, calibration: Calibration | None, device: str
) -> str:
    """Of all stages up to one. passes: of those stages, in order; resolution: of the whole recipe."""
    last = len(passes) - 1
    layers = {
        name: [list(spec.users), [place for place, _ in resolution.passes[name] if place <= last],
               any(place > last for place, _ in resolution.passes[name])]
        for name, spec in resolution.structure.layers.items()
    }  # fmt: skip
    needs = calibration is not None and any(item.needs_data for item in passes)
    data = calibration.summary() if calibration is not None and needs else {}
    content = [model_digest, [str(item) for item in passes], layers, data, device]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
    return target
