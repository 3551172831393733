"""Tensors that belong to the caches of a model, beside their `KvSpec`s: scales that data gave, heads that score.

One safetensors file beside what says the specs, `<layer>.<name>` each; no file where there are none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from compress.errors import InputError
from compress.files import umask, whole_file
from compress.kv.spec import KvSpec, LayerTensors
from compress.models.weight_files import library_errors, open_file, read_tensor

FILE = "caches.safetensors"


def write_tensors(folder: Path, layers: Sequence[LayerTensors]) -> None:
    """The file for these layers, complete or absent. Raises: OSError for a full disk and the like."""
    path = folder / FILE
    each = ((f"{layer}.{name}", tensor) for layer, held in enumerate(layers) for name, tensor in held.items())
    found = {name: tensor.contiguous() for name, tensor in sorted(each, key=lambda item: item[0])}
    if not found:
        path.unlink(missing_ok=True)
        return
    with whole_file(path) as beside, library_errors(path):
        save_file(found, beside)
        beside.chmod(0o666 & ~umask())  # the library writes files that only their owner can read


def read_tensors(folder: Path, specs: Sequence[KvSpec]) -> tuple[dict[str, Tensor], ...]:
    """What the caches want of a folder, by layer. Raises: InputError where it is not there."""
    path = folder / FILE
    if not any(spec.wants for spec in specs):
        return tuple({} for _ in specs)
    if not path.is_file():
        layer, spec = next((place, each) for place, each in enumerate(specs) if each.wants)
        raise InputError(f"{path} is missing: the cache of layer {layer} needs its {spec.wants[0]}. Copy it again.")
    handle = open_file(path)
    return tuple(
        {name: read_tensor(handle, f"{layer}.{name}", path) for name in spec.wants} for layer, spec in enumerate(specs)
    )
